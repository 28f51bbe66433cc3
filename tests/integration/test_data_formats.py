"""One conversation in every format, through prift-score; and the data's own weights, through all that reads them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launching import ALL_COLUMNS, Finished, metrics_of, score

from shared.config import TrainConfig
from shared.score_store import read_manifest
from shared.verify import verify_store
from shared.weighting import resolve_weighting
from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import open_cache
from stage2_train.hf import ScoreStore
from stage2_train.loss import OnlineWeights
from stage2_train.weigh import StepWeigher

BOS, EOS = 256, 257
ASKED = ["Name a colour.", "And a warmer one?"]
SAID = ["Blue, as the sea is.", "Red."]


def messages_of(turns: int) -> list[dict[str, Any]]:
    pairs = list(zip(ASKED, SAID, strict=True))[:turns]
    return [
        {"role": role, "content": text}
        for asked, said in pairs
        for role, text in (("user", asked), ("assistant", said))
    ]


def as_sharegpt(turns: int, tokenizer: Any) -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in messages_of(turns)]}


def as_alpaca(turns: int, tokenizer: Any) -> dict[str, Any]:
    *earlier, (asked, said) = list(zip(ASKED, SAID, strict=True))[:turns]
    return {"instruction": asked, "input": "", "output": said, "history": earlier}


def as_tokens(turns: int, tokenizer: Any) -> dict[str, Any]:
    """Ids by the template, targets found by their text: each answer and the <|im_end|> after it."""
    ids = tokenizer.apply_chat_template(messages_of(turns), tokenize=True, return_dict=False)
    mask = [0] * len(ids)
    for said in SAID[:turns]:
        answer = tokenizer.encode(said + "<|im_end|>", add_special_tokens=False)
        (start,) = [i for i in range(len(ids)) if ids[i : i + len(answer)] == answer]
        mask[start : start + len(answer)] = [1] * len(answer)
    return {"input_ids": ids, "target_mask": mask}


FORMATS: dict[str, Callable[[int, Any], dict[str, Any]]] = {
    "messages": lambda turns, _: {"messages": messages_of(turns)},
    "sharegpt": as_sharegpt,
    "alpaca": as_alpaca,
    "prompt_messages": lambda turns, _: {"prompt": messages_of(turns)[:1], "completion": messages_of(turns)[1:]},
    "tokens": as_tokens,
}


def said_in(name: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Two conversations, of one turn and of two, in a format."""
    return [{"id": f"row-{turns}", **FORMATS[name](turns, tokenizer)} for turns in (1, 2)]


def test_the_same_conversation_in_five_formats(
    prior: Path, pipeline: Path, tmp_path: Path, tokenizer_with, write_jsonl, read_store
):
    stores = {}
    for name in FORMATS:
        data = write_jsonl(tmp_path / f"{name}.jsonl", said_in(name, tokenizer_with()))
        score(pipeline, f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/{name}", ALL_COLUMNS)
        assert read_manifest(tmp_path / name).source.format == name
        # Only conversations can be split into turns, and say that these were not.
        stores[name] = [{k: v for k, v in row.items() if k != "turn"} for row in read_store(tmp_path / name)]
    first = stores["messages"]
    counts = [len(tokenizer_with().encode(said)) + 1 for said in SAID]
    assert [sum(value is not None for value in row["logprob"]) for row in first] == [counts[0], sum(counts)]
    assert sum(row == first for row in stores.values()) == 5, "every id, target and score is bit for bit the same"


def test_weights_are_announced(prior: Path, prift_score, tmp_path: Path, write_jsonl):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": turns}])
    outcome = prift_score(f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/store")
    assert "data: messages rows, template chat, targets completion, some of weights of their own\n" in outcome.stdout


def test_text_is_scored_whole(prior: Path, pipeline: Path, tmp_path: Path, write_jsonl, read_store):
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "once upon a time"}])
    score(pipeline, f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/store")
    (row,) = read_store(tmp_path / "store")
    assert row["input_ids"] == [BOS, *b"once upon a time", EOS]
    assert [value is None for value in row["logprob"]] == [True] + [False] * 17


@pytest.fixture(scope="module")
def weighted(prior: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory, write_jsonl) -> Path:
    """Eight conversations of two turns: one of weight 0.5 and one of 3, 1 or 0; scored in shards of three."""
    folder = tmp_path_factory.mktemp("weighted")
    rows = [
        {
            "id": f"row-{n}",
            "messages": [
                {"role": "user", "content": ASKED[0] + "!" * n},
                {"role": "assistant", "content": SAID[0], "weight": 0.5},
                {"role": "user", "content": ASKED[1]},
                {"role": "assistant", "content": SAID[1] + "." * n, "weight": [3, 1, 0][n % 3]},
            ],
        }
        for n in range(8)
    ]
    data = write_jsonl(folder / "data.jsonl", rows)
    score(
        pipeline, f"data.path={data}", f"prior.model={prior}", f"score.output={folder}/store", "score.shard_rows=3",
        ALL_COLUMNS,
    )  # fmt: skip
    return folder / "store"


def test_weights_stand_in_the_store_beside_the_targets(weighted: Path, read_store, tokenizer_with):
    manifest = read_manifest(weighted)
    assert manifest.source.weighted
    assert "target_weight" not in manifest.identity.columns
    for n, row in enumerate(read_store(weighted)):
        found = [weight for weight in row["target_weight"] if weight is not None]
        second = [3, 1, 0][n % 3]
        counts = [len(tokenizer_with().encode(said)) + 1 for said in (SAID[0], SAID[1] + "." * n)]
        assert found == [0.5] * counts[0] + [second] * (counts[1] * (second != 0))
        assert [w is None for w in row["target_weight"]] == [p is None for p in row["logprob"]]
    assert verify_store(weighted).problems == []


def test_a_weight_out_of_bounds_is_found(weighted: Path, tmp_path: Path, rewrite):
    store = tmp_path / "store"
    shutil.copytree(weighted, store)

    def spoil(table: pa.Table) -> pa.Table:
        lists = table.column("target_weight").to_pylist()
        lists[1] = [value and -value for value in lists[1]]
        place = table.schema.get_field_index("target_weight")
        return table.set_column(place, "target_weight", pa.array(lists, pa.list_(pa.float32())))

    rewrite(store / "shard-00001.parquet", spoil)
    problems = verify_store(store).problems
    assert any("target_weight is not finite or outside" in problem and "'row-4'" in problem for problem in problems)


RULES = ["sft", "prift_prob", "prift_mass", "dft"]


def expected_weights(weighted: Path, method: str) -> np.ndarray:
    """The formula of a method times the data's weights, for all targets in source order, from the files."""
    flat = {
        name: np.concatenate(
            [
                np.array([value for value in row if value is not None])
                for path in sorted(weighted.glob("*.parquet"))
                for row in pq.read_table(path).column(name).to_pylist()
            ]
        )
        for name in ("logprob", "mass_rank", "target_weight")
    }
    rule = {"sft": np.ones_like(flat["logprob"]), "prift_mass": (flat["mass_rank"] <= 0.5).astype(float)}
    return rule.get(method, np.exp(flat["logprob"])) * flat["target_weight"]


@pytest.mark.parametrize("method", RULES)
def test_training_multiplies_the_rule_by_the_datas_weights(weighted: Path, tmp_path: Path, method: str):
    config = TrainConfig(method=method)
    weighting = resolve_weighting(config)
    columns = weighting.columns if weighting.source == "prior" else ()
    cache = open_cache(weighted, columns, tmp_path)
    rows = np.arange(len(cache))
    batch = make_batch(cache, rows, tuple(rows.tolist()), (), BatchForm(packed=True))
    weigher = StepWeigher(weighting, config, cache, lambda tensor: tensor)
    given = weigher.given(1, rows, [batch])
    found = torch.zeros(len(batch.places_N))
    if given is not None:
        found[given[0].kept_K] = given[0].weights_K
    else:
        # The model's own statistics, which here are the prior's, in two parts as the head makes them.
        (part,) = weigher.prepare(1, rows, [batch], None, 1, lambda *_: pytest.fail("no first pass"))
        assert isinstance(part.weights, OnlineWeights)
        logprob = torch.from_numpy(np.array(open_cache(weighted, ("logprob",), tmp_path).columns["logprob"]))
        for piece in (slice(0, 100), slice(100, len(found))):
            found[piece] = part.weights.weigh({"logprob": logprob[piece]}, piece)
    np.testing.assert_allclose(found.numpy(), expected_weights(weighted, method), rtol=1e-6)


@pytest.mark.parametrize("method", RULES)
def test_other_trainers_and_exports_get_the_same_weights(weighted: Path, tmp_path: Path, prift_inspect, method: str):
    expected = expected_weights(weighted, method)
    store = ScoreStore(weighted, method=method, cache_dir=tmp_path / "cache")
    labels = [np.array(row["labels"]) for row in store.dataset]
    packed = np.concatenate([row[row != -100] for row in labels])
    found = torch.from_numpy(packed >> 32).to(torch.int32).view(torch.float32).numpy()
    if method == "dft":
        # Open until the model has spoken: the data's weight, marked by a power of two; no label looks like "ignored".
        assert (packed >= 2**31).all()
        np.testing.assert_array_equal(
            found / np.float32(2.0**100), expected_weights(weighted, "sft").astype(np.float32)
        )
        return
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    out = tmp_path / "out.parquet"
    outcome = prift_inspect("export", weighted, "--method", method, "--format", "parquet", "--output", out)
    assert outcome.code == 0, outcome.stderr
    table = pq.read_table(out)
    exported = np.concatenate(
        [
            np.array(row["weights"])[np.array(row["labels"]) != -100]
            for row in table.select(["weights", "labels"]).to_pylist()
        ]
    )
    np.testing.assert_allclose(exported, expected, rtol=1e-6)


def test_the_first_steps_loss_is_the_weighted_sum(weighted: Path, train_cases: Callable[..., Finished], tmp_path: Path):
    """The model is the prior, so that nll = -logprob: the loss of step 1 is known from the store alone."""
    cases = [
        [f"train.scores={weighted}", f"train.method={method}", "train.batch_size=8", "train.max_steps=1",
         f"train.output={tmp_path}/{method}"]
        for method in RULES
    ]  # fmt: skip
    done = train_cases(cases)
    assert done.code == 0, done.output
    nll = -np.concatenate(
        [
            np.array([value for value in row if value is not None])
            for path in sorted(weighted.glob("*.parquet"))
            for row in pq.read_table(path).column("logprob").to_pylist()
        ]
    )
    for method in RULES:
        weights = expected_weights(weighted, method)
        (line,) = metrics_of(tmp_path / method)
        assert line["loss"] == pytest.approx((weights * nll).sum() / len(nll), rel=2e-5)
        assert line["weight_mean"] == pytest.approx(weights.mean(), rel=2e-5)


def test_a_merge_with_a_store_without_weights_fills_in_ones(
    weighted: Path, prior: Path, pipeline: Path, tmp_path: Path, prift_inspect, read_store, tokenizer_with, write_jsonl
):
    rows = [{**row, "id": f"plain-{n}"} for n, row in enumerate(said_in("messages", tokenizer_with()), 1)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    store = tmp_path / "plain"
    score(
        pipeline, f"data.path={data}", f"prior.model={prior}", f"score.output={store}", "score.shard_rows=3",
        ALL_COLUMNS,
    )  # fmt: skip
    for parts in ([weighted, store], [store, weighted]):
        both = tmp_path / f"both-{parts[0].name}"
        outcome = prift_inspect("merge", *parts, "--output", both)
        assert outcome.code == 0, outcome.stderr
        assert verify_store(both).problems == []
        weights = {row["row_id"]: set(row["target_weight"]) - {None} for row in read_store(both)}
        assert weights == {**{f"row-{n}": {0.5, [3.0, 1.0, 0.5][n % 3]} for n in range(8)}, "plain-1": {1.0},
                           "plain-2": {1.0}}  # fmt: skip


def test_the_report_shows_what_training_will_see(weighted: Path):
    from inspection.measure import measure

    numbers = measure(weighted)
    by_rule = {weighting.rule: outlook for weighting, outlook in numbers.rules}
    assert by_rule["sft"].mean == pytest.approx(expected_weights(weighted, "sft").mean(), rel=1e-6)
    assert by_rule["prob"].mean == pytest.approx(expected_weights(weighted, "prift_prob").mean(), rel=1e-6)
    assert numbers.columns["target_weight"].mean == pytest.approx(expected_weights(weighted, "sft").mean(), rel=1e-6)
    assert (numbers.columns["target_weight"].smallest, numbers.columns["target_weight"].largest) == (0.5, 3.0)


def test_new_rows_with_weights_do_not_go_into_a_store_without(
    prior: Path, prift_score, tmp_path: Path, tokenizer_with, write_jsonl
):
    data = write_jsonl(tmp_path / "data.jsonl", said_in("messages", tokenizer_with()))
    words = [f"data.path={data}", f"prior.model={prior}", f"score.output={tmp_path}/store"]
    assert prift_score(*words).code == 0
    new = {"id": "new", "messages": [{"role": "user", "content": "a"},
                                     {"role": "assistant", "content": "b", "weight": 2}]}  # fmt: skip
    write_jsonl(data, [*said_in("messages", tokenizer_with()), new])
    outcome = prift_score(*words, "score.extend=true")
    assert outcome.code == 2
    assert "the new rows give some targets weights of their own" in outcome.stderr

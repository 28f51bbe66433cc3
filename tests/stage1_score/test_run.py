"""A scoring run from data to store, and every way in which it may be interrupted, repeated or refused."""

import json
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import stage1_score.run as run_module
import stage1_score.score_shard as shard_module
from shared.shards import shard_path
from stage1_score.transformers_engine import TransformersEngine

ROWS = [
    {"id": f"r{n}", "prompt": f"question {n} " + "x" * n, "completion": "answer " + "y" * (3 * n % 11)}
    for n in range(10)
]


@pytest.fixture
def data(tmp_path: Path, write_jsonl) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def score(prift_score, data: Path, store: Path, plain_prior: Path) -> Callable[..., Any]:
    """`prift-score` on the ten rows in shards of four; later words override."""
    base = [f"data.path={data}", f"prior.model={plain_prior}", f"score.output={store}", "score.shard_rows=4"]
    return lambda *overrides: prift_score(*base, *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a store; how its runs went is not part of it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if ".metrics." not in path.name}


def test_a_whole_run(score, store: Path, read_store, prift_inspect):
    outcome = score()
    assert outcome.code == 0, outcome.stderr
    assert sorted(path.name for path in store.iterdir()) == [
        "score.metrics.jsonl", "shard-00000.dropped.jsonl", "shard-00000.parquet", "shard-00001.dropped.jsonl",
        "shard-00001.parquet", "shard-00002.dropped.jsonl", "shard-00002.parquet", "store.json",
    ]  # fmt: skip
    rows = read_store(store)
    assert [row["row_id"] for row in rows] == [f"r{n}" for n in range(10)]
    for row, source in zip(rows, ROWS, strict=True):
        # "th" and "the" stand in none of the texts: each byte is its own id.
        prompt, completion = source["prompt"].encode(), source["completion"].encode()
        assert row["input_ids"] == [256, *prompt, *completion, 257]
        is_target = [False] * (1 + len(prompt)) + [True] * (len(completion) + 1)
        for column in ("logprob", "mass_rank", "entropy"):
            assert [value is not None for value in row[column]] == is_target
    assert "data: prompt_completion rows, template plain, targets completion" in outcome.stdout
    assert "<s>question 0 ⟦answer </s>⟧" in outcome.stdout
    assert "10 rows, " in outcome.stdout
    assert "0 of 3 shards done, 3 to score" in outcome.stdout
    assert "10 rows kept, 0 dropped" in outcome.stdout
    assert prift_inspect("verify", store).code == 0


def test_stored_values_are_those_of_a_bigram(tmp_path: Path, plain_prior: Path, prift_score, write_jsonl, read_store):
    """Through files only: a Llama whose layers add nothing is a table of what follows what."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain_prior)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    bigram = tmp_path / "bigram"
    shutil.copytree(plain_prior, bigram)
    model.save_pretrained(bigram)
    embeddings, norm, head = model.double().model.embed_tokens.weight, model.model.norm, model.lm_head.weight
    with torch.no_grad():
        table = (norm(embeddings) @ head.T).log_softmax(dim=-1).numpy()
    ids = [256, 5, 17, 5, 299, 17, 17, 257]
    data = write_jsonl(
        tmp_path / "ids.jsonl", [{"row_id": "a", "input_ids": ids, "target_mask": [0, 1, 1, 0, 1, 1, 1, 1]}]
    )
    store = tmp_path / "store"
    assert prift_score(f"data.path={data}", f"prior.model={bigram}", f"score.output={store}").code == 0
    (row,) = read_store(store)
    assert [position for position, value in enumerate(row["logprob"]) if value is not None] == [1, 2, 4, 5, 6, 7]
    for position in (1, 2, 4, 5, 6, 7):
        before = table[ids[position - 1]]
        own = before[ids[position]]
        assert row["logprob"][position] == pytest.approx(own, abs=1e-5)
        assert row["mass_rank"][position] == pytest.approx(np.exp(before[before > own]).sum(), abs=1e-5)
        assert row["entropy"][position] == pytest.approx(-(np.exp(before) * before).sum(), abs=1e-5)


def test_scores_agree_with_the_reference_numbers(reference: Path, tmp_path: Path, prift_score):
    store = tmp_path / "golden"
    outcome = prift_score(
        f"data.path={reference}/golden/gsm8k_tokens.jsonl", "data.format=tokens", "data.max_length=512",
        f"prior.model={reference}/data/stories260K", "prior.dtype=float32", f"score.output={store}",
        "score.columns=[logprob, mass_rank, entropy, entropy_top20, collision]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    check = [
        sys.executable,
        reference / "golden" / "check_scores.py",
        store,
        reference / "golden" / "gsm8k_scores.parquet",
    ]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "entropy_top20" in done.stdout
    assert "collision" in done.stdout


def test_a_rerun_scores_the_missing_shards_only(score, store: Path, monkeypatch):
    assert score().code == 0
    whole = contents(store)
    times = {name: (store / name).stat().st_mtime_ns for name in whole}
    shard_path(store, 1).unlink()
    tokenized = []
    tokenize = run_module.tokenize_shard
    monkeypatch.setattr(
        run_module, "tokenize_shard", lambda plan, index: tokenized.append(index) or tokenize(plan, index)
    )
    outcome = score("score.batch_tokens=64")  # how a run goes is not part of what it gives
    assert outcome.code == 0, outcome.stderr
    assert "2 of 3 shards done, 1 to score" in outcome.stdout
    assert tokenized == [1]
    after = contents(store)
    assert {name for name in whole if after[name] != whole[name]} <= {"shard-00001.parquet"}
    for name in ("shard-00000.parquet", "shard-00002.parquet", "store.json"):
        assert (store / name).stat().st_mtime_ns == times[name]


def test_a_rescored_shard_is_the_same_byte_for_byte(score, store: Path):
    assert score().code == 0
    whole = contents(store)
    shard_path(store, 0).unlink()
    shard_path(store, 2).unlink()
    assert score().code == 0
    assert contents(store) == whole


def test_a_finished_store_needs_no_prior_run(score, monkeypatch):
    assert score().code == 0

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the prior was loaded for nothing")

    monkeypatch.setattr(TransformersEngine, "__init__", refuse)
    outcome = score()
    assert outcome.code == 0
    assert "3 of 3 shards done, 0 to score" in outcome.stdout


def test_a_run_that_is_killed_inside_a_write_goes_on(score, store: Path, monkeypatch, tmp_path: Path):
    assert score(f"score.output={tmp_path}/whole").code == 0

    class Killed(BaseException):
        pass

    write = shard_module.write_shard

    def write_two_then_die(store: Path, index: int, *arguments: Any) -> Any:
        if index == 2:
            (store / f".tmp-{socket.gethostname()}-{os.getpid()}-shard-00002.parquet").write_bytes(b"PAR1 half")
            raise Killed
        return write(store, index, *arguments)

    monkeypatch.setattr(shard_module, "write_shard", write_two_then_die)
    with pytest.raises(Killed):
        score()
    monkeypatch.setattr(shard_module, "write_shard", write)
    # What the dead process was: here it is this one that lives on, so the name is given to one that does not.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    torn = next(store.glob(".tmp-*"))
    torn.rename(store / f".tmp-{socket.gethostname()}-{dead.pid}-shard-00002.parquet")
    assert not shard_path(store, 2).exists()
    outcome = score()
    assert outcome.code == 0
    assert "2 of 3 shards done, 1 to score" in outcome.stdout
    assert not list(store.glob(".tmp-*"))
    for index in range(3):
        assert shard_path(store, index).read_bytes() == shard_path(tmp_path / "whole", index).read_bytes()


def test_another_identity_is_refused_with_two_commands_that_work(score, store: Path, tmp_path: Path, prift_score):
    assert score().code == 0
    before = contents(store)
    outcome = score("data.max_length=40")
    assert outcome.code == 2
    assert outcome.stdout.count("Traceback") == outcome.stderr.count("Traceback") == 0
    assert re.search(r"identity\.max_length +2048 +40", outcome.stderr)
    assert contents(store) == before
    elsewhere = shlex.split(re.search(r"score elsewhere:  (.*)", outcome.stderr)[1])  # pyright: ignore
    replace = shlex.split(re.search(r"replace it:  (.*)", outcome.stderr)[1])  # pyright: ignore
    assert replace[:4] == ["rm", "-r", str(store), "&&"]
    assert elsewhere[0] == replace[4] == "prift-score"
    assert prift_score(*elsewhere[2:]).code == 0
    assert json.loads((tmp_path / "store-2" / "store.json").read_text())["identity"]["max_length"] == 40
    shutil.rmtree(store)
    assert prift_score(*replace[6:]).code == 0
    assert json.loads((store / "store.json").read_text())["identity"]["max_length"] == 40


@pytest.mark.parametrize("change", ["prior", "columns", "limit", "shard_rows", "tokenizer"])
def test_what_would_give_other_numbers_is_refused(score, change: str, prior: Path, tmp_path: Path, prior_with):
    assert score().code == 0
    override, field = {
        "prior": (f"prior.model={prior_with(tmp_path / 'other', None, seed=1)}", "identity.prior_weights"),
        "columns": ("score.columns=[logprob, collision]", "identity.columns"),
        "limit": ("data.limit=5", "source.limit"),
        "shard_rows": ("score.shard_rows=5", "source.shard_rows"),
        "tokenizer": (f"prior.model={prior}", "identity.tokenizer_files"),
    }[change]
    outcome = score(override, "data.template=plain")
    assert outcome.code == 2
    assert field in outcome.stderr


def test_fewer_columns_are_served_and_further_shards_get_all(score, store: Path):
    assert score("score.columns=[logprob, mass_rank, entropy, collision]").code == 0
    whole = contents(store)
    shard_path(store, 2).unlink()
    assert score("score.columns=[logprob, entropy]").code == 0
    assert contents(store) == whole
    assert "collision" in pq.read_schema(shard_path(store, 2)).names


def test_a_changed_data_file_is_refused(score, data: Path, write_jsonl):
    assert score().code == 0
    write_jsonl(data, [*ROWS[:-1], {**ROWS[-1], "completion": "changed"}])
    outcome = score()
    assert outcome.code == 2
    assert "source.files" in outcome.stderr


def test_a_touched_but_equal_data_file_is_accepted(score, data: Path, store: Path):
    assert score().code == 0
    shard_path(store, 1).unlink()
    os.utime(data, (1, 1))
    outcome = score()
    assert outcome.code == 0, outcome.stderr


def test_rehash_looks_past_size_and_time(score, data: Path):
    assert score().code == 0
    stat = data.stat()
    data.write_bytes(data.read_bytes().replace(b"question 3", b"question 8"))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert score().code == 0  # size and time are as recorded: not read again
    outcome = score("score.rehash=true")
    assert outcome.code == 2
    assert "source.files" in outcome.stderr


def test_a_moved_data_file_is_read_where_it_is_now(score, data: Path, store: Path, tmp_path: Path):
    assert score().code == 0
    whole = contents(store)
    shard_path(store, 1).unlink()
    moved = data.rename(tmp_path / "moved.jsonl")
    # What now lies at the old place is other data: it must not be read in its stead.
    data.write_text("".join(json.dumps({**row, "completion": "other"}) + "\n" for row in ROWS))
    outcome = score(f"data.path={moved}")
    assert outcome.code == 0, outcome.stderr
    assert contents(store) == whole


def test_a_shard_of_another_store_is_refused(score, store: Path, tmp_path: Path):
    assert score().code == 0
    assert score(f"score.output={tmp_path}/other", "data.max_length=100").code == 0
    shutil.copy(shard_path(tmp_path / "other", 1), shard_path(store, 1))
    outcome = score()
    assert outcome.code == 2
    assert "its footer says fingerprint=" in outcome.stderr


def test_a_torn_shard_under_its_final_name_is_refused(score, store: Path):
    assert score().code == 0
    path = shard_path(store, 1)
    path.write_bytes(path.read_bytes()[:-30])
    outcome = score()
    assert outcome.code == 2
    assert "not a whole Parquet file" in outcome.stderr


def test_another_schema_version_is_refused(score, store: Path):
    assert score().code == 0
    path = store / "store.json"
    path.write_text(path.read_text().replace('"schema_version": 3', '"schema_version": 4'))
    outcome = score()
    assert outcome.code == 2
    assert "expected a schema version from 1 to 3, found 4" in outcome.stderr


def test_rows_that_cannot_be_scored_are_listed(tmp_path: Path, prift_score, plain_prior: Path, write_jsonl, read_store):
    def row(name: str, length: int, masked: int) -> dict[str, Any]:
        return {"row_id": name, "input_ids": list(range(length)), "target_mask": [0] * masked + [1] * (length - masked)}

    rows = [row("a", 5, 2), row("long", 50, 2), row("b", 6, 2), row("no target", 5, 5), row("c", 7, 2), row("d", 5, 2)]
    # The last shard holds nothing that can be scored.
    data = write_jsonl(tmp_path / "data.jsonl", [*rows, row("first only", 1, 0), row("empty", 0, 0)])
    store = tmp_path / "store"
    outcome = prift_score(
        f"data.path={data}", f"prior.model={plain_prior}", f"score.output={store}", "data.max_length=20",
        "score.shard_rows=3",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    assert [(row["row_id"], row["source_index"]) for row in read_store(store)] == [
        ("a", 0),
        ("b", 2),
        ("c", 4),
        ("d", 5),
    ]
    listed = [
        [json.loads(line) for line in (store / f"shard-{index:05d}.dropped.jsonl").read_text().splitlines()]
        for index in range(3)
    ]
    assert listed == [
        [{"row_id": "long", "source_index": 1, "reason": "50 tokens, data.max_length is 20"}],
        [{"row_id": "no target", "source_index": 3, "reason": "no target token"}],
        [{"row_id": "first only", "source_index": 6, "reason": "no target token"},
         {"row_id": "empty", "source_index": 7, "reason": "no target token"}],
    ]  # fmt: skip
    assert "4 rows kept, 4 dropped" in outcome.stdout


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
MISFIT = [*CHAT, {"role": "user", "content": "and"}]
CUTTING = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}cut{% else %}{{ m.content }}{% endif %}</s>"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def cutting_prior(prior_with, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior whose template rewrites an assistant turn that is not the last message."""
    return prior_with(tmp_path_factory.mktemp("cutting") / "prior", CUTTING)


@pytest.fixture
def score_chats(prift_score, tmp_path: Path, write_jsonl, cutting_prior: Path):
    """Score `count` conversations of which those at `misfits` break the template."""

    def run(count: int, misfits: set[int], *overrides: str) -> Any:
        rows = [{"id": n, "messages": MISFIT if n in misfits else CHAT} for n in range(count)]
        data = write_jsonl(tmp_path / "chats.jsonl", rows)
        return prift_score(
            f"data.path={data}",
            f"prior.model={cutting_prior}",
            f"score.output={tmp_path}/chats",
            "data.split_turns=false",
            *overrides,
        )

    return run


def test_one_misfit_in_a_hundred_is_dropped(score_chats, tmp_path: Path):
    outcome = score_chats(100, {40})
    assert outcome.code == 0, outcome.stderr
    assert "99 rows kept, 1 dropped" in outcome.stdout
    (line,) = (tmp_path / "chats" / "shard-00000.dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["row_id"] == "40"
    assert "is not rendered as a prefix of the whole" in json.loads(line)["reason"]


def test_more_misfits_than_one_per_cent_stop_the_run(score_chats, tmp_path: Path):
    outcome = score_chats(99, {40})
    assert outcome.code == 2
    assert (
        "1 of 99 rows do not fit the chat template, more than 1 %; such as row '40' (source_index 40)" in outcome.stderr
    )
    assert not (tmp_path / "chats").exists()


def test_the_share_of_misfits_is_that_of_all_rows(score_chats):
    # One of 200 is half a per cent, though it is one of the first 20.
    outcome = score_chats(200, {3}, "score.shard_rows=20")
    assert outcome.code == 0, outcome.stderr
    assert "199 rows kept, 1 dropped" in outcome.stdout


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([], [], "no row in it"),
        ([{"prompt": "a" * 50, "completion": "b"}], ["data.max_length=10"], "no row left with a target: all 1"),
        ([{"id": 1, "input_ids": [1, 300], "target_mask": [0, 1]}], [], "data.jsonl:1: token id 300 is outside"),
        ([{"id": 1, "input_ids": [1, 2], "target_mask": [0, 1]}] * 2, [], "row id '1' is already at"),
        ([{"question": "a"}], [], "expected the columns"),
        ([{"prompt": "a", "completion": "b"}], ["data.template=chat"], "needs a chat template"),
        ([{"prompt": "a", "completion": "b"}], ["data.path=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        ([{"prompt": "a", "completion": "b"}], ["prior.model=nowhere"], "nowhere: neither a folder nor a model"),
        ([{"prompt": "a", "completion": "b"}], ["prior.model=null"], "expected prior.model; got none"),
        ([{"prompt": "a", "completion": "b"}], ["score.output=null"], "expected score.output; got none"),
        ([{"prompt": "a", "completion": "b"}], ["data.max_lenght=3"], "the nearest known one is data.max_length"),
        ([{"prompt": "a", "completion": "b"}], ["data.template_date=2024-13-01"], "template_date"),
    ],
    ids=["empty", "all dropped", "ids", "repeated id", "columns", "template", "path", "prior", "no prior", "no output",
         "key", "date"],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    score, data: Path, store: Path, write_jsonl, rows: list[Any], overrides: list[str], message: str
):
    write_jsonl(data, rows)
    outcome = score(*overrides)
    assert outcome.code == 2
    assert message in outcome.stderr
    assert outcome.stderr.startswith("prift-score: ")
    assert len(outcome.stderr.splitlines()) == 1
    assert not store.exists()


def test_a_malformed_line_names_file_and_line(score, data: Path, store: Path):
    data.write_text(data.read_text() + "{half\n")
    outcome = score()
    assert outcome.code == 2
    assert f"{data}:11: malformed JSON" in outcome.stderr
    assert not store.exists()


def test_pickled_weights_are_refused(score, store: Path, plain_prior: Path, tmp_path: Path):
    pickled = Path(shutil.copytree(plain_prior, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    outcome = score(f"prior.model={pickled}")
    assert outcome.code == 2
    assert "pickled weights (.bin, .pt) are not read" in outcome.stderr
    assert not store.exists()


@pytest.mark.parametrize("place", ["below a file", "a file"])
def test_an_output_that_cannot_be_a_folder_is_the_users_to_mend(score, tmp_path: Path, place: str):
    file = tmp_path / "file"
    file.write_text("mine")
    outcome = score(f"score.output={file / 'store' if place == 'below a file' else file}")
    assert outcome.code == 2
    assert str(file) in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1
    assert file.read_text() == "mine"


def test_a_disk_that_fills_up_leaves_no_half_shard(tmp_path: Path, plain_prior: Path, data: Path, store: Path, run_cli):
    """No file may grow beyond 8 KiB: store.json and the probe fit, a shard of all columns does not."""
    rows = [json.dumps({"prompt": "p", "completion": f"{n} " + "abcdefgh" * 20}) for n in range(60)]
    data.write_text("\n".join(rows))
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text("data: {}\n")
    words = [pipeline, f"data.path={data}", f"prior.model={plain_prior}", f"score.output={store}"]
    full = run_cli(
        "stage1_score.cli", *words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    )
    assert full.code == 2, full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert sorted(path.name for path in store.iterdir()) == ["shard-00000.dropped.jsonl", "store.json"]


def test_auto_engine_goes_on_with_what_the_store_began_with(score, store: Path):
    assert score("score.engine=transformers").code == 0
    assert score().code == 0
    assert json.loads((store / "store.json").read_text())["identity"]["engine"] == "transformers"


def test_dtypes_are_resolved_into_the_identity(score, store: Path):
    assert score("score.device=cpu").code == 0
    identity = json.loads((store / "store.json").read_text())["identity"]
    assert (identity["weight_dtype"], identity["compute_dtype"], identity["head_dtype"]) == (
        "float32",
        "float64",
        "float32",
    )
    assert score("prior.dtype=float32", "prior.compute_dtype=float64").code == 0
    outcome = score("prior.dtype=bfloat16")
    assert outcome.code == 2
    assert "identity.weight_dtype" in outcome.stderr

"""`prift-inspect cross-check`: rows of a store scored again, and how far the numbers differ."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import UserError
from shared.score_store import read_manifest
from shared.shards import ScoredRow, dropped_path, open_store, shard_path, write_shard
from stage1_score.compare_scores import compare, flips
from stage1_score.cross_check import (
    CrossCheckOptions,
    default_tolerance,
    evenly_spread,
    parse_options,
    rescoring,
    sampled_rows,
)

ROWS = [
    {"id": f"r{n}", "prompt": f"question {n} " + "x" * n, "completion": "answer " + "y" * (3 * n % 11)}
    for n in range(10)
]


@pytest.fixture
def store(prift_score, tmp_path: Path, plain_prior: Path, write_jsonl) -> Path:
    """Ten rows in shards of four, made by transformers."""
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    folder = tmp_path / "store"
    outcome = prift_score(
        f"data.path={data}", f"prior.model={plain_prior}", f"score.output={folder}", "score.shard_rows=4",
        "score.engine=transformers", "score.device=cpu",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    return folder


@pytest.fixture
def check(prift_inspect, store: Path) -> Callable[..., Any]:
    """`prift-inspect cross-check` of the store by the engine that made it; later words override."""
    return lambda *words: prift_inspect("cross-check", store, "engine=transformers", "device=cpu", *words)


@pytest.fixture
def change(store: Path) -> Callable[[int, Callable[[ScoredRow], None]], None]:
    """Write a shard again, whole and with a footer that fits, its rows passed through a function."""

    def rewrite(index: int, function: Callable[[ScoredRow], None]) -> None:
        manifest, shards = open_store(store)
        rows = list(sampled_rows([shards[index]], np.arange(shards[index].num_rows), manifest))
        rows = [
            ScoredRow(**{**vars(row), "statistics": {k: v.copy() for k, v in row.statistics.items()}}) for row in rows
        ]
        for row in rows:
            function(row)
        write_shard(store, index, manifest, rows, [], {"engine": "none"})

    return rewrite


def table_of(stdout: str) -> dict[str, list[str]]:
    """First word (or threshold) of each line of the printed tables, and the numbers after it."""
    lines = re.findall(r"^(threshold \S+|\w+) +([-\d.,e+% ]+)$", stdout, flags=re.MULTILINE)
    return {name: numbers.split() for name, numbers in lines}


def test_the_same_engine_gives_the_same_numbers(check, store: Path, read_store):
    outcome = check()
    assert outcome.code == 0, outcome.stderr
    num_targets = sum(value is not None for row in read_store(store) for value in row["logprob"])
    kept = sum(value is not None and value <= 0.5 for row in read_store(store) for value in row["mass_rank"])
    table = table_of(outcome.stdout)
    for column in ("logprob", "mass_rank", "entropy"):
        assert int(table[column][0]) == num_targets
        # Rows of other shards stand in the batch, and sums of float64 may be ordered otherwise.
        assert max(abs(float(number)) for number in table[column][1:]) < 1e-6
    assert table["threshold 0.5"] == [str(num_targets), str(kept), "0", "0.0000%"]
    assert 0 < kept < num_targets
    assert [name for name in table if name.startswith("threshold")] == [
        f"threshold {value}" for value in (0.3, 0.5, 0.7, 0.9)
    ]
    assert outcome.stdout.splitlines()[0] == f"{store}: 10 rows in 3 of 3 shards"
    assert "10 rows scored again by transformers (weights float32, forward pass float64)" in outcome.stdout
    assert "within the tolerance of 0.0001" in outcome.stdout


def test_another_batch_size_is_compared(check):
    # Alone or with others: padding must not show.
    outcome = check("batch_tokens=16", "tolerance=1e-5")
    assert outcome.code == 0, outcome.stderr


def test_altered_logprobs_are_exit_3_with_the_figure(check, change):
    def lower(row: ScoredRow) -> None:
        row.statistics["logprob"] -= 0.25

    change(1, lower)
    outcome = check()
    assert outcome.code == 3
    assert re.search(r"p99 of \|logprob difference\| is 0\.25 nats, the tolerance is 0\.0001", outcome.stderr)
    assert len(outcome.stderr.splitlines()) == 1
    table = table_of(outcome.stdout)
    assert float(table["logprob"][4]) == pytest.approx(0.25, abs=1e-5)
    assert 0 < float(table["logprob"][5]) < 0.25  # the new ones are larger, but not in all shards
    assert float(table["entropy"][4]) < 1e-6
    assert check("tolerance=0.3").code == 0


def test_an_edited_shard_shows_as_a_difference(check, store: Path, rewrite):
    """Values that were exchanged behind the digest's back: `verify` names them corrupted, cross-check how far off."""
    import pyarrow as pa

    def double(table: pa.Table) -> pa.Table:
        values = [[None if value is None else 2 * value for value in row] for row in table["logprob"].to_pylist()]
        return table.set_column(3, "logprob", pa.array(values, pa.list_(pa.float32())))

    rewrite(shard_path(store, 0), double)
    outcome = check()
    assert outcome.code == 3
    assert "the tolerance is 0.0001" in outcome.stderr


def test_flipped_decisions_of_a_store_are_counted(check, change, store: Path, read_store):
    before = [value for row in read_store(store)[4:8] for value in row["mass_rank"] if value is not None]

    def turn(row: ScoredRow) -> None:
        row.statistics["mass_rank"] = np.where(row.statistics["mass_rank"] <= 0.5, 1.0, 0.0).astype(np.float32)

    change(1, turn)
    refused = check("thresholds=0.5")
    assert refused.code == 3
    assert "decisions flip at threshold 0.5, the share allowed is 0.01" in refused.stderr
    outcome = check("thresholds=0.5", "flips=1")
    assert outcome.code == 0, outcome.stderr
    assert table_of(outcome.stdout)["threshold 0.5"][2] == str(len(before))


def test_flips_by_hand():
    # threshold 0.3 keeps mass_rank <= 0.7; ties are kept
    stored = np.array([0.0, 0.7, 0.71, 0.5, 0.9, 0.69], np.float32)
    again = np.array([0.1, 0.71, 0.7, 0.5, 1.0, 0.72], np.float32)
    found = flips(stored, again, 0.3)
    assert (found.num_targets, found.num_kept, found.num_flipped) == (6, 4, 3)
    assert flips(stored, stored, 0.3).num_flipped == 0
    assert flips(stored, again, 1.0).num_flipped == 1  # only mass_rank = 0 is kept


def test_differences_by_hand():
    # 0, 1, ..., 100 hundredths, the odd ones negative
    signed = np.arange(101) / 100 * np.where(np.arange(101) % 2, -1, 1)
    stored = {"entropy": np.zeros(101, np.float32), "logprob": np.zeros(101, np.float32)}
    logprob, entropy = compare(stored, {"entropy": signed.astype(np.float32), "logprob": np.ones(101, np.float32)})
    assert (logprob.column, entropy.column) == ("logprob", "entropy")
    assert (entropy.num_targets, logprob.largest, logprob.mean_signed) == (101, 1.0, 1.0)
    found = (entropy.median, entropy.p90, entropy.p99, entropy.largest)
    assert found == pytest.approx((0.5, 0.9, 0.99, 1.0), abs=1e-6)
    assert entropy.mean_signed == pytest.approx(0.5 / 101, abs=1e-6)  # the sum of signed is +0.5


def test_the_sign_is_rescored_less_stored():
    (found,) = compare({"logprob": np.array([-2.0], np.float32)}, {"logprob": np.array([-3.0], np.float32)})
    assert (found.mean_signed, found.largest) == (-1.0, 1.0)


@pytest.mark.parametrize(("num_rows", "wanted"), [(10, 3), (10, 9), (1000, 64), (65, 64), (7, 1), (10**9, 64)])
def test_the_sample_is_even_and_inside(num_rows: int, wanted: int):
    ordinals = evenly_spread(num_rows, wanted)
    assert len(ordinals) == wanted
    assert np.array_equal(ordinals, evenly_spread(num_rows, wanted))
    assert ordinals[0] >= 0
    assert ordinals[-1] < num_rows
    part = num_rows / wanted
    # Each within a row of the middle of its part.
    assert np.abs(ordinals + 0.5 - (np.arange(wanted) + 0.5) * part).max() <= 0.5
    gaps = np.diff(ordinals)
    assert not len(gaps) or (gaps.min() >= int(part) and gaps.max() <= int(part) + 1)


@pytest.mark.parametrize("wanted", [5, 6])
def test_all_rows_where_there_are_fewer(wanted: int):
    assert evenly_spread(5, wanted).tolist() == [0, 1, 2, 3, 4]


def test_rows_are_those_of_the_ordinals_and_other_shards_are_not_read(store: Path, read_store):
    manifest, shards = open_store(store)
    shard_path(store, 1).write_bytes(b"torn")
    rows = list(sampled_rows(shards, np.array([0, 3, 9]), manifest))
    assert [row.source_index for row in rows] == [0, 3, 9]
    shutil.copy(shard_path(store, 0), shard_path(store, 1))  # readable again, for the reference
    expected = {row["source_index"]: row for row in read_store(store)}
    for row in rows:
        known = expected[row.source_index]
        assert row.row_id == known["row_id"]
        assert row.input_ids.tolist() == known["input_ids"]
        assert row.target_positions.tolist() == [n for n, value in enumerate(known["logprob"]) if value is not None]
        for column in ("logprob", "mass_rank", "entropy"):
            assert row.statistics[column].tolist() == [value for value in known[column] if value is not None]


def test_rows_of_several_row_groups(tmp_path: Path, manifest_with, scored_row, store_of):
    manifest = manifest_with(1300, 1300)
    ids = np.array([1, 10, 20, 30, 2], np.int32)
    folder = store_of(
        tmp_path / "long", manifest, [scored_row(n % 3, source_index=n, input_ids=ids) for n in range(1300)]
    )
    _, shards = open_store(folder)
    rows = sampled_rows(shards, np.array([0, 511, 512, 1024, 1299]), manifest)
    assert [row.source_index for row in rows] == [0, 511, 512, 1024, 1299]


def test_a_broken_row_is_named(check, change):
    def spoil(row: ScoredRow) -> None:
        row.input_ids[1] = 300

    change(2, spoil)
    outcome = check()
    assert outcome.code == 2
    assert "row 'r8' (source_index 8): a token id is null or outside the vocabulary" in outcome.stderr


def test_an_unfinished_store_gives_what_it_has(check, store: Path):
    shard_path(store, 1).unlink()
    outcome = check("rows=3")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.splitlines()[0] == f"{store}: 6 rows in 2 of 3 shards"
    assert ", 3 rows scored again by transformers" in outcome.stdout


def test_a_store_without_a_shard_is_refused(check, store: Path):
    for index in range(3):
        shard_path(store, index).unlink()
        dropped_path(store, index).unlink()
    outcome = check()
    assert outcome.code == 2
    assert "expected scored rows, found none in 0 of 3 shards" in outcome.stderr


def test_columns_that_are_not_stored_are_not_compared(prift_score, prift_inspect, tmp_path, store, plain_prior):
    outcome = prift_score(
        f"data.path={tmp_path}/data.jsonl", f"prior.model={plain_prior}", f"score.output={tmp_path}/few",
        "score.columns=[collision, logprob]", "score.device=cpu", "score.engine=transformers",
    )  # fmt: skip
    assert outcome.code == 0, outcome.stderr
    outcome = prift_inspect("cross-check", tmp_path / "few", "engine=transformers", "device=cpu")
    assert outcome.code == 0, outcome.stderr
    assert list(table_of(outcome.stdout)) == ["logprob", "collision"]
    assert "mass_rank is not stored" in outcome.stdout


def test_another_prior_is_refused(check, prior_with, plain_prior: Path, tmp_path: Path):
    other = prior_with(tmp_path / "other", None, seed=1)
    outcome = check(f"model={other}")
    assert outcome.code == 2
    assert f"{other} is not the prior of this store, {plain_prior}: sha256 of the weights is" in outcome.stderr


def test_the_same_weights_under_another_config_are_refused(check, plain_prior: Path, tmp_path: Path):
    other = Path(shutil.copytree(plain_prior, tmp_path / "other"))
    config = other / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    outcome = check(f"model={other}")
    assert outcome.code == 2
    assert f"{other} is not the prior of this store, {plain_prior}: sha256 of the config.json is" in outcome.stderr


def test_a_moved_prior_is_found_by_model(check, store: Path, plain_prior: Path, tmp_path: Path):
    path = store / "store.json"
    path.write_text(path.read_text().replace(str(plain_prior), "moved/away"))
    assert read_manifest(store).prior_name == "moved/away"
    outcome = check()
    assert outcome.code == 2
    assert "moved/away: neither a folder nor a model" in outcome.stderr
    assert "model=PATH says where the prior of the store lies" in outcome.stderr
    assert check(f"model={plain_prior}").code == 0


def test_without_vllm_the_engine_itself_is_offered(prift_inspect, store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stage1_score.vllm_engine.vllm_version", lambda: None)
    outcome = prift_inspect("cross-check", store, "device=cpu")
    assert outcome.code == 2
    assert "vLLM is not installed" in outcome.stderr
    assert "engine=transformers compares the engine with itself" in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


def test_vllm_agrees_with_transformers(store: Path, run_cli):
    from stage1_score.vllm_engine import obstacle

    reason = obstacle({"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_attention_heads": 4}, "cpu")
    if reason is not None:
        pytest.skip(f"NO vLLM FOR CPUs: {reason}")
    outcome = run_cli("inspection.cli", "cross-check", store, "device=cpu", "batch_tokens=128")
    assert outcome.code == 0, outcome.stdout + outcome.stderr
    assert "10 rows scored again by vllm (weights float32, forward pass float64_products)" in outcome.stdout
    table = table_of(outcome.stdout)
    for column in ("logprob", "mass_rank", "entropy"):
        assert float(table[column][4]) < 1e-4
    assert float(table["logprob"][4]) > 0  # it was another engine
    assert table["threshold 0.5"][2] == "0"


@pytest.mark.parametrize(
    ("stored", "expected", "tolerance"),
    [
        (("transformers", "float32", "float64"), ("vllm", "float32", "float64_products"), 1e-4),
        (("vllm", "float32", "float64_products"), ("transformers", "float32", "float64"), 1e-4),
        (("vllm", "float32", "float32"), ("transformers", "float32", "float32"), 1e-4),
        (("vllm", "bfloat16", "bfloat16"), ("transformers", "bfloat16", "bfloat16"), 0.15),
        (("transformers", "bfloat16", "float64"), ("vllm", "bfloat16", "float64_products"), 0.15),
        (("transformers", "float16", "float16"), ("vllm", "float16", "float16"), 0.02),
    ],
)
def test_the_other_engine_keeps_the_dtypes(manifest_with, stored, expected, tolerance: float):
    names = ("engine", "weight_dtype", "compute_dtype")
    identity = manifest_with(**dict(zip(names, stored, strict=True))).identity
    _, again = rescoring(identity, CrossCheckOptions())
    assert tuple(getattr(again, name) for name in names) == expected
    assert default_tolerance(identity, again) == tolerance


def test_float64_of_transformers_is_exact_whatever_the_weights(manifest_with):
    identity = manifest_with(weight_dtype="bfloat16", compute_dtype="float64").identity
    _, again = rescoring(identity, CrossCheckOptions(engine="transformers"))
    assert default_tolerance(identity, again) == 1e-4


def test_options_are_read_as_yaml():
    words = ["rows=8", "thresholds=[0.5, 9e-1]", "tolerance=1e-3", "model=/some/where", "rows=9"]
    options = parse_options(words)
    assert (options.rows, options.thresholds, options.tolerance) == (9, (0.5, 0.9), 1e-3)
    assert options.model == "/some/where"
    assert parse_options([]) == CrossCheckOptions()
    assert parse_options(["thresholds=0.5,0.7"]).thresholds == (0.5, 0.7)
    assert parse_options(["thresholds=0.5"]).thresholds == (0.5,)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("row=8", "unknown key row; the nearest known one is rows"),
        ("tolerence=1", "unknown key tolerence; the nearest known one is tolerance"),
        ("rows", "'rows': expected key=value"),
        ("rows=0", "rows=0: "),
        ("rows=1.5", "rows=1.5: "),
        ("rows=", "rows=None: "),
        ("engine=sglang", "engine='sglang': "),
        ("thresholds=[]", r"thresholds=\(\): "),
        ("thresholds=[0.5, 2]", "thresholds=2: "),
        ("tolerance=.nan", "tolerance=nan: "),
        ("batch_tokens=[", r"batch_tokens='\[': "),
    ],
)
def test_a_wrong_option_is_named(word: str, message: str):
    with pytest.raises(UserError, match=f"^{message}"):
        parse_options([word])

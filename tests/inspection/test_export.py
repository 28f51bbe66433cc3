"""`prift-inspect export`: the weights that training gives the same tokens, in every format."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from inspection import export
from shared.config import TrainConfig
from shared.errors import UserError
from shared.load_config import load_config
from shared.rules import RULE_COLUMNS
from shared.shards import shard_path
from shared.weighting import resolve_weighting
from stage1_score.run import run
from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import open_cache
from stage2_train.weigh import StepWeigher

MAX_LENGTH = 80
ALL_COLUMNS = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")

RULES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "prift_mass": (["--method", "prift_mass"], {"method": "prift_mass"}),
    "prift_mass at 0.9": (
        ["--method", "prift_mass", "--set", "threshold=0.9"],
        {"method": "prift_mass", "weighting": {"threshold": 0.9}},
    ),
    "prift_prob": (["--method", "prift_prob"], {"method": "prift_prob"}),
    "sft": (["--method", "sft"], {"method": "sft"}),
    "prob with a floor": (
        ["--rule", "prob", "--set", "floor=0.125", "--set", "stop_token_weight=0.5"],
        {"weighting": {"rule": "prob", "floor": 0.125, "stop_token_weight": 0.5}},
    ),
    "prob_power": (["--rule", "prob_power", "--set", "alpha=2"], {"weighting": {"rule": "prob_power", "alpha": 2.0}}),
    "prob_threshold": (["--rule", "prob_threshold"], {"weighting": {"rule": "prob_threshold"}}),
    "prob_above": (
        ["--rule", "prob_above", "--set", "min_prob=1e-1"],
        {"weighting": {"rule": "prob_above", "min_prob": 0.1}},
    ),
    "infosft": (["--rule", "infosft"], {"weighting": {"rule": "infosft"}}),
    "entropy": (["--rule", "entropy"], {"weighting": {"rule": "entropy"}}),
    "chord": (["--rule", "chord"], {"weighting": {"rule": "chord"}}),
    "deft": (["--rule", "deft"], {"weighting": {"rule": "deft"}}),
    "idft": (["--rule", "idft"], {"weighting": {"rule": "idft"}}),
}
"""Words of the command line, and the fields of `train` that mean the same."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The first 24 rows of the demo in shards of ten, six of them too long, with all columns."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "pipeline.yaml").write_text("data: {}\n")
    overrides = [
        f"data.path={repository}/data/demo/train.jsonl", f"prior.model={repository}/data/demo/prior", "data.limit=24",
        "score.shard_rows=10", f"score.output={folder}/store", f"score.columns=[{','.join(ALL_COLUMNS)}]",
        f"data.max_length={MAX_LENGTH}", "score.engine=transformers", "score.device=cpu",
    ]  # fmt: skip
    run(load_config(folder / "pipeline.yaml", overrides), ["prift-score"])
    return folder / "store"


@pytest.fixture
def exported(call_verb, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """The rows that `prift-inspect export WORD ... -o FILE` writes, read by the library of the format."""

    def read(*words: Any, format: str = "parquet") -> list[dict[str, Any]]:
        path = tmp_path / "out" / f"rows.{format}"
        call_verb(export, *words, "--format", format, "-o", path)
        if format == "parquet":
            return pq.read_table(path).to_pylist()
        if format == "jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        import datasets

        return list(datasets.load_from_disk(path))

    return read


@pytest.fixture
def refusal(exported, tmp_path: Path) -> Callable[..., str]:
    """Why an export is refused; nothing is left of it."""

    def reason(*words: Any, **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            exported(*words, **options)
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob("out/.*"))
        return str(refused.value)

    return reason


def weights_of_training(store: Path, cache_dir: Path, fields: dict[str, Any]) -> dict[tuple[int, int], float]:
    """Weight by (place of the row, position) of all targets that training gives any, as its step has them."""
    config = TrainConfig(**fields)
    weighting = resolve_weighting(config)
    cache = open_cache(store, weighting.columns, cache_dir)
    rows = np.arange(len(cache))
    batch = make_batch(cache, rows, rows.tolist(), cache.manifest.stop_token_ids, BatchForm(packed=True))
    given = StepWeigher(weighting, config, cache, lambda tensor: tensor).given(1, rows, [batch])
    assert given is not None
    kept = given[0].kept_K
    places, positions = batch.places_N[kept].tolist(), batch.positions_N[kept].tolist()
    return dict(zip(zip(places, positions, strict=True), given[0].weights_K.tolist(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_weights_are_those_of_training(store: Path, exported, read_store, tmp_path: Path, name: str):
    words, fields = RULES[name]
    rows, stored = exported(store, *words), read_store(store)
    expected = weights_of_training(store, tmp_path / "cache", fields)
    found = {
        (place, position): weight
        for place, row in enumerate(rows)
        for position, weight in enumerate(row["weights"])
        if weight
    }
    assert found == expected
    assert len(found) > 10
    for row, scored in zip(rows, stored, strict=True):
        assert [row[key] for key in ("row_id", "source_index", "input_ids")] == [
            scored[key] for key in ("row_id", "source_index", "input_ids")
        ]
        assert len(row["weights"]) == len(row["labels"]) == len(row["input_ids"])
        for label, token, logprob, weight in zip(
            row["labels"], row["input_ids"], scored["logprob"], row["weights"], strict=True
        ):
            assert label == (-100 if logprob is None else token)
            assert weight == 0 or logprob is not None


def test_every_rule_that_can_be_stored_is_compared():
    rules = {resolve_weighting(TrainConfig(**fields)).rule for _, fields in RULES.values()}
    assert rules == set(RULE_COLUMNS) - {"talr"}


def test_all_formats_hold_the_same_rows(store: Path, exported):
    expected = exported(store, "--method", "prift_prob", format="parquet")
    assert len(expected) == 18
    assert list(expected[0]) == ["row_id", "source_index", "input_ids", "labels", "weights"]
    assert exported(store, "--method", "prift_prob", format="hf") == expected
    read = exported(store, "--method", "prift_prob", format="jsonl")
    for row in read:
        row["weights"] = np.array(row["weights"], np.float32).tolist()
    assert read == expected


def test_numbers_of_jsonl_are_the_shortest(store: Path, exported, tmp_path: Path):
    exported(store, "--rule", "prob", "--set", "floor=0.1", format="jsonl")
    text = (tmp_path / "out" / "rows.jsonl").read_text()
    assert ",0.1," in text
    assert "0.10000000149" not in text


def test_the_summary_counts(store: Path, call_verb, tmp_path: Path, read_store):
    stdout = call_verb(export, store, "--method", "prift_mass", "--format", "parquet", "-o", tmp_path / "x.parquet")
    ranks = [value for row in read_store(store) for value in row["mass_rank"] if value is not None]
    kept = sum(value <= 0.5 for value in ranks)
    assert f"18 rows, {len(ranks)} targets; rule mass, threshold 0.5: mean weight {kept / len(ranks):.4f}" in stdout
    assert f"{1 - kept / len(ranks):.2%} are zero" in stdout


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--method", "dft"], "--method dft weighs each token by what the model in training thinks of it"),
        (["--rule", "talr"], "depends on the other rows of the global batch"),
        (["--rule", "prob_power"], "rule prob_power has no default for --set alpha: give it"),
        (
            ["--rule", "prob", "--set", "threshold=0.5"],
            "--set threshold=0.5 is given, but rule prob takes no parameter",
        ),
        (["--rule", "mass", "--set", "threshold=1.5"], "--set threshold: "),
        (["--rule", "mass", "--set", "threshold=nan"], "--set threshold: "),
        (["--rule", "mass", "--set", "treshold=0.5"], "unknown key treshold; the nearest known one is threshold"),
        (["--rule", "mass", "--set", "source=online"], "unknown key source"),
        (["--rule", "mass", "--set", "threshold=half"], "expected a number"),
        (["--rule", "mass", "--set", "threshold"], "expected key=value"),
    ],
)
def test_what_cannot_be_stored_is_refused(store: Path, refusal, words: list[str], reason: str):
    assert reason in refusal(store, *words)


def test_a_column_that_the_store_lacks(tmp_path: Path, manifest_with, scored_row, store_of, refusal):
    folder = store_of(tmp_path / "three", manifest_with(4, 2), [scored_row(index) for index in range(4)])
    message = refusal(folder, "--rule", "deft")
    assert "expected the column collision, which rule deft reads" in message
    assert "score.columns=[logprob,mass_rank,entropy,collision]" in message


def test_a_method_or_a_rule_is_needed(store: Path, exported):
    with pytest.raises(SystemExit):
        exported(store)
    with pytest.raises(SystemExit):
        exported(store, "--method", "sft", "--rule", "mass")


@pytest.mark.parametrize("format", ["jsonl", "parquet", "hf"])
def test_a_damaged_store_leaves_nothing(store: Path, refusal, tmp_path: Path, format: str):
    store = shutil.copytree(store, tmp_path / "damaged")
    path = shard_path(store, 1)
    content = bytearray(path.read_bytes())
    content[60] ^= 0x10
    path.write_bytes(content)
    assert "a page is corrupted" in refusal(store, "--method", "sft", format=format)


def test_an_output_that_is_there_is_kept(store: Path, call_verb, tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text("mine")
    with pytest.raises(UserError, match="expected nothing there yet"):
        call_verb(export, store, "--method", "sft", "--format", "jsonl", "-o", path)
    assert path.read_text() == "mine"


def test_hf_without_its_library(store: Path, refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "--format hf needs the library datasets: pip install datasets" in refusal(
        store, "--method", "sft", format="hf"
    )

"""Data that gained rows: the new ones are scored, what the store held stays as it is."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.score_store import read_manifest
from shared.verify import verify_store

NUM_OLD, NUM_NEW = 300, 100


def row(index: int) -> dict[str, str]:
    return {"id": f"row-{index}", "prompt": f"question {index} ", "completion": f"answer {index * 7}"}


def lines(rows: range) -> bytes:
    return b"".join(json.dumps(row(index)).encode() + b"\n" for index in rows)


@pytest.fixture
def score(prift_score, plain_prior: Path, tmp_path: Path) -> Callable[..., Any]:
    """`prift-score` into the folder `store`, unless said otherwise."""
    return lambda *words: prift_score(
        f"prior.model={plain_prior}", f"score.output={tmp_path / 'store'}", "score.engine=transformers",
        "score.device=cpu", "score.shard_rows=64", *words,
    )  # fmt: skip


def files_of(store: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.glob("shard-*")}


@pytest.mark.parametrize("grows", ["lines", "gzip member", "file", "limit"])
def test_only_the_new_rows_are_scored(score, read_store, tmp_path: Path, grows: str):
    store, data = tmp_path / "store", tmp_path / ("data.jsonl.gz" if grows == "gzip member" else "data.jsonl")
    old, new = lines(range(NUM_OLD)), lines(range(NUM_OLD, NUM_OLD + NUM_NEW))
    if grows == "gzip member":
        old, new = gzip.compress(old), gzip.compress(new)
    data.write_bytes(old + new if grows == "limit" else old)
    before_words = [f"data.limit={NUM_OLD}"] if grows == "limit" else []
    assert score(f"data.path={data}", *before_words).code == 0
    before, recorded = files_of(store), (store / "score.metrics.jsonl").read_text()
    paths = [data]
    if grows == "file":
        (tmp_path / "more.jsonl").write_bytes(new)
        paths.append(tmp_path / "more.jsonl")
    elif grows != "limit":
        data.write_bytes(old + new)
    words = [f"data.path={json.dumps([str(path) for path in paths])}"]

    refused = score(*words)
    assert refused.code == 2
    assert "where rows were only added:" in refused.stderr
    assert "score.extend=true" in refused.stderr

    outcome = score(*words, "score.extend=true")
    assert outcome.code == 0, outcome.stderr
    assert f"{NUM_NEW} rows are new" in outcome.stdout
    after = files_of(store)
    assert {name: after[name] for name in before} == before
    told = [json.loads(line) for line in (store / "score.metrics.jsonl").read_text()[len(recorded) :].splitlines()]
    assert sum(line["num_rows"] for line in told if line["kind"] == "shard") == NUM_NEW
    assert verify_store(store).problems == []
    assert [len(read_manifest(store).source.rows_of_shard(index)) for index in range(7)] == [64] * 4 + [44, 64, 36]

    # Nothing is left to do, with the word or without.
    for extra in ([], ["score.extend=true"]):
        again = score(*words, *extra)
        assert again.code == 0, again.stderr
        assert "7 of 7 shards done, 0 to score" in again.stdout
    assert files_of(store) == after

    assert score(*words, f"score.output={tmp_path / 'whole'}").code == 0
    whole = read_store(tmp_path / "whole")
    assert len(whole) == NUM_OLD + NUM_NEW
    for ours, theirs in zip(read_store(store), whole, strict=True):
        assert (ours["row_id"], ours["source_index"], ours["input_ids"]) == (
            theirs["row_id"], theirs["source_index"], theirs["input_ids"],
        )  # fmt: skip
        assert [it is None for it in ours["logprob"]] == [it is None for it in theirs["logprob"]]
        values, wanted = ([it for it in each["logprob"] if it is not None] for each in (ours, theirs))
        assert values == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda old: old.replace(b'row-3"', b'row-x"') + lines(range(8, 9)),
            "rows were changed, removed or put before",
        ),
        (lambda old: lines(range(8, 9)) + old, "rows were changed, removed or put before"),
        (lambda old: b"".join(old.splitlines(keepends=True)[:-1]), "rows were changed, removed or put before"),
        (lambda old: old + lines(range(2, 3)), "'row-2' is already at"),
    ],
)
def test_another_change_is_refused(score, tmp_path: Path, change: Callable[[bytes], bytes], reason: str):
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(range(8)))
    assert score(f"data.path={data}").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    data.write_bytes(change(data.read_bytes()))
    outcome = score(f"data.path={data}", "score.extend=true")
    assert outcome.code == 2
    assert reason in outcome.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


@pytest.mark.parametrize(
    ("new", "reason"), [(lines(range(2, 3)), "'row-2' is already at"), (b'{"id": "x", "prompt": 3}\n', "data.jsonl:9:")]
)
def test_rows_that_a_larger_limit_adds_are_parsed_before_the_store_knows_of_them(
    score, tmp_path: Path, new: bytes, reason: str
):
    """The file is as it was, and of its rows only those within the limit were looked at."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(range(8)) + new)
    assert score(f"data.path={data}", "data.limit=8").code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    outcome = score(f"data.path={data}", "score.extend=true")
    assert outcome.code == 2, outcome.stdout
    assert reason in outcome.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def test_a_new_file_before_scored_ones_is_refused(score, tmp_path: Path):
    """As a glob sorts it; nothing was changed in it, so that is not what is said."""
    for name, rows in (("a", range(4)), ("c", range(4, 8))):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(rows))
    assert score(f"data.path={tmp_path}/*.jsonl").code == 0
    (tmp_path / "b.jsonl").write_bytes(lines(range(8, 10)))
    outcome = score(f"data.path={tmp_path}/*.jsonl", "score.extend=true")
    assert outcome.code == 2
    assert f"{tmp_path}/b.jsonl stands before {tmp_path}/c.jsonl, whose rows are scored" in outcome.stderr


def test_a_line_that_was_written_on_is_refused(score, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}')
    assert score(f"data.path={data}").code == 0
    data.write_text('{"prompt": "a", "completion": "b"} \n{"prompt": "c", "completion": "d"}\n')
    outcome = score(f"data.path={data}", "score.extend=true")
    assert outcome.code == 2
    assert "its last scored line had no line break" in outcome.stderr


def test_another_identity_is_refused_as_ever(score, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(lines(range(8)))
    assert score(f"data.path={data}").code == 0
    data.write_bytes(lines(range(9)))
    outcome = score(f"data.path={data}", "score.extend=true", "data.max_length=100")
    assert outcome.code == 2
    assert "identity.max_length" in outcome.stderr


def test_what_was_killed_in_between_goes_on(score, tmp_path: Path):
    """The store knows of its new rows before they are scored: any later start scores them."""
    data, store = tmp_path / "data.jsonl", tmp_path / "store"
    data.write_bytes(lines(range(100)))
    assert score(f"data.path={data}").code == 0
    data.write_bytes(lines(range(200)))
    assert score(f"data.path={data}", "score.extend=true", "score.part=0/2").code == 0
    assert len(list(store.glob("*.parquet"))) == 3
    assert score(f"data.path={data}").code == 0
    assert verify_store(store).num_rows == 200
    data.write_bytes(lines(range(210)))
    assert score(f"data.path={data}", "score.extend=true").code == 0
    assert read_manifest(store).source.extended_at == (100, 200)
    assert verify_store(store).problems == []

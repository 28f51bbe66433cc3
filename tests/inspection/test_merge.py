"""`prift-inspect merge`: what is merged equals what is scored in one go, and every source row is accounted for."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inspection import diff, merge, merge_rows
from shared.errors import UserError
from shared.score_store import read_manifest
from shared.shards import dropped_path, open_store, read_batches, shard_path, write_shard
from shared.verify import verify_store
from stage1_score.cross_check import scored_rows
from stage2_train.cache import open_cache


@pytest.fixture
def merged(call_verb, tmp_path: Path) -> Callable[..., Path]:
    """The folder that `prift-inspect merge WORD ... -o FOLDER` writes."""

    def run(*words: Any) -> Path:
        call_verb(merge, *words, "-o", tmp_path / "out" / "merged")
        return tmp_path / "out" / "merged"

    return run


@pytest.fixture
def refusal(merged, tmp_path: Path) -> Callable[..., str]:
    """Why a merge is refused; nothing is left of it."""

    def run(*words: Any) -> str:
        with pytest.raises(UserError) as refused:
            merged(*words)
        assert not list(tmp_path.glob("out/*"))
        assert not list(tmp_path.glob("out/.*"))
        return str(refused.value)

    return run


def dropped_of(store: Path) -> list[dict[str, Any]]:
    """All listings of dropped rows."""
    texts = [path.read_text() for path in sorted(store.glob("*.dropped.jsonl"))]
    return [json.loads(line) for text in texts for line in text.splitlines()]


@pytest.fixture
def scored(prift_score, tmp_path: Path, plain_prior: Path, write_jsonl) -> Callable[..., Path]:
    """Score files of some of 13 rows, of which two are too long; each row alone, so that its numbers are its own."""

    def score(name: str, shard_rows: int, *parts: range) -> Path:
        paths = []
        for rows in parts:
            data = [{"id": f"r{n}", "prompt": "p" * (90 if n in (3, 9) else n + 1), "completion": f"{n * n}"}
                    for n in rows]  # fmt: skip
            paths.append(write_jsonl(tmp_path / f"{rows.start}.jsonl", data))
        outcome = prift_score(
            f"data.path=[{','.join(map(str, paths))}]", f"prior.model={plain_prior}", "score.engine=transformers",
            f"score.output={tmp_path / name}", f"score.shard_rows={shard_rows}", "score.device=cpu",
            "score.batch_tokens=16", "data.max_length=64",
        )  # fmt: skip
        assert outcome.code == 0, outcome.stderr
        return tmp_path / name

    return score


def test_two_halves_are_the_whole(scored, merged, tmp_path: Path):
    halves = [scored("first", 4, range(6)), scored("second", 3, range(6, 13))]
    whole, joined = scored("whole", 4, range(6), range(6, 13)), merged(*halves)
    (manifest, shards), (expected, expected_shards) = open_store(joined), open_store(whole)
    assert manifest.fingerprint == expected.fingerprint
    contents = [[(file.sha256, file.num_rows) for file in it.source.files] for it in (manifest, expected)]
    assert contents[0] == contents[1]
    assert len(shards) == 4
    # A digest is over the lengths, nulls and bits of every value, row ids and source indices among them.
    assert [shard.digest for shard in shards] == [shard.digest for shard in expected_shards]
    for index in range(4):
        assert dropped_path(joined, index).read_text() == dropped_path(whole, index).read_text()
    assert [row["source_index"] for row in dropped_of(joined)] == [3, 9]
    assert verify_store(joined).problems == []
    cache = open_cache(joined, ("logprob", "mass_rank"), tmp_path / "cache")
    assert len(cache) == 11
    assert {path.name for path in joined.iterdir()} == {path.name for path in whole.iterdir()} - {"score.metrics.jsonl"}


def test_the_order_is_that_of_the_arguments(store, data_file, merged, read_store):
    parts = [store(it, [data_file(it, count)], 2) for it, count in (("b", 3), ("a", 2), ("c", 1))]
    rows = read_store(merged(*parts))
    assert [row["row_id"] for row in rows] == ["b0", "b1", "b2", "a0", "a1", "c0"]
    assert [row["source_index"] for row in rows] == list(range(6))


@pytest.fixture
def limited(tmp_path: Path, manifest_with, scored_row, store_of, data_file) -> Callable[[str, int, list], Path]:
    """A store of the first `limit` rows of some data files."""

    def make(name: str, limit: int, files: list) -> Path:
        manifest = manifest_with(1, 3, False)
        source = manifest.source.model_copy(update={"files": tuple(files), "limit": limit})
        manifest = manifest.model_copy(update={"source": source, "vocab_size": 300})
        return store_of(tmp_path / name, manifest, [scored_row(n) for n in range(limit)])

    return make


def test_a_limited_store_records_the_rows_it_used(limited, store, data_file, merged, tmp_path: Path, call_verb):
    first = limited("first", 6, [data_file("a", 5), data_file("b", 4), data_file("c", 9)])
    joined = merged(first, store("second", [data_file("d", 4)], user_row_ids=False))
    source = read_manifest(joined).source
    assert [(file.sha256[0], file.num_rows) for file in source.files] == [("a", 5), ("b", 1), ("d", 4)]
    assert (source.limit, source.num_rows) == (None, 10)
    assert verify_store(joined).problems == []
    assert len(open_cache(joined, ("logprob",), tmp_path / "cache")) == 10
    # The row of `b` is still row 0 of that file.
    assert "6 rows correspond, by row of the data file; without a counterpart: 4 of A, 0 of B" in call_verb(
        diff, joined, first
    )


def test_scoring_sees_that_a_merged_store_lacks_rows_of_a_file(
    prift_score, merged, tmp_path: Path, plain_prior: Path, write_jsonl
):
    """Rows between those of the store have no number in it."""
    paths = [write_jsonl(tmp_path / f"{it}.jsonl", [{"prompt": f"{it}{n} ", "completion": "x"} for n in range(4)])
             for it in "ab"]  # fmt: skip

    def score(output: Path, data: list[Path], *more: str) -> Any:
        return prift_score(
            f"prior.model={plain_prior}", f"score.output={output}", f"data.path=[{','.join(map(str, data))}]",
            "score.engine=transformers", "score.device=cpu", "score.shard_rows=3", *more,
        )  # fmt: skip

    assert score(tmp_path / "one", paths[:1], "data.limit=2").code == 0
    assert score(tmp_path / "two", paths[1:]).code == 0
    joined = merged(tmp_path / "one", tmp_path / "two")
    before = {path.name: path.read_bytes() for path in joined.iterdir()}
    assert "source.files" in score(joined, paths).stderr
    for word in ("score.extend=true", "score.rehash=true"):
        outcome = score(joined, paths, "score.extend=true", word)
        assert outcome.code == 2
        assert f"holds 2 of the 4 rows of {paths[0]}, and rows of other files after them" in outcome.stderr
    assert {path.name: path.read_bytes() for path in joined.iterdir()} == before


def test_a_data_set_of_the_hub_is_not_claimed_for_rows_of_other_files(store, data_file, merged):
    parts = store("left", [data_file("a", 2)]), store("right", [data_file("b", 2)])
    content = json.loads((parts[0] / "store.json").read_text())
    content["source"]["hub"] = {"id": "some/data", "config": None, "split": "train", "revision": "0" * 40}
    (parts[0] / "store.json").write_text(json.dumps(content))
    assert read_manifest(parts[0]).source.hub is not None
    source = read_manifest(merged(*parts)).source
    assert source.hub is None
    assert [file.sha256[0] for file in source.files] == ["a", "b"]


def test_rows_of_one_file_in_two_stores_are_refused(limited, data_file, refusal):
    stores = [limited(name, limit, [data_file("a", 9)]) for name, limit in (("few", 2), ("more", 5))]
    message = refusal(*stores)
    assert f"{stores[1]}: row 0 of a.jsonl (sha256 aaaaaaaaaaaa...) is in {stores[0]} too" in message
    assert "2 rows are in more than one store: --duplicates keep-first" in message


def test_each_row_is_a_duplicate_once(limited, data_file, refusal, merged, read_store):
    stores = [limited(f"first {n} as {it}", n, [data_file("a", 9)]) for it, n in enumerate((5, 2, 5, 7))]
    assert "12 rows are in more than one store" in refusal(*stores)
    joined = merged(*stores, "--duplicates", "keep-first")
    assert len(read_store(joined)) == 7
    assert {row["reason"].rpartition(" kept from ")[2] for row in dropped_of(joined)} == {str(stores[0])}
    assert verify_store(joined).problems == []


def test_keep_first_lists_the_others(limited, store, data_file, merged, read_store, call_verb):
    few, more = limited("few", 2, [data_file("a", 9)]), limited("more", 5, [data_file("b", 1), data_file("a", 9)])
    joined = merged(few, more, "--duplicates", "keep-first")
    assert [row["source_index"] for row in read_store(joined)] == [0, 1, 2, 5, 6]
    assert [row["source_index"] for row in dropped_of(joined)] == [3, 4]
    assert [row["reason"] for row in dropped_of(joined)] == [
        f"duplicate: row {row} of a.jsonl is kept from {few}" for row in (0, 1)
    ]
    assert verify_store(joined).problems == []
    # What is merged may be merged again: the rows of `a` are known by their places still.
    again = call_verb(merge, joined, limited("all", 9, [data_file("a", 9)]), "--duplicates", "keep-first",
                      "-o", joined.with_name("again"))  # fmt: skip
    assert "10 rows of 2 stores, 6 dropped" in again
    assert verify_store(joined.with_name("again")).problems == []


def test_repeated_content_of_other_rows_is_kept(store, data_file, merged, read_store):
    def change(row: Any) -> Any:
        return dataclasses.replace(row, row_id="hash of the content")

    parts = [store(it, [data_file(it, 2)], change=change, user_row_ids=False) for it in "ab"]
    assert [row["row_id"] for row in read_store(merged(*parts))] == ["hash of the content"] * 4


def test_a_file_twice_in_one_store_stays_twice(store, data_file, merged, read_store):
    twice = store("twice", [data_file("a", 2), data_file("a", 2)], user_row_ids=False)
    joined = merged(twice, store("other", [data_file("b", 1)], user_row_ids=False))
    assert len(read_store(joined)) == 5


def test_ids_of_the_user_that_collide_are_refused(store, data_file, refusal):
    def change(row: Any) -> Any:
        return dataclasses.replace(row, row_id="a1") if row.row_id == "b2" else row

    parts = store("left", [data_file("a", 3)]), store("right", [data_file("b", 3)], change=change)
    assert f"row id 'a1' stands in {parts[0]} and in {parts[1]}" in refusal(*parts)


def test_duplicates_with_the_users_ids_are_no_collision(store, data_file, merged):
    parts = store("left", [data_file("a", 3)]), store("right", [data_file("a", 3), data_file("b", 2)])
    joined = merged(*parts, "--duplicates", "keep-first")
    assert verify_store(joined).problems == []
    assert len(dropped_of(joined)) == 3


@pytest.mark.parametrize(
    ("field", "value"), [("prior_weights", "f" * 64), ("weight_dtype", "bfloat16"), ("columns", ("logprob", "entropy"))]
)
def test_another_identity_is_refused(store, data_file, refusal, field: str, value: Any):
    message = refusal(store("left", [data_file("a", 2)]), store("right", [data_file("b", 2)], **{field: value}))
    assert f"identity.{field}" in message
    assert message.count("\n") == 2


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 301), ("stop_token_ids", (2, 3)), ("source.columns", {"id": "key"})]
)
def test_another_meaning_beside_the_identity_is_refused(store, data_file, refusal, field: str, value: Any):
    left, right = store("left", [data_file("a", 2)]), store("right", [data_file("b", 2)])
    content = json.loads((right / "store.json").read_text())
    *section, name = field.split(".")
    (content["source"] if section else content)[name] = value
    (right / "store.json").write_text(json.dumps(content))
    assert f"\n  {field} " in refusal(left, right)


def test_what_made_the_shards_is_recorded(store, data_file, merged, call_verb):
    parts = store("left", [data_file("a", 2)]), store("right", [data_file("b", 2)])
    manifest, shards = open_store(parts[1])
    rows = [row for table in read_batches(shards[0]) for row in scored_rows(table, manifest.identity.columns)]
    write_shard(parts[1], 0, manifest, rows, [], {"engine": "other", "device": "cpu"})
    joined = merged(*parts)
    footers = [json.loads(pq.read_schema(shard_path(joined, index)).metadata[b"prift"]) for index in (0, 1)]
    assert [(it["engine"], it["device"]) for it in footers] == [("none and other", "cpu"), ("other", "cpu")]
    call_verb(merge, joined, store("more", [data_file("c", 2)]), "-o", joined.with_name("again"))
    footer = json.loads(pq.read_schema(shard_path(joined.with_name("again"), 1)).metadata[b"prift"])
    assert footer["engine"] == "other and none"


def test_damage_is_not_passed_on(store, data_file, refusal, rewrite):
    left, right = store("left", [data_file("a", 4)]), store("right", [data_file("b", 4)])
    before = shard_path(right, 1).read_bytes()

    def edited(table: pa.Table) -> pa.Table:
        values = pa.array([[None, None, 1.0, 2.0, 0.125]], table.column("entropy").type)
        return table.set_column(table.schema.get_field_index("entropy"), "entropy", values)

    rewrite(shard_path(right, 1), edited)
    assert "its values are not those that were scored" in refusal(left, right)
    shard_path(right, 1).write_bytes(before)
    dropped_path(right, 1).write_text('{"row_id": "x", "source_index": 3, "reason": "?"}\n')
    assert "1 rows and 1 dropped ones are not the 1 planned" in refusal(left, right)


def test_an_output_that_is_there_is_kept(store, data_file, merged, tmp_path: Path):
    parts = store("left", [data_file("a", 2)]), store("right", [data_file("b", 2)])
    (tmp_path / "out" / "merged").mkdir(parents=True)
    with pytest.raises(UserError, match="expected nothing there yet"):
        merged(*parts)
    assert list((tmp_path / "out" / "merged").iterdir()) == []


def test_one_store_is_no_merge(store, data_file, refusal):
    assert "expected two or more stores" in refusal(store("left", [data_file("a", 2)]))


def test_an_unfinished_store_is_refused(store, data_file, refusal):
    parts = store("left", [data_file("a", 2)]), store("right", [data_file("b", 9)])
    shard_path(parts[1], 2).unlink()
    assert "is unfinished: 1 of 3 shards are missing" in refusal(*parts)


def test_rows_are_streamed(store, data_file, merged, monkeypatch):
    """No more rows than those of the shard in the making have been read when it is written."""
    read = 0

    def counting(table: Any, columns: Any) -> Any:
        nonlocal read
        for row in original(table, columns):
            read += 1
            yield row

    def writing(folder: Path, index: int, *rest: Any) -> Any:
        seen.append(read)
        return write_shard(folder, index, *rest)

    original, seen = merge_rows.scored_rows, []
    monkeypatch.setattr(merge_rows, "scored_rows", counting)
    monkeypatch.setattr(merge_rows, "write_shard", writing)
    merged(store("left", [data_file("a", 8)], 2), store("right", [data_file("b", 8)], 5))
    assert seen == [min(2 * n + 3, 16) for n in range(8)]

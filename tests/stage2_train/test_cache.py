"""The memory-mapped copy holds what the store holds, and is made once."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from stage2_train.cache import open_cache


@pytest.fixture
def stored(scored_store: Path) -> list[dict]:
    return pq.read_table(sorted(scored_store.glob("*.parquet"))).to_pylist()


def test_rows_are_those_of_the_store(scored_store: Path, stored: list[dict], tmp_path: Path):
    cache = open_cache(scored_store, ("logprob", "mass_rank"), tmp_path)
    assert len(cache) == len(stored)
    for index in np.random.default_rng(0).permutation(len(stored)):
        row, record = cache.row(int(index)), stored[index]
        positions = [i for i, value in enumerate(record["logprob"]) if value is not None]
        assert row.input_ids.tolist() == record["input_ids"]
        assert row.target_positions.tolist() == positions
        for name in ("logprob", "mass_rank"):
            assert row.statistics[name].tolist() == [record[name][i] for i in positions]


def test_counts_of_any_rows_are_those_of_the_store(scored_store: Path, stored: list[dict], tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    lengths = np.array([len(record["input_ids"]) for record in stored])
    num_targets = np.array([sum(value is not None for value in record["logprob"]) for record in stored])
    last = len(stored) - 1
    for counts, expected in ((cache.lengths, lengths), (cache.num_targets, num_targets)):
        for rows in (np.arange(len(stored)), np.array([3, 0, last, 3]), np.array([[0], [last]]), np.zeros(0, np.int64)):
            assert counts[rows].dtype == np.int64
            assert np.array_equal(counts[rows], expected[rows])
        for part in (slice(None), slice(2, 9, 3), slice(-2, None)):
            assert np.array_equal(counts[part], expected[part])
        assert counts[np.int64(0)] == expected[0]
        assert len(counts) == len(stored)
        assert counts.sum() == expected.sum()


@pytest.mark.parametrize("rows", [np.array([0, -1]), np.array([True, False])])
def test_counts_take_places_and_nothing_else(scored_store: Path, tmp_path: Path, rows: np.ndarray):
    with pytest.raises(AssertionError):
        open_cache(scored_store, (), tmp_path).lengths[rows]


def test_all_that_grows_with_the_store_stays_in_its_files(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, ("logprob", "mass_rank"), tmp_path)
    arrays = list(arrays_within(cache))
    assert len(arrays) == len(list(tmp_path.rglob("*.bin"))) == 6
    for array in arrays:
        assert type(array) is np.ndarray  # slices of an np.memmap take several times as long
        assert isinstance(array.base, np.memmap)


def arrays_within(value: Any) -> Iterator[np.ndarray]:
    """Every array that an object holds, at any depth; no list or dict of it may have an entry per row."""
    if isinstance(value, np.ndarray):
        yield value
        return
    if isinstance(value, dict):
        members = list(value.values())
    else:
        members = list(value) if isinstance(value, list | tuple) else list(getattr(value, "__dict__", {}).values())
    assert len(members) < 20
    for member in members:
        yield from arrays_within(member)


def test_the_first_targets_are_those_of_whole_rows(scored_store: Path, stored: list[dict], tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    by_row = [
        [i for i, value in zip(record["input_ids"], record["logprob"], strict=True) if value is not None]
        for record in stored
    ]
    two = len(by_row[0]) + len(by_row[1])
    for most, num_rows in ((two, 2), (two - 1, 1), (1, 1), (10**9, len(stored))):
        assert cache.target_ids(most).tolist() == [i for ids in by_row[:num_rows] for i in ids]


def test_only_the_columns_asked_for_are_converted_and_later_ones_are_added(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        "input_ids.bin", "row_ends.bin", "target_ends.bin", "target_positions.bin",
    ]  # fmt: skip
    before = (folder / "input_ids.bin").stat().st_mtime_ns
    later = open_cache(scored_store, ("entropy",), tmp_path)
    assert (folder / "entropy.bin").stat().st_size == 4 * cache.num_targets.sum()
    assert (folder / "input_ids.bin").stat().st_mtime_ns == before
    assert later.key == cache.key


def test_a_half_made_copy_is_made_anew(scored_store: Path, stored: list[dict], tmp_path: Path):
    open_cache(scored_store, ("logprob",), tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "logprob.bin").unlink()
    (folder / ".tmp-host-1-logprob.bin").write_bytes(b"torn")
    cache = open_cache(scored_store, ("logprob",), tmp_path)
    assert cache.row(0).statistics["logprob"][0] == next(v for v in stored[0]["logprob"] if v is not None)


def test_several_starters_make_it_once(scored_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import stage2_train.cache as module

    conversions = []
    convert = module._convert
    monkeypatch.setattr(module, "_convert", lambda *args: (conversions.append(1), convert(*args)))
    threads = [threading.Thread(target=open_cache, args=(scored_store, ("logprob",), tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1


def test_another_content_is_another_copy(scored_store: Path, tmp_path: Path):
    """The same folder, scored again from other data, must not be served from the old copy."""
    store = tmp_path / "store"
    shutil.copytree(scored_store, store)
    first = open_cache(store, (), tmp_path / "cache")
    shard = sorted(store.glob("*.parquet"))[0]
    content = pq.read_schema(shard).metadata[b"prift"]
    forged = content.replace(b'"digest": "', b'"digest": "0')
    pq.write_table(pq.read_table(shard).replace_schema_metadata({b"prift": forged}), shard)
    with pytest.raises(UserError, match="digest differs"):
        open_cache(store, (), tmp_path / "cache")
    assert first.key


def test_a_missing_column_is_named_with_the_way_out(scored_store: Path, tmp_path: Path):
    expected = r"expected the column collision.*score.columns=\[logprob,mass_rank,entropy,collision\]"
    with pytest.raises(UserError, match=expected):
        open_cache(scored_store, ("collision",), tmp_path)


def test_stored_rows_come_in_the_order_asked_for(scored_store: Path, stored: list[dict], tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    indices = [5, 0, len(stored) - 1, 5]
    assert cache.stored_rows(indices, ["row_id", "logprob"]) == [
        {"row_id": stored[i]["row_id"], "logprob": stored[i]["logprob"]} for i in indices
    ]

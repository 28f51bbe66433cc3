"""Shards: what is written is what is read, and nothing that was changed since passes for it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import UserError
from shared.score_store import MANIFEST_NAME
from shared.shards import (
    dropped_path,
    flatten,
    open_store,
    read_batches,
    read_footer,
    shard_path,
    write_shard,
)


@pytest.fixture
def store(tmp_path: Path, manifest_with, scored_row, store_of) -> Path:
    """Six rows in two shards."""
    return store_of(tmp_path / "store", manifest_with(6, 3), [scored_row(index) for index in range(6)])


def read_all(store: Path) -> list[pa.Table]:
    _, shards = open_store(store)
    return [table for shard in shards for table in read_batches(shard)]


def test_value_i_is_about_token_i(store: Path, read_store):
    rows = read_store(store)
    assert [row["row_id"] for row in rows] == [f"row-{index}" for index in range(6)]
    assert [row["source_index"] for row in rows] == list(range(6))
    assert rows[4] == {
        "row_id": "row-4",
        "source_index": 4,
        "input_ids": [1, 14, 24, 34, 2],
        "logprob": [None, None, -4.5, -5.5, -4.25],
        "mass_rank": [None, None, 0.0, 0.03125, 1.0],
        "entropy": [None, None, 5.0, 6.0, 4.0],
    }


def test_types_and_encodings(store: Path):
    with pq.ParquetFile(shard_path(store, 0)) as file:
        schema, group = file.schema_arrow, file.metadata.row_group(0)
        chunks = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    assert {name: str(schema.field(name).type.value_type) for name in schema.names[2:]} == {
        "input_ids": "int32", "logprob": "float", "mass_rank": "float", "entropy": "float",
    }  # fmt: skip
    assert [str(schema.field(name).type) for name in schema.names[:2]] == ["string", "int64"]
    assert {chunk.compression for chunk in chunks.values()} == {"ZSTD"}
    for name in ("logprob", "entropy"):
        assert "BYTE_STREAM_SPLIT" in chunks[f"{name}.list.element"].encodings


def test_any_parquet_reader_reads_a_shard(store: Path):
    import polars as pl

    frame = pl.read_parquet(store / "*.parquet")
    assert frame["logprob"].list.len().to_list() == [5] * 6
    assert frame["logprob"].explode().null_count() == 12


def test_the_footer_says_what_made_it(store: Path, manifest_with):
    shard = open_store(store)[1][1]
    assert (shard.index, shard.num_rows, shard.num_tokens, shard.num_targets) == (1, 3, 15, 9)
    footer = json.loads(pq.read_schema(shard.path).metadata[b"prift"])
    assert footer["fingerprint"] == manifest_with().fingerprint
    assert footer["engine"] == "none"


def test_dropped_rows_are_listed_beside_the_shard(tmp_path: Path, manifest_with, scored_row):
    dropped = [{"row_id": "ü\ud800", "source_index": 1, "reason": "no target token"}]
    write_shard(tmp_path, 0, manifest_with(), [scored_row(0)], dropped, {})
    lines = dropped_path(tmp_path, 0).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == dropped


def test_a_shard_of_no_rows(tmp_path: Path, manifest_with, store_of):
    store = store_of(tmp_path / "store", manifest_with(3, 3), [])
    assert open_store(store)[1][0].num_rows == 0
    assert sum(table.num_rows for table in read_all(store)) == 0


def test_many_row_groups_read_as_one(tmp_path: Path, manifest_with, scored_row, store_of):
    count = 1100
    rows = [scored_row(index % 50, row_id=str(index), source_index=index) for index in range(count)]
    store = store_of(tmp_path / "store", manifest_with(count, count), rows)
    tables = read_all(store)
    assert len(tables) == 3  # row groups are small enough to stream
    assert [index for table in tables for index in table.column("source_index").to_pylist()] == list(range(count))


def test_columns_can_be_read_alone(store: Path):
    shard = open_store(store)[1][0]
    tables = list(read_batches(shard, ["mass_rank"]))
    assert tables[0].schema.names == ["mass_rank"]


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def test_a_flipped_bit_in_any_page_is_found(store: Path):
    path = shard_path(store, 1)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        chunks = [group.column(index) for index in range(group.num_columns)]
    whole = path.read_bytes()
    for chunk in chunks:
        # The last byte of a column chunk belongs to the data of its last page.
        flip(path, chunk.data_page_offset + chunk.total_compressed_size - 1)
        with pytest.raises(UserError, match=f"{path}: a page is corrupted"):
            read_all(store)
        path.write_bytes(whole)
    read_all(store)


def test_a_page_is_checked_even_where_one_column_is_read(store: Path):
    path = shard_path(store, 0)
    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith("mass_rank"))
    shard = open_store(store)[1][0]
    flip(path, chunk.data_page_offset + chunk.total_compressed_size - 1)
    with pytest.raises(UserError, match="a page is corrupted"):
        list(read_batches(shard, ["mass_rank"]))


@pytest.mark.parametrize("length", [0, 3, 200, -1])
def test_a_torn_file_is_refused(store: Path, length: int):
    path = shard_path(store, 0)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=f"{path}: not a whole Parquet file"):
        open_store(store)


def shift(table: pa.Table, name: str) -> pa.Table:
    """Every value one token to the left, as a reader who mistakes the alignment would have it."""
    values = [[*row[1:], None] for row in table.column(name).to_pylist()]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.list_(pa.float32())))


def swap(table: pa.Table, name: str) -> pa.Table:
    """The first two rows' values exchanged: all lengths and ranges still hold."""
    values = table.column(name).to_pylist()
    values[:2] = values[1], values[0]
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table.column(name).type))


@pytest.mark.parametrize(
    "change",
    [
        lambda table: shift(shift(shift(table, "logprob"), "mass_rank"), "entropy"),
        lambda table: shift(table, "mass_rank"),
        lambda table: swap(table, "mass_rank"),
        lambda table: swap(table, "input_ids"),
        lambda table: swap(table, "row_id"),
        lambda table: table.slice(1).take(pa.array([0, 1, 1])),
        lambda table: table.take(pa.array([1, 0, 2])),
    ],
    ids=[
        "all shifted",
        "one shifted",
        "values swapped",
        "ids swapped",
        "row ids swapped",
        "row repeated",
        "rows swapped",
    ],
)
def test_values_changed_after_scoring_are_found_by_the_digest(store: Path, rewrite, change):
    path = shard_path(store, 0)
    rewrite(path, lambda table: table)
    read_all(store)  # written again as it was: nothing to find
    rewrite(path, change)
    with pytest.raises(UserError, match=f"{path}: its values are not those that were scored"):
        read_all(store)


def test_a_null_and_a_zero_are_not_the_same(store: Path, rewrite):
    def fill(table: pa.Table) -> pa.Table:
        rows = [[value or 0.0 for value in row] for row in table.column("mass_rank").to_pylist()]
        place = table.schema.get_field_index("mass_rank")
        return table.set_column(place, "mass_rank", pa.array(rows, pa.list_(pa.float32())))

    rewrite(shard_path(store, 0), fill)
    with pytest.raises(UserError, match="the digest differs"):
        read_all(store)


def test_a_shard_of_another_store_is_refused(store: Path, tmp_path: Path, manifest_with, scored_row, store_of):
    rows = [scored_row(index) for index in range(6)]
    foreign = store_of(tmp_path / "foreign", manifest_with(6, 3, max_length=65), rows)
    shutil.copy(shard_path(foreign, 1), shard_path(store, 1))
    with pytest.raises(UserError, match="its footer says fingerprint="):
        open_store(store)


def test_a_shard_in_anothers_place_is_refused(store: Path):
    shutil.copy(shard_path(store, 0), shard_path(store, 1))
    with pytest.raises(UserError, match="its footer says shard=0, expected 1"):
        open_store(store)


def test_a_file_that_is_no_shard_is_refused(store: Path, manifest_with):
    pq.write_table(pa.table({"a": [1]}), shard_path(store, 0))
    with pytest.raises(UserError, match="its footer says fingerprint=None"):
        read_footer(shard_path(store, 0), manifest_with(6, 3), 0)


def test_a_shard_with_fewer_rows_than_its_footer_says_is_refused(store: Path, rewrite):
    rewrite(shard_path(store, 0), lambda table: table.slice(0, 2))
    with pytest.raises(UserError, match="its footer says num_rows=3, expected 2"):
        open_store(store)


def test_an_unfinished_store_is_refused(store: Path):
    shard_path(store, 1).unlink()
    with pytest.raises(UserError, match="unfinished: 1 of 2 shards are missing, the first is shard 1; run prift-score"):
        open_store(store)


def test_a_write_that_fails_leaves_no_shard(tmp_path: Path, manifest_with, scored_row, monkeypatch):
    import shared.shards

    def fail_halfway(table: pa.Table, path: Path, **_: object) -> None:
        path.write_bytes(b"PAR1 and no more")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shared.shards.pq, "write_table", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, 0, manifest_with(), [scored_row(0)], [], {})
    assert not shard_path(tmp_path, 0).exists()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_equal_rows_give_equal_bytes(tmp_path: Path, manifest_with, scored_row, store_of):
    rows = [scored_row(index) for index in range(4)]
    one, two = (store_of(tmp_path / name, manifest_with(), rows) for name in ("one", "two"))
    assert shard_path(one, 0).read_bytes() == shard_path(two, 0).read_bytes()
    assert (one / MANIFEST_NAME).read_bytes() == (two / MANIFEST_NAME).read_bytes()


def test_flatten_marks_nulls():
    column = pa.chunked_array([[[1.0, None], []], [None, [2.0]]], pa.list_(pa.float32()))
    flat = flatten(column)
    assert flat.lengths.tolist() == [2, 0, 0, 1]
    assert flat.values.tolist() == [1.0, 0.0, 2.0]
    assert flat.valid.tolist() == [True, False, True]
    assert flat.lengths.dtype == np.int64

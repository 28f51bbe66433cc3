"""Each invariant of a store is broken in turn, by someone who writes digests and checksums that fit."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.errors import UserError
from shared.shards import shard_path
from shared.verify import verify_store


@pytest.fixture
def verified(tmp_path: Path, manifest_with, scored_row, store_of):
    """Verify a store of four rows in two shards, the third changed as given; returns the problems."""

    def verify(user_row_ids: bool = True, statistics: dict[str, Any] | None = None, **changes: Any) -> list[str]:
        rows = [scored_row(index) for index in range(4)]
        row = dataclasses.replace(rows[2], **changes)
        given = {name: np.array(values, np.float32) for name, values in (statistics or {}).items()}
        rows[2] = dataclasses.replace(row, statistics={**row.statistics, **given})
        return verify_store(store_of(tmp_path / "store", manifest_with(4, 2, user_row_ids), rows)).problems

    return verify


def test_a_sound_store(tmp_path: Path, manifest_with, scored_row, store_of):
    result = verify_store(store_of(tmp_path / "s", manifest_with(4, 2), [scored_row(index) for index in range(4)]))
    assert (result.num_rows, result.num_targets, result.problems) == (4, 12, [])


def test_the_ends_of_the_ranges_are_allowed(verified):
    statistics = {"logprob": [0.0, -0.0, -1e30], "mass_rank": [0.0, 1.0, 0.5], "entropy": [0.0, 12.0, 1.0]}
    assert verified(statistics=statistics) == []


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("logprob", 1e-6), ("logprob", np.nan), ("logprob", -np.inf), ("mass_rank", -1e-6),
        ("mass_rank", np.nextafter(np.float32(1), np.float32(2))), ("mass_rank", np.nan),
        ("entropy", -1e-6), ("entropy", np.inf), ("entropy", np.nan),
    ],
)  # fmt: skip
def test_values_outside_their_range(verified, column: str, value: float):
    problems = verified(statistics={column: [-0.0, value, -0.0]})
    assert len(problems) == 1
    assert f"row 'row-2' (source_index 2): {column} is not finite or outside" in problems[0]
    assert "shard-00001.parquet" in problems[0]


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1])
def test_token_ids_outside_the_vocabulary(verified, token: int):
    problems = verified(input_ids=np.array([1, 12, 22, token, 2], np.int32))
    assert [problem.split(": ", 2)[2] for problem in problems] == ["a token id is null or outside the vocabulary"]


def test_token_0_as_a_target(verified):
    problems = verified(target_positions=np.array([0, 3, 4], np.int32))
    assert [problem.split(": ", 2)[2] for problem in problems] == ["token 0 is a target"]


def test_a_row_without_target(verified):
    empty: dict[str, Any] = {name: [] for name in ("logprob", "mass_rank", "entropy")}
    problems = verified(target_positions=np.zeros(0, np.int32), statistics=empty)
    assert [problem.split(": ", 2)[2] for problem in problems] == ["no target"]


@pytest.mark.parametrize("index", [3, 1, 4, -1])
def test_a_source_index_out_of_order_or_of_another_shard(verified, index: int):
    # Shard 1 holds the source rows 2 and 3.
    problems = verified(source_index=index)
    assert any("source_index is not ascending within the shard's source rows" in problem for problem in problems)


def test_row_ids_of_the_user_are_unique(verified):
    # The other row-1 lies in another shard.
    assert verified(row_id="row-1") == ["row id 'row-1' stands 2 times, though row ids are the user's own"]


def test_content_hashes_may_repeat(verified):
    assert verified(user_row_ids=False, row_id="row-1") == []


@pytest.fixture
def store(tmp_path: Path, manifest_with, scored_row, store_of) -> Path:
    """A sound store of four rows in two shards."""
    return store_of(tmp_path / "sound", manifest_with(4, 2), [scored_row(index) for index in range(4)])


def changed(table: pa.Table, name: str, row: int, values: list[Any] | None) -> pa.Table:
    rows = table.column(name).to_pylist()
    rows[row] = values
    return table.set_column(table.schema.get_field_index(name), name, pa.array(rows, table.column(name).type))


@pytest.mark.parametrize("values", [[None, None, -1.0, -1.0], [None, None, -1.0, -1.0, -1.0, -1.0], [], None])
@pytest.mark.parametrize("column", ["logprob", "mass_rank"])
def test_a_column_of_another_length(store: Path, rewrite, column: str, values: list[float] | None):
    rewrite(shard_path(store, 0), lambda table: changed(table, column, 1, values))
    problems = verify_store(store).problems
    assert any(f"row 'row-1' (source_index 1): {column} is not as long as input_ids" in each for each in problems)


def test_columns_scored_at_other_positions(store: Path, rewrite):
    rewrite(shard_path(store, 0), lambda table: changed(table, "entropy", 0, [None, 1.0, 1.0, None, 1.0]))
    problems = verify_store(store).problems
    assert any("'row-0' (source_index 0): entropy and logprob are scored at other positions" in p for p in problems)


def test_a_null_among_the_ids(store: Path, rewrite):
    rewrite(shard_path(store, 0), lambda table: changed(table, "input_ids", 1, [1, None, 3, 4, 5]))
    assert any("'row-1'" in p and "a token id is null" in p for p in verify_store(store).problems)


@pytest.mark.parametrize("column", ["row_id", "source_index", "input_ids", "logprob", "mass_rank"])
def test_a_column_that_is_gone(store: Path, rewrite, column: str):
    rewrite(shard_path(store, 1), lambda table: table.drop_columns([column]))
    problems = verify_store(store).problems
    assert problems
    assert all("shard-00001.parquet" in problem for problem in problems)


def test_sound_looking_changes_are_found_by_the_digest(store: Path, rewrite):
    rewrite(shard_path(store, 0), lambda table: changed(table, "entropy", 0, [None, None, 1.0, 2.0, 0.125]))
    problems = verify_store(store).problems
    assert len(problems) == 1
    assert "its values are not those that were scored" in problems[0]


def test_a_damaged_page_does_not_hide_the_next_shard(store: Path, rewrite):
    path = shard_path(store, 0)
    content = bytearray(path.read_bytes())
    content[60] ^= 0x10
    path.write_bytes(content)
    rewrite(shard_path(store, 1), lambda table: changed(table, "entropy", 0, [None, None, 1.0, 2.0, 0.125]))
    problems = verify_store(store).problems
    assert len(problems) == 2
    assert "shard-00000.parquet: a page is corrupted" in problems[0]
    assert "shard-00001.parquet: its values are not those" in problems[1]


def test_an_unfinished_store_is_a_problem(store: Path):
    shard_path(store, 0).unlink()
    assert "is unfinished: 1 of 2 shards are missing" in verify_store(store).problems[0]


def test_no_store_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match="expected a score store"):
        verify_store(tmp_path)


def test_the_first_offenders_only(tmp_path: Path, manifest_with, scored_row, store_of):
    bad = {name: np.full(3, np.nan, np.float32) for name in ("logprob", "mass_rank", "entropy")}
    rows = [scored_row(index, statistics=bad) for index in range(40)]
    problems = verify_store(store_of(tmp_path / "s", manifest_with(40, 2), rows)).problems
    assert len(problems) == 10
    assert "row 'row-0' (source_index 0)" in problems[0]

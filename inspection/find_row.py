"""One row of a store, found by streaming. Imports no torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from inspection.harmless import harmless
from shared.errors import UserError
from shared.score_store import Manifest
from shared.shards import ScoredRow, Shard, dropped_path, read_batches
from shared.verify import row_problems
from stage1_score.cross_check import scored_rows

_MOST_LISTED = 10


@dataclass(frozen=True)
class FoundRow:
    """A row, and who else bears its id."""

    row: ScoredRow
    num_of_id: int
    """Rows that were found: more than one where a content hash repeats."""
    others: list[int]
    """`source_index` of the first of the others."""


def find_row(store: Path, manifest: Manifest, shards: Sequence[Shard], name: str) -> FoundRow:
    """Find a row by its id, or by its `source_index` as `#N`.

    Raises:
        UserError: there is none, or it was dropped (with the reason).
    """
    if name.startswith("#") and name[1:].isdecimal():
        return FoundRow(_row_at(store, manifest, shards, int(name[1:])), 1, [])
    num_found, indices = 0, []
    for shard in shards:
        for table in read_batches(shard, ["row_id", "source_index"]):
            found = table.filter(pc.equal(table.column("row_id"), name))  # pyright: ignore[reportAttributeAccessIssue]
            num_found += found.num_rows
            indices += found.column("source_index").to_pylist()[: _MOST_LISTED + 1 - len(indices)]
    if not indices:
        raise UserError(_no_such_id(store, shards, name))
    return FoundRow(_row_at(store, manifest, shards, indices[0]), num_found, indices[1:])


def _row_at(store: Path, manifest: Manifest, shards: Sequence[Shard], index: int) -> ScoredRow:
    source = manifest.source
    if index >= source.num_rows:
        raise UserError(f"#{index}: expected a source_index below {source.num_rows}, the rows of the source")
    holder = next((shard for shard in shards if index in source.rows_of_shard(shard.index)), None)
    if holder is None:
        raise UserError(f"#{index}: the shard that holds this row is not scored yet")
    names = ["row_id", "source_index", "input_ids", *manifest.float_columns]
    for table in read_batches(holder, names):
        row: pa.Table = table.filter(pc.equal(table.column("source_index"), index))  # pyright: ignore[reportAttributeAccessIssue]
        if row.num_rows:
            problems = row_problems(row, manifest, holder)
            if problems:
                raise UserError(f"{problems[0]}; prift-inspect verify lists more")
            return next(scored_rows(row, manifest.identity.columns))
    for dropped in _dropped(store, [holder]):
        if dropped["source_index"] == index:
            raise UserError(_dropped_in_words(dropped))
    raise UserError(f"{holder.path}: #{index} is neither in it nor among the dropped rows: prift-inspect verify")


def _no_such_id(store: Path, shards: Sequence[Shard], name: str) -> str:
    for dropped in _dropped(store, shards):
        if dropped["row_id"] == name:
            return _dropped_in_words(dropped)
    table = next(table for shard in shards for table in read_batches(shard, ["row_id"]) if table.num_rows)
    example = table.column("row_id")[0].as_py()
    return f"{store}: no row has the id {name!r}; the first one has {example!r}. '#0' is the row at source_index 0"


def _dropped(store: Path, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        path = dropped_path(store, shard.index)
        if path.is_file():
            with path.open(encoding="utf-8") as lines:
                yield from map(json.loads, lines)


def _dropped_in_words(dropped: dict[str, Any]) -> str:
    reason = harmless(str(dropped["reason"]))
    return f"row {dropped['row_id']!r} (#{dropped['source_index']}) was dropped, not scored: {reason}"

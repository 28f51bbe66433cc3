"""One row of a store, found by streaming. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from inspection.harmless import harmless
from shared.errors import UserError
from shared.places import Place
from shared.score_store import Manifest
from shared.shards import ScoredRow, Shard, read_batches, read_dropped
from shared.verify import row_problems
from stage1_score.cross_check import scored_rows

_MOST_LISTED = 10


@dataclass(frozen=True)
class FoundRow:
    """A row, and who else bears its name."""

    row: ScoredRow
    num_found: int
    """More than one where a content hash repeats, or a conversation was split into its turns."""
    others: list[str]
    """The first of the others, as this verb takes them: `#N`, or the row ids of turns."""


def find_row(store: Place, manifest: Manifest, shards: Sequence[Shard], name: str) -> FoundRow:
    """Find a row by its id, or by its `source_index` as `#N`; a split conversation by either, or a turn by its own id.

    Raises:
        UserError: there is none, or it was dropped (with the reason).
    """
    if name.startswith("#") and name[1:].isdecimal():
        return _as_found(_rows_at(store, manifest, shards, int(name[1:])))
    num_found, indices = 0, []
    for shard in shards:
        for table in read_batches(shard, ["row_id", "source_index"]):
            found = table.filter(_is_named(table.column("row_id"), name, manifest))
            num_found += found.num_rows
            indices += found.column("source_index").to_pylist()[: _MOST_LISTED + 1 - len(indices)]
    if not indices:
        raise UserError(_no_such_id(store, manifest, shards, name))
    rows = _rows_at(store, manifest, shards, indices[0])
    exact = [row for row in rows if row.row_id == name]
    if len(set(indices)) == 1:
        return _as_found(exact or rows)
    return FoundRow((exact or rows)[0], num_found, [f"#{index}" for index in indices[1:]])


def _is_named(row_ids: pa.ChunkedArray, name: str, manifest: Manifest) -> Any:
    is_it = pc.equal(row_ids, name)  # pyright: ignore[reportAttributeAccessIssue]
    if not manifest.identity.split_turns:
        return is_it
    return pc.or_(is_it, pc.starts_with(row_ids, f"{name}#"))  # pyright: ignore[reportAttributeAccessIssue]


def _as_found(rows: Sequence[ScoredRow]) -> FoundRow:
    return FoundRow(rows[0], len(rows), [row.row_id for row in rows[1 : _MOST_LISTED + 1]])


def _rows_at(store: Place, manifest: Manifest, shards: Sequence[Shard], index: int) -> list[ScoredRow]:
    """The rows of a source row: one, or as many as it has turns where it was split."""
    source = manifest.source
    if index >= source.num_rows:
        raise UserError(f"#{index}: expected a source_index below {source.num_rows}, the rows of the source")
    holder = next((shard for shard in shards if index in source.rows_of_shard(shard.index)), None)
    if holder is None:
        raise UserError(f"#{index}: the shard that holds this row is not scored yet")
    found: list[ScoredRow] = []
    for table in read_batches(holder, manifest.columns):
        rows: pa.Table = table.filter(pc.equal(table.column("source_index"), index))  # pyright: ignore[reportAttributeAccessIssue]
        if problems := row_problems(rows, manifest, holder):
            raise UserError(f"{problems[0]}; prift-inspect verify lists more")
        found += scored_rows(rows, manifest.identity.columns)
    if found:
        return found
    for dropped in _dropped(store, [holder]):
        if dropped["source_index"] == index:
            raise UserError(_dropped_in_words(dropped))
    raise UserError(f"{holder.path}: #{index} is neither in it nor among the dropped rows: prift-inspect verify")


def _no_such_id(store: Place, manifest: Manifest, shards: Sequence[Shard], name: str) -> str:
    for dropped in _dropped(store, shards):
        if dropped["row_id"] == name:
            return _dropped_in_words(dropped)
    table = next(table for shard in shards for table in read_batches(shard, ["row_id"]) if table.num_rows)
    example = table.column("row_id")[0].as_py()
    num_shards = manifest.source.num_shards
    where = f" in the {len(shards)} of {num_shards} shards that are scored yet" if len(shards) < num_shards else ""
    return f"{store}: no row{where} has the id {name!r}; the first has {example!r}. '#0' is the row at source_index 0"


def _dropped(store: Place, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        yield from read_dropped(shard)


def _dropped_in_words(dropped: dict[str, Any]) -> str:
    reason = harmless(str(dropped["reason"]))
    return f"row {dropped['row_id']!r} (#{dropped['source_index']}) was dropped, not scored: {reason}"

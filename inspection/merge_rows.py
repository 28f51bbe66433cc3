"""The rows of several score stores written as one. Imports no torch."""

import heapq
import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from inspection.merge_plan import Part, joined
from inspection.reading import sound_tables
from shared.errors import UserError
from shared.score_store import Manifest
from shared.shards import ScoredRow, Shard, footer_source, read_batches, read_dropped, write_shard
from shared.verify import vanished_rows
from stage1_score.cross_check import scored_rows

_Entry = tuple[int, ScoredRow | dict[str, Any]]
"""`source_index`, and a scored row or the listing of a dropped one."""


def write_merged(folder: Path, manifest: Manifest, parts: Sequence[Part]) -> tuple[int, int]:
    """Write all shards of a merged store, holding the rows of one at a time.

    Returns:
        How many rows and targets they hold.

    Raises:
        UserError: a store is damaged.
    """
    entries = (entry for part in parts for entry in _entries(part))
    software = _Software(parts)
    pending = next(entries, None)
    num_rows = num_targets = 0
    for index in range(manifest.source.num_shards):
        planned = manifest.source.rows_of_shard(index)
        rows: list[ScoredRow] = []
        dropped: list[dict[str, Any]] = []
        while pending is not None and pending[0] < planned.stop:
            entry = pending[1]
            if isinstance(entry, ScoredRow):
                rows.append(entry)
            else:
                dropped.append(entry)
            pending = next(entries, None)
        shard = write_shard(folder, index, manifest, rows, dropped, software.of(planned))
        num_rows, num_targets = num_rows + shard.num_rows, num_targets + shard.num_targets
    return num_rows, num_targets


def _entries(part: Part) -> Iterator[_Entry]:
    """All rows of a store's source in order, numbered as in the new store, duplicates among the dropped."""
    columns = part.manifest.float_columns
    for shard in part.shards:
        rows = (row for table in sound_tables(part.manifest, shard) for row in scored_rows(table, columns))
        scored: Iterator[_Entry] = ((row.source_index, _kept_or_listed(part, row)) for row in rows)
        listed: Iterator[_Entry] = ((row["source_index"], row) for row in _dropped(part, shard))
        for index, entry in heapq.merge(scored, listed, key=lambda it: it[0]):
            number = part.first + index
            if isinstance(entry, ScoredRow):
                yield number, replace(entry, source_index=number)
            else:
                yield number, {**entry, "source_index": number}


def _kept_or_listed(part: Part, row: ScoredRow) -> ScoredRow | dict[str, Any]:
    near = bisect_right(part.duplicates, row.source_index, key=lambda it: it.rows.start) - 1
    if near < 0 or row.source_index not in part.duplicates[near].rows:
        return row
    found = part.duplicates[near]
    place = f"row {row.source_index - found.span.first} of {found.span.file.path}"
    reason = f"duplicate: {place} is kept from {found.holder}"
    return {"row_id": row.row_id, "source_index": row.source_index, "reason": reason}


def _dropped(part: Part, shard: Shard) -> list[dict[str, Any]]:
    """The dropped rows of a shard, in order, every row that the shard lacks among them."""
    listed = read_dropped(shard)
    indices = [table.column("source_index").to_numpy() for table in read_batches(shard, ["source_index"])]
    if problems := vanished_rows(shard, part.manifest, np.concatenate([np.zeros(0, np.int64), *indices])):
        raise UserError(f"{problems[0]}; prift-inspect verify says more")
    return listed


class _Software:
    """What made the shards that a new one is made from, as their footers say."""

    def __init__(self, parts: Sequence[Part]):
        self._ranges = [
            (range(part.first + planned.start, part.first + planned.stop), shard)
            for part in parts
            for shard in part.shards
            for planned in [part.manifest.source.rows_of_shard(shard.index)]
        ]

    def of(self, rows: range) -> dict[str, str]:
        """The values of all shards that hold some of these rows of the new store, joined where they differ."""
        first = bisect_right(self._ranges, rows.start, key=lambda it: it[0].stop)
        last = bisect_left(self._ranges, rows.stop, key=lambda it: it[0].start)
        return joined([software_of(shard) for _, shard in self._ranges[first:last]])


def software_of(shard: Shard) -> dict[str, str]:
    """What a shard's footer says of what made it."""
    footer = json.loads((pq.read_schema(footer_source(shard.path)).metadata or {})[b"prift"])
    counts = {"fingerprint", "shard", "num_rows", "num_tokens", "num_targets", "digest"}
    return {name: value for name, value in footer.items() if name not in counts}

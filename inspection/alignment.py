"""The rows that two stores have in common, side by side, streamed. Imports no torch.

Rows correspond where they are the same row of the same data file; where each store has a file that the other lacks, and
row ids are the user's own in both, where their ids are equal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import pyarrow as pa

from inspection.provenance import Span, spans
from inspection.reading import sound_tables
from shared.score_store import Manifest
from shared.shards import MOST_TURNS, Shard, row_keys

Correspondence = Literal["row of the data file", "row_id"]

_BLOCK_TOKENS = 2**24
"""Tokens of the second store that are held at once where rows are found by their ids."""

_SpanPair = tuple[Span, Span]
_Pairs = Iterator[tuple[pa.Table, pa.Table]]


@dataclass(frozen=True)
class OpenStore:
    """A finished store, opened."""

    manifest: Manifest
    shards: Sequence[Shard]


def correspondence(left: OpenStore, right: OpenStore) -> Correspondence | None:
    """By what the rows of two stores are matched; None where nothing says which row is which."""
    files, others = (_spans_by_content(store).keys() for store in (left, right))
    if files and others and (files <= others or others <= files):
        return "row of the data file"
    if left.manifest.user_row_ids and right.manifest.user_row_ids:
        return "row_id"
    return "row of the data file" if files & others else None


def aligned(left: OpenStore, right: OpenStore, by: Correspondence) -> _Pairs:
    """Tables of equally many rows, row i of the one corresponding to row i of the other.

    Raises:
        UserError: a store is damaged.
    """
    if by == "row_id":
        yield from _by_row_id(left, right)
        return
    for run in _ascending_runs(_common_spans(left, right)):
        # Both are numbered as the left store numbers them.
        left_keys = _keys([span for span, _ in run], [span for span, _ in run])
        right_keys = _keys([span for _, span in run], [span for span, _ in run])
        yield from _merged(
            _keyed(left, run[0][0].first, run[-1][0].stop, left_keys),
            _keyed(right, run[0][1].first, run[-1][1].stop, right_keys),
        )


def _common_spans(left: OpenStore, right: OpenStore) -> list[_SpanPair]:
    """Spans of equal files, in the order of the left store, each pair cut to the rows that both have.

    A file that both list equally often is matched first with first; where one lists it more often (as a merged store
    may), each of its spans with each of the other's.
    """
    spans_of = [_spans_by_content(store) for store in (left, right)]
    pairs: list[_SpanPair] = []
    for sha256 in spans_of[0].keys() & spans_of[1].keys():
        ours, theirs = spans_of[0][sha256], spans_of[1][sha256]
        pairs += zip(ours, theirs, strict=True) if len(ours) == len(theirs) else product(ours, theirs)
    return sorted(map(_cut, pairs), key=lambda pair: (pair[0].first, pair[1].first))


def _cut(pair: _SpanPair) -> _SpanPair:
    """Without the rows that one store leaves out: their numbers are those of other rows in it."""
    left, right = pair
    num_rows = min(left.num_rows, right.num_rows)
    return replace(left, num_rows=num_rows), replace(right, num_rows=num_rows)


def _spans_by_content(store: OpenStore) -> dict[str, list[Span]]:
    found: dict[str, list[Span]] = {}
    for span in spans(store.manifest.source):
        found.setdefault(span.file.sha256, []).append(span)
    return found


def _ascending_runs(pairs: Sequence[_SpanPair]) -> list[list[_SpanPair]]:
    """The pairs cut where either store would have to go back: one run where the order of files is the same."""
    runs: list[list[_SpanPair]] = []
    for pair in pairs:
        if runs and all(pair[side].first >= runs[-1][-1][side].stop for side in (0, 1)):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return runs


def _keys(own: Sequence[Span], as_in: Sequence[Span]) -> Callable[[np.ndarray], np.ndarray]:
    """From source indices (int64, ascending) in some spans to those of the same rows in others; -1 outside."""
    firsts, stops = np.array([span.first for span in own]), np.array([span.stop for span in own])
    targets = np.array([span.first for span in as_in])

    def renumber(indices: np.ndarray) -> np.ndarray:
        place = np.maximum(np.searchsorted(firsts, indices, side="right") - 1, 0)
        inside = (indices >= firsts[place]) & (indices < stops[place])
        return np.where(inside, indices - firsts[place] + targets[place], -1)

    return renumber


_Keyed = tuple[np.ndarray, pa.Table]
"""Keys, int64 and ascending, and the rows that they belong to."""


def _keyed(store: OpenStore, first: int, stop: int, renumber: Callable[[np.ndarray], np.ndarray]) -> Iterator[_Keyed]:
    """The rows of a store in a range of source indices, row group by row group, those without a key left out."""
    for shard in store.shards:
        planned = store.manifest.source.rows_of_shard(shard.index)
        for table in sound_tables(store.manifest, shard) if planned.stop > first and planned.start < stop else ():
            indices = table.column("source_index").to_numpy()
            rows = np.where((indices >= first) & (indices < stop), renumber(indices), -1)
            keys = np.where(rows >= 0, rows * MOST_TURNS + row_keys(table) % MOST_TURNS, -1)
            if (keys < 0).any():
                table, keys = table.filter(pa.array(keys >= 0)), keys[keys >= 0]
            if len(keys):
                yield keys, table


def _merged(lefts: Iterator[_Keyed], rights: Iterator[_Keyed]) -> _Pairs:
    left, right = next(lefts, None), next(rights, None)
    while left is not None and right is not None:
        _, in_left, in_right = np.intersect1d(left[0], right[0], assume_unique=True, return_indices=True)
        if len(in_left):
            yield left[1].take(pa.array(in_left)), right[1].take(pa.array(in_right))
        last_left, last_right = left[0][-1], right[0][-1]
        if last_left <= last_right:
            left = next(lefts, None)
        if last_right <= last_left:
            right = next(rights, None)


def _by_row_id(left: OpenStore, right: OpenStore) -> _Pairs:
    """The left store is read once for each block of the right one."""
    for block in _blocks(right):
        row_of = {row_id: row for row, row_id in enumerate(block.column("row_id").to_pylist())}
        for shard in left.shards:
            for table in sound_tables(left.manifest, shard):
                found = [row_of.get(row_id, -1) for row_id in table.column("row_id").to_pylist()]
                in_right = np.array(found, dtype=np.int64)
                in_left = np.flatnonzero(in_right >= 0)
                if len(in_left):
                    yield table.take(pa.array(in_left)), block.take(pa.array(in_right[in_left]))


def _blocks(store: OpenStore) -> Iterator[pa.Table]:
    tables, num_tokens = [], 0
    for shard in store.shards:
        for table in sound_tables(store.manifest, shard):
            tables.append(table)
            num_tokens += len(table.column("input_ids").combine_chunks().flatten())
            if num_tokens >= _BLOCK_TOKENS:
                yield pa.concat_tables(tables)
                tables, num_tokens = [], 0
    if tables:
        yield pa.concat_tables(tables)

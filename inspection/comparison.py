"""Two score stores compared, streamed. Imports no torch unless there are decisions to compare.

Counts, means, largest differences and flips are exact at any size; quantiles come from a histogram with 2048 bins for
each doubling of |difference|, so they are off by at most 0.03 %.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from inspection.alignment import Correspondence, OpenStore, aligned, correspondence
from inspection.provenance import differing_meanings, differing_sources
from shared.shards import FlatColumn, flatten
from stage1_score.compare_scores import ColumnDifference, Flips, flips

_MOST_NAMED = 5
_DROPPED_BITS = 12
"""Bits of a float32 that a bin of the histogram disregards: 11 of the mantissa are left."""


@dataclass(frozen=True)
class Comparison:
    """How store B differs from store A."""

    fields: list[tuple[str, Any, Any]]
    """Fields (name, A, B) of identity and source that differ."""
    matched_by: Correspondence | None
    num_rows: tuple[int, int]
    """Of A and of B."""
    num_alone: tuple[int, int]
    """Rows of A and of B that have no counterpart."""
    num_matched: int
    """Pairs of rows that correspond."""
    num_compared: int
    """Those of them with the same ids and targets."""
    not_compared: list[str]
    """The first of the others, in words."""
    columns_of_one: tuple[list[str], list[str]]
    """Columns that only A, or only B, has."""
    differences: list[ColumnDifference]
    flips: list[Flips]

    @property
    def is_empty(self) -> bool:
        """Whether the stores mean the same and hold the same rows with the same numbers."""
        same_rows = self.num_rows == (self.num_compared, self.num_compared)
        return not self.fields and same_rows and not any(it.largest for it in self.differences)


def compare_stores(left: OpenStore, right: OpenStore, thresholds: list[float]) -> Comparison:
    """Compare two finished stores.

    Args:
        thresholds: smallest u = 1 - mass_rank that PriFT-mass keeps.

    Raises:
        UserError: a store is damaged.
    """
    columns = [store.manifest.identity.columns for store in (left, right)]
    common = [name for name in columns[0] if name in columns[1]]
    by = correspondence(left, right)
    tally = _Tally(common, thresholds, [store.manifest.source.num_rows for store in (left, right)])
    for ours, theirs in aligned(left, right, by) if by else ():
        tally.add(ours, theirs)
    manifests = left.manifest, right.manifest
    num_rows = [sum(shard.num_rows for shard in store.shards) for store in (left, right)]
    return Comparison(
        fields=differing_meanings(*manifests) + differing_sources(*manifests),
        matched_by=by,
        num_rows=(num_rows[0], num_rows[1]),
        num_alone=(num_rows[0] - int(tally.is_met[0].sum()), num_rows[1] - int(tally.is_met[1].sum())),
        num_matched=tally.num_matched,
        num_compared=tally.num_compared,
        not_compared=tally.not_compared,
        columns_of_one=([c for c in columns[0] if c not in common], [c for c in columns[1] if c not in common]),
        differences=[it.summary(name) for name, it in tally.spreads.items()] if tally.num_compared else [],
        flips=list(tally.flips.values()) if tally.num_compared else [],
    )


class _Tally:
    """What is counted of row pairs as they pass."""

    def __init__(self, columns: list[str], thresholds: list[float], num_source_rows: list[int]):
        self.is_met = [np.zeros(count, dtype=bool) for count in num_source_rows]
        """By source index of either store: a byte for each row, the only thing here that grows with the stores."""
        self.num_matched = self.num_compared = 0
        self.not_compared: list[str] = []
        self.spreads = {name: _Spread() for name in columns}
        asked = thresholds if "mass_rank" in columns else []
        self.flips = {threshold: Flips(threshold, 0, 0, 0) for threshold in asked}

    def add(self, left: pa.Table, right: pa.Table) -> None:
        """Add tables whose rows correspond."""
        self.num_matched += left.num_rows
        for is_met, table in zip(self.is_met, (left, right), strict=True):
            is_met[table.column("source_index").to_numpy()] = True
        is_same = self._same_content(left, right)
        self.num_compared += int(is_same.sum())
        if not is_same.all():
            left, right = left.filter(pa.array(is_same)), right.filter(pa.array(is_same))
        for name, spread in self.spreads.items():
            ours, theirs = (flatten(table.column(name)) for table in (left, right))
            ours_N, theirs_N = ours.values[ours.valid], theirs.values[theirs.valid]
            spread.add(theirs_N.astype(np.float64) - ours_N)
            if name == "mass_rank":
                for threshold, total in self.flips.items():
                    self.flips[threshold] = _added(total, flips(ours_N, theirs_N, threshold))

    def _same_content(self, left: pa.Table, right: pa.Table) -> np.ndarray:
        """bool (rows,): the same ids, and the same of them are targets. Names the first others."""
        is_same = _same_rows(flatten(left.column("input_ids")), flatten(right.column("input_ids")), by="values")
        same_targets = _same_rows(flatten(left.column("logprob")), flatten(right.column("logprob")), by="valid")
        for row in np.flatnonzero(~(is_same & same_targets))[: _MOST_NAMED - len(self.not_compared)].tolist():
            names = (f"{table.column('row_id')[row].as_py()!r} (source_index {table.column('source_index')[row]})"
                     for table in (left, right))  # fmt: skip
            what = "the same ids, other targets" if is_same[row] else "other ids"
            self.not_compared.append(f"A: {next(names)}, B: {next(names)}: {what}")
        return is_same & same_targets


@dataclass
class _Spread:
    """Differences of one column as they pass."""

    num_targets: int = 0
    signed_sum: float = 0.0
    largest: float = 0.0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(2 ** (31 - _DROPPED_BITS), dtype=np.int64))
    """Targets by the leading bits of |difference| in float32: sign left out, exponent, start of the mantissa."""

    def add(self, signed_N: np.ndarray) -> None:
        """Add differences, float64 (N,)."""
        if not len(signed_N):
            return
        sizes_N = np.abs(signed_N)
        self.num_targets += len(signed_N)
        self.signed_sum += float(signed_N.sum())
        self.largest = max(self.largest, float(sizes_N.max()))
        bins_N = sizes_N.astype(np.float32).view(np.int32) >> _DROPPED_BITS
        values, counts = np.unique(bins_N, return_counts=True)
        self.histogram[values] += counts

    def summary(self, column: str) -> ColumnDifference:
        """The differences so far; there is at least one."""
        median, p90, p99 = (self._quantile(share) for share in (0.5, 0.9, 0.99))
        return ColumnDifference(
            column, self.num_targets, median, p90, p99, self.largest, self.signed_sum / self.num_targets
        )

    def _quantile(self, share: float) -> float:
        """The middle of the bin that holds the smallest value which `share` of the targets do not exceed."""
        wanted = max(int(np.ceil(share * self.num_targets)), 1)
        found = int(np.searchsorted(np.cumsum(self.histogram), wanted))
        if not found:
            return 0.0
        middle = np.array((found << _DROPPED_BITS) + (1 << _DROPPED_BITS - 1), dtype=np.int32).view(np.float32)
        return min(float(middle), self.largest)


def _same_rows(left: FlatColumn, right: FlatColumn, by: str) -> np.ndarray:
    """bool (rows,): as many values in the row, and `by` (values or valid) of each the same."""
    is_same = left.lengths == right.lengths
    # What rows of unequal lengths hold is not compared; the rest stands in the same places.
    left_T, right_T = (getattr(flat, by)[np.repeat(is_same, flat.lengths)] for flat in (left, right))
    rows_T = np.repeat(np.flatnonzero(is_same), left.lengths[is_same])
    is_same[rows_T[left_T != right_T]] = False
    return is_same


def _added(total: Flips, more: Flips) -> Flips:
    return replace(
        total,
        num_targets=total.num_targets + more.num_targets,
        num_kept=total.num_kept + more.num_kept,
        num_flipped=total.num_flipped + more.num_flipped,
    )

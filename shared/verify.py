"""Invariants of scored rows, checked on whole row groups at a time. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from shared.errors import UserError, first_line
from shared.local_copies import kept_copy
from shared.places import Place
from shared.score_store import TARGET_WEIGHT, TARGET_WEIGHT_BOUNDS, Manifest, read_manifest
from shared.shards import MOST_TURNS, FlatColumn, Shard, flatten, open_store, read_batches, read_dropped, row_keys

_RANGES = {
    "logprob": (-np.inf, 0.0),
    "mass_rank": (0.0, 1.0),
    "entropy": (0.0, np.inf),
    "entropy_top20": (0.0, 3.0),
    "collision": (0.0, 1.0 + 1e-6),
    TARGET_WEIGHT: tuple(np.array(TARGET_WEIGHT_BOUNDS, np.float32).tolist()),
}
"""Closed range of each statistic; ln 20 = 2.9957."""


@dataclass(frozen=True)
class Verification:
    """Outcome of rereading a whole store."""

    num_rows: int
    num_targets: int
    problems: list[str]
    """What does not hold, the first offenders first; empty where all does."""


def verify_store(store: Place, most_problems: int = 10) -> Verification:
    """Reread every page and check every row of a finished store.

    Raises:
        UserError: there is no store, or none of this schema version.
    """
    num_rows = num_targets = 0
    problems: list[str] = []
    read_manifest(store)
    try:
        manifest, shards = open_store(store)
    except UserError as error:
        return Verification(0, 0, [str(error)])
    for shard in shards:
        try:
            if manifest.user_row_ids:
                kept_copy(shard.path)  # its ids are read again at the end
            indices = [np.zeros(0, np.int64)]
            for table in read_batches(shard):
                num_rows += table.num_rows
                num_targets += int(flatten(table.column("logprob")).valid.sum())
                problems += row_problems(table, manifest, shard)
                indices.append(table.column("source_index").to_numpy())
            problems += vanished_rows(shard, manifest, np.concatenate(indices))
        except UserError as error:
            problems.append(str(error))
        if len(problems) >= most_problems:
            break
    if manifest.user_row_ids and not problems:
        problems += _repeated_ids(shards)
    return Verification(num_rows, num_targets, problems[:most_problems])


def collected(rows: pl.LazyFrame, store: Place) -> pl.DataFrame:
    """The rows of a query on the shards of a store, by polars' streaming engine.

    Raises:
        UserError: polars cannot read a shard.
    """
    try:
        return rows.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{store}: {first_line(error)}: prift-inspect verify says more") from None


def row_problems(table: pa.Table, manifest: Manifest, shard: Shard) -> list[str]:
    """The first row of a table that breaks each invariant, in words."""
    for name in ("row_id", "source_index"):
        if table.column(name).null_count:
            return [f"{shard.path}: a row has no {name}"]
    row_ids, indices = table.column("row_id").to_pylist(), table.column("source_index").to_numpy()
    planned = manifest.source.rows_of_shard(shard.index)
    ids = flatten(table.column("input_ids"))
    found = [
        ("source_index is not ascending within the shard's source rows", _not_ascending(table, planned)),
        ("a token id is null or outside the vocabulary", _rows_of(ids, ~ids.valid | _outside(ids, manifest))),
    ]
    first = flatten(table.column("logprob"))
    for name in manifest.float_columns:
        flat = flatten(table.column(name))
        if not np.array_equal(flat.lengths, ids.lengths):
            found.append((f"{name} is not as long as input_ids", flat.lengths != ids.lengths))
            continue
        low, high = _RANGES[name]
        bad = flat.valid & ~(np.isfinite(flat.values) & (flat.values >= low) & (flat.values <= high))
        found.append((f"{name} is not finite or outside [{low:g}, {high:g}]", _rows_of(flat, bad)))
        if len(first.valid) == len(flat.valid):
            moved = _rows_of(flat, flat.valid != first.valid)
            found.append((f"{name} and logprob are scored at other positions", moved))
    if np.array_equal(first.lengths, ids.lengths):
        found += [("token 0 is a target", _first_is_target(first)), ("no target", ~_rows_of(first, first.valid))]
    return list(_described(found, row_ids, indices, shard))


def vanished_rows(shard: Shard, manifest: Manifest, scored: np.ndarray) -> list[str]:
    """Every source row is either in the shard or listed beside it with the reason, or, split into turns, both.

    Args:
        scored: `source_index` of the shard's rows, int64.

    Raises:
        UserError: the list of dropped rows is missing or damaged.
    """
    planned = manifest.source.rows_of_shard(shard.index)
    dropped = np.array([row["source_index"] for row in read_dropped(shard)], np.int64)
    if not manifest.identity.split_turns and len(scored) + len(dropped) != len(planned):
        return [f"{shard.path}: {len(scored)} rows and {len(dropped)} dropped ones are not the {len(planned)} planned"]
    found = np.unique(np.concatenate([scored, dropped]))
    lost = np.setdiff1d(np.arange(planned.start, planned.stop), found)
    if len(lost):
        return [f"{shard.path}: {len(lost)} source rows, the first {lost[0]}, are neither in it nor among the dropped"]
    if len(found) > len(planned):
        return [f"{shard.path}: its rows and dropped rows are of {len(found)} source rows, {len(planned)} are planned"]
    return []


def _described(
    found: list[tuple[str, np.ndarray]], row_ids: list[str], indices: np.ndarray, shard: Shard
) -> Iterator[str]:
    for what, is_bad in found:
        if is_bad.any():
            row = int(np.argmax(is_bad))
            yield f"{shard.path}: row {row_ids[row]!r} (source_index {indices[row]}): {what}"


def _not_ascending(table: pa.Table, planned: range) -> np.ndarray:
    indices, keys = table.column("source_index").to_numpy(), row_keys(table)
    outside = (indices < planned.start) | (indices >= planned.stop)
    if "turn" in table.column_names:
        turns = table.column("turn").fill_null(0).to_numpy()
        outside |= (turns < 0) | (turns >= MOST_TURNS - 1)
    return outside | np.concatenate([[False], np.diff(keys) <= 0])[: len(keys)]


def _outside(ids: FlatColumn, manifest: Manifest) -> np.ndarray:
    return (ids.values < 0) | (ids.values >= manifest.vocab_size)


def _rows_of(flat: FlatColumn, is_bad: np.ndarray) -> np.ndarray:
    """Rows (bool) in which any value is bad."""
    rows = np.repeat(np.arange(len(flat.lengths)), flat.lengths)
    return np.bincount(rows[is_bad], minlength=len(flat.lengths)) > 0


def _first_is_target(flat: FlatColumn) -> np.ndarray:
    starts = np.cumsum(flat.lengths) - flat.lengths
    is_bad = np.zeros(len(flat.lengths), dtype=bool)
    filled = flat.lengths > 0
    is_bad[filled] = flat.valid[starts[filled]]
    return is_bad


def _repeated_ids(shards: list[Shard]) -> list[str]:
    rows = pl.scan_parquet([kept_copy(shard.path) for shard in shards if shard.num_rows]).group_by("row_id").len()
    repeated = collected(rows.filter(pl.col("len") > 1).sort("row_id").head(10), shards[0].path.parent)
    return [
        f"row id {row_id!r} stands {count} times, though row ids are the user's own"
        for row_id, count in repeated.iter_rows()
    ]

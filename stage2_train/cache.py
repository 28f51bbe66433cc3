"""A score store as memory-mapped files: what training reads rows from, in any order, without decoding.

The store is converted once per content and node. One file per column, each renamed into place when it is whole;
processes of one node share the pages. While it converts, it verifies: every page, the digest of every shard and
the invariants of every row.
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from shared.errors import UserError
from shared.files import remove_stale_temporaries, replacing, sha256_of_json
from shared.places import Place
from shared.score_store import TARGET_WEIGHT, Manifest, read_manifest
from shared.shards import Shard, flatten, open_store, read_batches
from shared.verify import row_problems

_BASE_FILES = {"row_ends": np.int64, "input_ids": np.int32, "target_ends": np.int64, "target_positions": np.int32}
"""Name and dtype; `row_ends` and `target_ends` are cumulative counts, one per row."""


@dataclass(frozen=True)
class CachedRow:
    """One row of a store, as views of the memory map."""

    input_ids: np.ndarray
    """int32 (T,)."""
    target_positions: np.ndarray
    """int32 (N,)."""
    statistics: dict[str, np.ndarray]
    """float32 (N,) each; with the data's own weights, if any, as `target_weight`."""


class RowCounts:
    """How many values each row has, by its place in source order, looked up in cumulative counts.

    `counts[rows]` takes a slice or places (int64, any shape, none negative) and gives int64 of that shape.
    """

    def __init__(self, ends: np.ndarray):
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        places = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        assert places.dtype.kind == "i", places.dtype
        assert not (places < 0).any(), places
        return self._ends[places] - np.where(places > 0, self._ends[places - 1], 0)

    def sum(self) -> int:
        """Values of all rows."""
        return int(self._ends[-1])

    def slice_of(self, row: int) -> slice:
        """Where a row's values lie when those of all rows stand one after the other."""
        return slice(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))

    def num_rows_within(self, most: int) -> int:
        """How many of the first rows have at most so many values together."""
        return int(np.searchsorted(self._ends, most, side="right"))


class Counts(Protocol):
    """How many values each row has; see `RowCounts`."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray: ...

    def sum(self) -> int:
        """Values of all rows."""
        ...


class TrainingRows(Protocol):
    """What a run trains from: the rows of one store, or of several."""

    manifest: Manifest
    """Of the only or the first store: what training reads of it is the same for all."""
    key: str
    """Names the content of all rows, and in what proportion they are drawn."""

    @property
    def parts(self) -> list["ScoreCache"]:
        """The stores."""
        ...

    @property
    def lengths(self) -> Counts:
        """Tokens of each row."""
        ...

    @property
    def num_targets(self) -> Counts:
        """Targets of each row."""
        ...

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the statistics that a row has."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> CachedRow:
        """A row by its number."""
        ...

    def stored_rows(self, indices: Sequence[int], columns: Sequence[str]) -> list[dict[str, list]]:
        """Columns of some rows, read from the Parquet files themselves: slow, for messages and checks."""
        ...


class ScoreCache:
    """Rows of a finished store, in source order. All that grows with them is in the memory map."""

    def __init__(self, store: Place, manifest: Manifest, shards: Sequence[Shard], folder: Path, columns: Sequence[str]):
        self.store, self.manifest, self.shards, self.key = store, manifest, list(shards), folder.name
        base = {name: _map(folder, name, dtype) for name, dtype in _BASE_FILES.items()}
        self.columns = {name: _map(folder, name, np.float32) for name in columns}
        self._input_ids, self._target_positions = base["input_ids"], base["target_positions"]
        self.lengths = RowCounts(base["row_ends"])
        """Tokens of each row."""
        self.num_targets = RowCounts(base["target_ends"])
        """Targets of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def parts(self) -> list["ScoreCache"]:
        """The stores: this one."""
        return [self]

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the statistics that a row has."""
        return tuple(self.columns)

    @property
    def is_weighted(self) -> bool:
        """Whether rows carry the data's own weights, as the column `target_weight`."""
        return TARGET_WEIGHT in self.columns

    def row(self, index: int) -> CachedRow:
        """A row by its place in source order."""
        tokens, targets = self.lengths.slice_of(index), self.num_targets.slice_of(index)
        statistics = {name: column[targets] for name, column in self.columns.items()}
        return CachedRow(self._input_ids[tokens], self._target_positions[targets], statistics)

    def target_ids(self, most: int) -> np.ndarray:
        """int32 ids of the first targets of the store, at most so many rows' worth as hold `most` targets."""
        num_rows = max(self.num_targets.num_rows_within(most), 1)
        rows = (self.row(index) for index in range(num_rows))
        return np.concatenate([row.input_ids[row.target_positions] for row in rows])

    def stored_rows(self, indices: Sequence[int], columns: Sequence[str]) -> list[dict[str, list]]:
        """Columns of some rows, read from the Parquet files themselves: slow, for messages and checks."""
        wanted = np.array(indices, dtype=np.int64)
        ends = np.cumsum([shard.num_rows for shard in self.shards])
        shard_of = np.searchsorted(ends, wanted, side="right")
        rows: dict[int, dict[str, list]] = {}
        for place in np.unique(shard_of):
            table = pa.concat_tables(read_batches(self.shards[place], columns))
            inside = wanted[shard_of == place]
            first = int(ends[place]) - self.shards[place].num_rows
            rows |= dict(zip(inside.tolist(), table.take(inside - first).to_pylist(), strict=True))
        return [rows[index] for index in wanted.tolist()]


def open_cache(store: Place, columns: Sequence[str], cache_dir: Path, begun_with: str | None = None) -> ScoreCache:
    """Open the memory-mapped copy of a store, making what is missing of it first.

    Of the processes of a node one makes it while the others wait; a copy that was begun by a process that died is
    made anew.

    Args:
        columns: statistics to map; only these are converted.
        cache_dir: node-local folder; copies of several stores lie in it side by side.
        begun_with: key of the rows that a run began with: where the store grew since, only those are opened.

    Raises:
        UserError: the store is unfinished or damaged, or lacks a column.
    """
    manifest, shards = _shards_of(store, begun_with)
    if not sum(shard.num_rows for shard in shards):
        raise UserError(f"{store}: the store has no row: all were dropped, see its .dropped.jsonl files")
    for name in columns:
        if name not in manifest.identity.columns:
            have = list(manifest.identity.columns)
            raise UserError(f"{store}: expected the column {name}, which the rule reads; the store has {have}. "
                            f"Score again with score.columns=[{','.join([*have, name])}]")  # fmt: skip
    if manifest.source.weighted:
        columns = [*columns, TARGET_WEIGHT]
    folder = cache_dir / _key(manifest, shards)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        missing = [name for name in [*_BASE_FILES, *columns] if not _file(folder, name).exists()]
        if missing:
            remove_stale_temporaries(folder)
            _convert(manifest, shards, folder, missing)
    return ScoreCache(store, manifest, shards, folder, columns)


def _key(manifest: Manifest, shards: Sequence[Shard]) -> str:
    return sha256_of_json([manifest.fingerprint, [shard.digest for shard in shards]])[:32]


def _shards_of(store: Place, begun_with: str | None) -> tuple[Manifest, list[Shard]]:
    """All shards; or those that the store had before it grew, where a run began with them."""
    for count in read_manifest(store).source.shard_counts[:-1] if begun_with else ():
        manifest, shards = open_store(store, count)
        if _key(manifest, shards) == begun_with:
            return manifest, shards
    return open_store(store)


def _convert(manifest: Manifest, shards: Sequence[Shard], folder: Path, names: Sequence[str]) -> None:
    tokens = targets = 0
    with ExitStack() as stack:
        files = {}
        for name in names:
            temporary = stack.enter_context(replacing(_file(folder, name)))
            files[name] = stack.enter_context(temporary.open("wb"))
        for table in _sound_tables(manifest, shards):
            ids, first = flatten(table.column("input_ids")), flatten(table.column("logprob"))
            starts = np.cumsum(ids.lengths) - ids.lengths
            targets_per_row = np.add.reduceat(first.valid, starts) if len(starts) else np.zeros(0, np.int64)
            pieces = {
                "row_ends": tokens + np.cumsum(ids.lengths),
                "input_ids": ids.values,
                "target_ends": targets + np.cumsum(targets_per_row),
                "target_positions": np.flatnonzero(first.valid) - np.repeat(starts, ids.lengths)[first.valid],
            }
            for name, file in files.items():
                if name in pieces:
                    file.write(pieces[name].astype(_BASE_FILES[name]).tobytes())
                else:
                    flat = flatten(table.column(name))
                    file.write(flat.values[flat.valid].astype(np.float32).tobytes())
            tokens, targets = tokens + len(ids.values), targets + int(first.valid.sum())


def _sound_tables(manifest: Manifest, shards: Sequence[Shard]) -> Iterator[pa.Table]:
    """The row groups of a store in order, every one verified."""
    for shard in shards:
        for table in read_batches(shard):
            problems = row_problems(table, manifest, shard)
            if problems:
                raise UserError(problems[0])
            yield table


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _map(folder: Path, name: str, dtype: type) -> np.ndarray:
    # As a plain array: every slice of an np.memmap is an np.memmap again, several times slower to make.
    return np.asarray(np.memmap(_file(folder, name), dtype=dtype, mode="r"))

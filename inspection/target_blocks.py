"""Targets of a store, some hundred thousand at a time. Shape suffix: N targets of a block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import UserError
from shared.score_store import Manifest
from shared.shards import Shard, flatten, read_batches
from shared.verify import row_problems

_LEAST_TARGETS_OF_A_BLOCK = 200_000


@dataclass(frozen=True)
class TargetBlock:
    """Targets of some rows."""

    ids_N: np.ndarray
    place_N: np.ndarray
    """Number of targets of the same row before it."""
    columns: dict[str, np.ndarray]

    @property
    def prob_N(self) -> np.ndarray:
        """p, float64."""
        return np.exp(self.columns["logprob"].astype(np.float64))

    @property
    def u_N(self) -> np.ndarray:
        """1 - mass_rank, float64."""
        return 1.0 - self.columns["mass_rank"].astype(np.float64)


def target_blocks(manifest: Manifest, shards: Sequence[Shard]) -> Iterator[TargetBlock]:
    """Targets of whole rows, about 200,000 at a time.

    Raises:
        UserError: a page, a digest or an invariant of a row does not hold.
    """
    names = manifest.float_columns
    waiting: list[TargetBlock] = []
    for shard in shards:
        for table in read_batches(shard):
            if problems := row_problems(table, manifest, shard):
                raise UserError(problems[0])
            ids, first = flatten(table.column("input_ids")), flatten(table.column("logprob"))
            row_N = np.repeat(np.arange(len(ids.lengths)), ids.lengths)[first.valid]
            before = np.cumsum(np.bincount(row_N, minlength=len(ids.lengths)))
            place_N = np.arange(len(row_N)) - np.concatenate([[0], before])[row_N]
            columns = {name: flatten(table.column(name)).values[first.valid] for name in names}
            waiting.append(TargetBlock(ids.values[first.valid], place_N, columns))
            if sum(len(block.ids_N) for block in waiting) >= _LEAST_TARGETS_OF_A_BLOCK:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: Sequence[TargetBlock]) -> TargetBlock:
    columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in blocks[0].columns}
    ids_N, place_N = (np.concatenate([getattr(block, name) for block in blocks]) for name in ("ids_N", "place_N"))
    return TargetBlock(ids_N, place_N, columns)

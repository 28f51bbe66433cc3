"""From rows of the cache to the tensors of a micro-batch.

Shape suffixes: N targets of the micro-batch that this rank holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.padding import PackedBatch, TokenBatch, pack_and_shift, pad_and_shift
from stage2_train.cache import CachedRow, TrainingRows
from stage2_train.plan import MicroBatch
from stage2_train.sequence_parallel import split


@dataclass(frozen=True)
class BatchForm:
    """How micro-batches are laid out."""

    packed: bool = False
    """Examples end to end, without padding."""
    part: int = 0
    """Which part of each micro-batch this rank holds, in [0, num_parts)."""
    num_parts: int = 1
    """Ranks that share a micro-batch (sequence parallel); more than 1 only where packed."""


@dataclass(frozen=True)
class Batch:
    """This rank's part of a micro-batch."""

    tokens: TokenBatch
    places_N: Tensor
    """int64: the place in the step's list of rows that each target belongs to."""
    positions_N: Tensor
    """int64: each target's position in its row."""
    prior: dict[str, Tensor]
    """The prior's statistics of the targets, float32 (N,) each."""
    is_stop_token_N: Tensor
    """bool."""
    num_tokens: int
    """Of the whole micro-batch, padding not counted; 0 where it only keeps other ranks company, and on all but the
    first of the ranks that share it."""
    num_targets: int
    """Of the whole micro-batch."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        prior = {name: move(values) for name, values in self.prior.items()}
        return Batch(
            self.tokens.to(device), move(self.places_N), move(self.positions_N), prior, move(self.is_stop_token_N),
            self.num_tokens, self.num_targets,
        )  # fmt: skip


def make_batch(
    cache: TrainingRows,
    rows: np.ndarray,
    micro_batch: MicroBatch,
    stop_token_ids: Sequence[int],
    form: BatchForm = BatchForm(),
) -> Batch:
    """Tensors of one micro-batch, on the CPU.

    Args:
        rows: the rows of the step.
        micro_batch: places in `rows`. Empty: the step's first row without targets, which gives zero loss and
            zero gradient while every rank runs the same number of forward passes.
    """
    members = [cache.row(int(rows[place])) for place in micro_batch] or [_without_targets(cache.row(int(rows[0])))]
    tokens: TokenBatch = pack_and_shift(members) if form.packed else pad_and_shift(members)
    held = slice(None)
    if form.num_parts > 1:
        assert isinstance(tokens, PackedBatch)
        tokens, held = split(tokens, form.part, form.num_parts)
    counts = [len(member.target_positions) for member in members]
    places = np.repeat(np.array(micro_batch or [0], dtype=np.int64), counts)[held]
    positions = np.concatenate([member.target_positions for member in members]).astype(np.int64)[held]
    prior = {
        name: torch.from_numpy(np.concatenate([member.statistics[name] for member in members])[held])
        for name in cache.column_names
    }
    is_stop_token_N = torch.isin(tokens.target_ids_N, torch.tensor(list(stop_token_ids), dtype=torch.int64))
    num_tokens = sum(len(member.input_ids) for member in members) if micro_batch and form.part == 0 else 0
    return Batch(
        tokens, torch.from_numpy(places), torch.from_numpy(positions), prior, is_stop_token_N, num_tokens, sum(counts)
    )


def _without_targets(row: CachedRow) -> CachedRow:
    statistics = {name: values[:0] for name, values in row.statistics.items()}
    return CachedRow(row.input_ids, row.target_positions[:0], statistics)

"""From rows of the cache to the tensors of a micro-batch.

Shape suffixes: N targets of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.padding import PaddedBatch, pad_and_shift
from stage2_train.cache import CachedRow, ScoreCache
from stage2_train.plan import MicroBatch


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device."""

    tokens: PaddedBatch
    places_N: Tensor
    """int64: the place in the step's list of rows that each target belongs to."""
    prior: dict[str, Tensor]
    """The prior's statistics of the targets, float32 (N,) each."""
    is_stop_token_N: Tensor
    """bool."""
    num_tokens: int
    """Padding not counted; 0 for a micro-batch that only keeps other ranks company."""

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.places_N)


def make_batch(
    cache: ScoreCache, rows: np.ndarray, micro_batch: MicroBatch, stop_token_ids: Sequence[int], device: torch.device
) -> Batch:
    """Tensors of one micro-batch.

    Args:
        rows: the rows of the step.
        micro_batch: places in `rows`. Empty: the step's first row without targets, which gives zero loss and
            zero gradient while every rank runs the same number of forward passes.
    """
    members = [cache.row(int(rows[place])) for place in micro_batch] or [_without_targets(cache.row(int(rows[0])))]
    tokens = pad_and_shift(members)
    counts = [len(member.target_positions) for member in members]
    places = np.repeat(np.array(micro_batch or [0], dtype=np.int64), counts)
    prior = {
        name: torch.from_numpy(np.concatenate([member.statistics[name] for member in members])).to(device)
        for name in cache.columns
    }
    is_stop_token_N = torch.isin(tokens.target_ids_N, torch.tensor(list(stop_token_ids), dtype=torch.int64))
    num_tokens = sum(len(member.input_ids) for member in members) if micro_batch else 0
    return Batch(tokens.to(device), torch.from_numpy(places).to(device), prior, is_stop_token_N.to(device), num_tokens)


def _without_targets(row: CachedRow) -> CachedRow:
    statistics = {name: values[:0] for name, values in row.statistics.items()}
    return CachedRow(row.input_ids, row.target_positions[:0], statistics)

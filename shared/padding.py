"""Padded batches, and the one shift: which hidden state predicts which target.

Shape suffixes: B examples, T tokens of the longest, N targets of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class HasTargets(Protocol):
    """Token ids with the positions of their targets."""

    @property
    def input_ids(self) -> np.ndarray:
        """int32 (T,)."""
        ...

    @property
    def target_positions(self) -> np.ndarray:
        """int32 (N,), ascending, each in [1, T)."""
        ...


@dataclass(frozen=True)
class PaddedBatch:
    """Examples padded on the right, and their targets in the order of the examples."""

    input_ids_BT: Tensor
    """int64."""
    hidden_rows_N: Tensor
    """int64: rows of the hidden states, flattened to (B * T, D), that predict the targets."""
    target_ids_N: Tensor
    """int64."""

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """The batch on a device."""
        return PaddedBatch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.hidden_rows_N.to(device, non_blocking=True),
            self.target_ids_N.to(device, non_blocking=True),
        )


def pad_and_shift(examples: Sequence[HasTargets]) -> PaddedBatch:
    """Pad examples on the right with id 0 and find the hidden states of their targets.

    The hidden state at position i - 1 speaks of token i, so the target at position i of example b is predicted by
    row b * T + i - 1. No other code shifts.

    Example: ids [5, 6, 7] with targets at 1 and 2 give rows [0, 1] and target ids [6, 7].
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    rows, targets = [], []
    for index, example in enumerate(examples):
        input_ids_BT[index, : len(example.input_ids)] = torch.from_numpy(example.input_ids.astype(np.int64))
        rows.append(example.target_positions.astype(np.int64) - 1 + index * longest)
        targets.append(example.input_ids[example.target_positions].astype(np.int64))
    return PaddedBatch(input_ids_BT, torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(targets)))

"""Batches, padded or laid end to end, and the one shift: which hidden state predicts which target.

Shape suffixes: B rows of a batch, T tokens of a row, E examples, N targets of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

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
class Boundaries:
    """Where the examples of a packed row begin and end."""

    position_ids_BT: Tensor
    """int64 (1, T): counted from 0 in each example."""
    starts: Tensor
    """int32 (E + 1,): first token of each example, and T at the end."""
    longest: int
    """Tokens of the longest example; a number of the host, so that no attention layer has to wait for the device."""

    def to(self, device: torch.device | str) -> "Boundaries":
        """The boundaries on a device."""
        return Boundaries(
            self.position_ids_BT.to(device, non_blocking=True), self.starts.to(device, non_blocking=True), self.longest
        )

    def model_arguments(self) -> dict[str, Any]:
        """Arguments of a transformers base model; it hands the last four to each attention layer."""
        return {
            "position_ids": self.position_ids_BT,
            "cu_seq_lens_q": self.starts,
            "cu_seq_lens_k": self.starts,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


@dataclass(frozen=True)
class PaddedBatch:
    """Examples padded on the right, a row each, and their targets in the order of the examples."""

    input_ids_BT: Tensor
    """int64; T is the length of the longest."""
    hidden_rows_N: Tensor
    """int64: rows of the hidden states, flattened to (B * T, D), that predict the targets."""
    target_ids_N: Tensor
    """int64."""
    boundaries: ClassVar[None] = None

    def to(self, device: torch.device | str) -> "PaddedBatch":
        """The batch on a device."""
        return PaddedBatch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.hidden_rows_N.to(device, non_blocking=True),
            self.target_ids_N.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PackedBatch:
    """Examples laid end to end in one row, and their targets in the order of the examples."""

    input_ids_BT: Tensor
    """int64 (1, T); T is the sum of the lengths."""
    hidden_rows_N: Tensor
    """int64: rows of the hidden states, flattened to (T, D), that predict the targets."""
    target_ids_N: Tensor
    """int64."""
    boundaries: Boundaries

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch on a device."""
        return PackedBatch(
            self.input_ids_BT.to(device, non_blocking=True),
            self.hidden_rows_N.to(device, non_blocking=True),
            self.target_ids_N.to(device, non_blocking=True),
            self.boundaries.to(device),
        )


TokenBatch = PaddedBatch | PackedBatch


def pad_and_shift(examples: Sequence[HasTargets]) -> PaddedBatch:
    """Pad examples on the right with id 0 and find the hidden states of their targets.

    Example: ids [5, 6] with a target at 1 and ids [7, 8, 9] with a target at 2 give rows [0, 4], target ids [6, 9].
    """
    longest = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch.zeros(len(examples), longest, dtype=torch.int64)
    for index, example in enumerate(examples):
        input_ids_BT[index, : len(example.input_ids)] = torch.from_numpy(example.input_ids.astype(np.int64))
    return PaddedBatch(input_ids_BT, *_shift(examples, longest * np.arange(len(examples))))


def pack_and_shift(examples: Sequence[HasTargets]) -> PackedBatch:
    """Lay examples end to end and find the hidden states of their targets.

    The last token of an example predicts nothing: its neighbour to the right belongs to another example.

    Example: ids [5, 6] with a target at 1 and ids [7, 8, 9] with a target at 2 give rows [0, 3], target ids [6, 9].
    """
    lengths = [len(example.input_ids) for example in examples]
    starts = np.cumsum([0, *lengths])
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    boundaries = Boundaries(torch.from_numpy(positions)[None], torch.from_numpy(starts.astype(np.int32)), max(lengths))
    return PackedBatch(torch.from_numpy(ids)[None], *_shift(examples, starts[:-1]), boundaries)


def _shift(examples: Sequence[HasTargets], starts: np.ndarray) -> tuple[Tensor, Tensor]:
    """Rows of the flattened hidden states that predict the targets, and the targets' ids; int64 (N,) each.

    The hidden state at position i - 1 speaks of token i, so the target at position i of an example whose first token
    is row `start` is predicted by row start + i - 1. No other code shifts.
    """
    rows = [
        start + example.target_positions.astype(np.int64) - 1 for example, start in zip(examples, starts, strict=True)
    ]
    ids = [example.input_ids[example.target_positions].astype(np.int64) for example in examples]
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(ids))

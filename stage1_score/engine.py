"""What stage 1 asks of an engine, whichever runs the prior."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from shared.errors import UserError
from shared.score_store import TARGET_WEIGHT
from shared.shards import ScoredRow
from stage1_score.tokenization import TokenizedExample


class DeviceLost(UserError):
    """The device of this process fails: another process with another device may go on."""


def device_errors() -> tuple[type[Exception], ...]:
    """What torch raises where a device fails: the process cannot use it again."""
    import torch

    return (torch.AcceleratorError,) if hasattr(torch, "AcceleratorError") else ()


class Engine(Protocol):
    """The prior, ready to score."""

    def describe(self) -> dict[str, str]:
        """Engine, versions, device and attention backend, for the footers of the shards."""
        ...

    def score(
        self, examples: Sequence[TokenizedExample], on_batch: Callable[[int, int], None] = lambda rows, tokens: None
    ) -> list[ScoredRow]:
        """Statistics of all targets.

        Args:
            examples: any number, in any order of lengths.
            on_batch: called with the examples and tokens (padding not counted) of each batch that was handed to the
                device.

        Returns:
            One row per example, in order.

        Raises:
            UserError: a statistic is not finite; names the row.
        """
        ...

    def close(self) -> None:
        """End the engine's own processes, if it has any."""
        ...


def scored_row(example: TokenizedExample, columns: Sequence[str], values_CN: np.ndarray) -> ScoredRow:
    """An example with its statistics.

    Args:
        values_CN: float32, one row per column, one value per target.

    Raises:
        UserError: a statistic is not finite; names the row.
    """
    finite_N = np.isfinite(values_CN).all(axis=0)
    if not finite_N.all():
        position = example.target_positions[int(np.argmin(finite_N))]
        raise UserError(
            f"row {example.row_id!r} (source_index {example.source_index}): the prior gives a number that is not "
            f"finite to token {position}; try prior.dtype=float32"
        )
    statistics = {column: values_CN[index] for index, column in enumerate(columns)}
    if example.target_weights is not None:
        statistics[TARGET_WEIGHT] = example.target_weights
    return ScoredRow(
        example.row_id, example.source_index, example.input_ids, example.target_positions, statistics, example.turn
    )

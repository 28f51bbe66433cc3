"""What stage 1 asks of an engine, whichever runs the prior."""

from collections.abc import Callable, Sequence
from typing import Protocol

from shared.shards import ScoredRow
from stage1_score.tokenization import TokenizedExample


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

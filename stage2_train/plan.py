"""Which examples make up each optimizer step, and how they are dealt to ranks: pure functions, no torch.

The examples of a step depend on the number of rows, the seed, the epoch and the global batch alone: they are the
same at any world size, and the cursor of a run is one integer, the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.batching import bounded_batches, longest_first
from shared.errors import UserError

MicroBatch = tuple[int, ...]
"""Places (0-based) in the list of a step's rows; empty where a rank only keeps the others company."""


@dataclass(frozen=True)
class Plan:
    """The order of examples of a whole run."""

    num_rows: int
    batch_size: int
    num_steps: int
    seed: int

    def rows_of_step(self, step: int) -> np.ndarray:
        """Rows (int64, batch_size of them) of a step, steps counted from 1."""
        steps_per_epoch = self.num_rows // self.batch_size
        epoch, place = divmod(step - 1, steps_per_epoch)
        start = place * self.batch_size
        return _order(self.num_rows, self.seed, epoch)[start : start + self.batch_size]


def make_plan(num_rows: int, batch_size: int, epochs: int, max_steps: int | None, seed: int) -> Plan:
    """The plan of a run; the last partial batch of each epoch is dropped.

    Raises:
        UserError: fewer rows than one batch.
    """
    if num_rows < batch_size:
        raise UserError(f"train.batch_size={batch_size} examples per step, but the store has {num_rows} rows: lower it")
    num_steps = num_rows // batch_size * epochs
    return Plan(num_rows, batch_size, min(num_steps, max_steps or num_steps), seed)


@lru_cache(maxsize=2)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return generator.permutation(num_rows)


def deal(
    lengths: Sequence[int], world_size: int, max_tokens: int, max_examples: int | None, keep_groups: bool = False
) -> list[list[MicroBatch]]:
    """Cut a step's examples into micro-batches and deal them to ranks.

    Args:
        lengths: tokens of each of the step's examples.
        max_tokens: bound on a micro-batch's padded size; a longer example goes alone.
        max_examples: bound on its examples.
        keep_groups: cut neighbours of the step's order, whatever their lengths, and never split a group for
            the sake of the ranks: needed where the loss is a mean over micro-batches.

    Returns:
        A list of micro-batches for each rank, equally many, balanced by padded size. Every example stands in
        exactly one.
    """
    order = list(range(len(lengths))) if keep_groups else longest_first(lengths)
    batches = bounded_batches(lengths, order, max_tokens, max_examples)
    while len(batches) % world_size and not keep_groups:
        largest = max(batches, key=lambda batch: (len(batch) > 1, _cost(batch, lengths)))
        if len(largest) == 1:
            break
        batches.remove(largest)
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    batches.sort(key=lambda batch: _cost(batch, lengths), reverse=True)
    batches += [[]] * (-len(batches) % world_size)
    ranks: list[list[MicroBatch]] = [[] for _ in range(world_size)]
    for start in range(0, len(batches), world_size):
        dealt = [tuple(batch) for batch in batches[start : start + world_size]]
        # There and back again: the rank that got the largest of one round gets the smallest of the next.
        for rank, batch in enumerate(dealt if start // world_size % 2 == 0 else reversed(dealt)):
            ranks[rank].append(batch)
    return ranks


def _cost(batch: Sequence[int], lengths: Sequence[int]) -> int:
    return len(batch) * max((lengths[index] for index in batch), default=0)

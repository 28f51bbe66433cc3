"""Which examples make up each optimizer step, and how they are dealt to ranks: pure functions, no torch.

The examples of a step depend on the number of rows, the seed, the epoch and the global batch alone: they are the
same at any world size, and the cursor of a run is one integer, the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.batching import best_fit_packs, bounded_batches, bounded_packs, even_packs, longest_first
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


def order_of_rows(num_rows: int, seed: int, epoch: int, store: int = 0) -> np.ndarray:
    """The rows of one store in the order of an epoch, int64.

    Args:
        store: place of the store among those of the run; the first is drawn from as if it were alone.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, store]))
    return generator.permutation(num_rows)


_order = lru_cache(maxsize=2)(order_of_rows)


@dataclass(frozen=True)
class Bounds:
    """How a step's examples are cut into micro-batches."""

    max_tokens: int
    """Bound on a micro-batch's size, padding included; a longer example goes alone."""
    max_examples: int | None = None
    """Bound on its examples."""
    keep_groups: bool = False
    """Cut neighbours of the step's order, whatever their lengths, and never split a group for the sake of the ranks:
    needed where the loss is a mean over micro-batches."""
    packed: bool = False
    """Examples are laid end to end: a micro-batch's size is the sum of their lengths, not their number times the
    longest."""
    attention_tokens: int = 1 << 62
    """Length at which a token's attention costs as much as all else that is done for it, in packed batches."""


def deal(lengths: Sequence[int], num_ranks: int, bounds: Bounds) -> list[list[MicroBatch]]:
    """Cut a step's examples into micro-batches and deal them to ranks.

    Packed micro-batches are as few as best-fit packing needs, made as many as the ranks divide, and then filled
    evenly by cost. Padded ones hold examples of like length.

    Args:
        lengths: tokens of each of the step's examples.
        num_ranks: how many share the step; ranks that hold parts of the same micro-batches count as one.

    Returns:
        A list of micro-batches for each rank, equally many, balanced by cost. Every example stands in exactly one.
    """
    batches = _cut(lengths, num_ranks, bounds)
    costs = {id(batch): _cost(batch, lengths, bounds) for batch in batches}
    batches.sort(key=lambda batch: costs[id(batch)], reverse=True)
    batches += [[]] * (-len(batches) % num_ranks)
    ranks: list[list[MicroBatch]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(batches), num_ranks):
        dealt = [tuple(batch) for batch in batches[start : start + num_ranks]]
        # There and back again: the rank that got the largest of one round gets the smallest of the next.
        for rank, batch in enumerate(dealt if start // num_ranks % 2 == 0 else reversed(dealt)):
            ranks[rank].append(batch)
    return ranks


def _cut(lengths: Sequence[int], num_ranks: int, bounds: Bounds) -> list[list[int]]:
    """Micro-batches, as many as the ranks divide where the examples allow it."""
    if bounds.keep_groups:
        cut = bounded_packs if bounds.packed else bounded_batches
        return cut(lengths, range(len(lengths)), bounds.max_tokens, bounds.max_examples)
    order = longest_first(lengths)
    if not bounds.packed:
        return _split_for_ranks(
            bounded_batches(lengths, order, bounds.max_tokens, bounds.max_examples), lengths, num_ranks, bounds
        )
    fewest = best_fit_packs(lengths, order, bounds.max_tokens, bounds.max_examples)
    num_packs = min(len(lengths), len(fewest) + -len(fewest) % num_ranks)
    costs = [_cost([index], lengths, bounds) for index in range(len(lengths))]
    even = even_packs(lengths, costs, order, num_packs, bounds.max_tokens, bounds.max_examples)
    return even or _split_for_ranks(fewest, lengths, num_ranks, bounds)


def _split_for_ranks(
    batches: list[list[int]], lengths: Sequence[int], num_ranks: int, bounds: Bounds
) -> list[list[int]]:
    """Halve the costliest micro-batches until the ranks divide their number, or none can be halved."""
    batches = list(batches)
    while len(batches) % num_ranks:
        largest = max(batches, key=lambda batch: (len(batch) > 1, _cost(batch, lengths, bounds)))
        if len(largest) == 1:
            break
        batches.remove(largest)
        batches += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return batches


def _cost(batch: Sequence[int], lengths: Sequence[int], bounds: Bounds) -> float:
    """Work of a micro-batch, in tokens."""
    if not bounds.packed:
        return len(batch) * max((lengths[index] for index in batch), default=0)
    return sum(lengths[index] * (1 + lengths[index] / bounds.attention_tokens) for index in batch)

"""Grouping examples into batches of bounded size. Imports no torch."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def bounded_batches(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, max_examples: int | None = None
) -> list[list[int]]:
    """Cut an order of examples into batches whose padded size stays within a bound.

    Args:
        lengths: tokens of each example.
        order: indices into `lengths`; a batch holds neighbours of this order. Sorted by length it pads least.
        max_tokens: bound on examples times the longest length; an example longer than that goes alone.
        max_examples: bound on the examples of a batch.

    Returns:
        Lists of indices; every index of `order` stands in exactly one, in order.

    Example: lengths [5, 9, 4], order [1, 0, 2], max_tokens 18 gives [[1, 0], [2]].
    """
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        size = len(batches[-1]) + 1 if batches else 1
        if not batches or size * longest > max_tokens or (max_examples is not None and size > max_examples):
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def bounded_packs(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, max_examples: int | None = None
) -> list[list[int]]:
    """Cut an order of examples into batches that are laid end to end: as `bounded_batches`, the bound is on the sum.

    Example: lengths [5, 9, 4], order [1, 0, 2], max_tokens 14 gives [[1, 0], [2]].
    """
    batches: list[list[int]] = []
    num_tokens = 0
    for index in order:
        num_tokens += lengths[index]
        if not batches or num_tokens > max_tokens or (max_examples is not None and len(batches[-1]) >= max_examples):
            batches.append([])
            num_tokens = lengths[index]
        batches[-1].append(index)
    return batches


def best_fit_packs(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, max_examples: int | None = None
) -> list[list[int]]:
    """Pack examples into few batches that are laid end to end: each goes where it leaves the least room.

    Args:
        order: indices into `lengths`; longest first packs best.
        max_tokens: bound on the sum of a batch's lengths; a longer example goes alone.
        max_examples: bound on its examples.

    Example: lengths [5, 9, 4], order [1, 0, 2], max_tokens 13 gives [[1, 2], [0]].
    """
    batches: list[list[int]] = []
    # (room, batch) of the batches that take more examples, by rising room.
    open_batches: list[tuple[int, int]] = []
    for index in order:
        place = bisect_left(open_batches, (lengths[index], -1))
        if place < len(open_batches):
            room, chosen = open_batches.pop(place)
        else:
            room, chosen = max_tokens, len(batches)
            batches.append([])
        batches[chosen].append(index)
        if max_examples is None or len(batches[chosen]) < max_examples:
            insort(open_batches, (room - lengths[index], chosen))
    return batches


def even_packs(
    lengths: Sequence[int],
    costs: Sequence[float],
    order: Sequence[int],
    num_packs: int,
    max_tokens: int,
    max_examples: int | None = None,
) -> list[list[int]] | None:
    """Spread examples over so many batches that are laid end to end, all of about the same cost.

    Args:
        costs: work of each example; the batch of the least so far that has room takes the next.
        order: costliest first spreads best.

    Returns:
        None where an example finds no room; one longer than `max_tokens` takes a batch of its own.

    Example: lengths and costs [5, 9, 4], order [1, 0, 2], two batches of at most 13 tokens give [[1], [0, 2]].
    """
    batches: list[list[int]] = [[] for _ in range(num_packs)]
    rooms = [max_tokens] * num_packs
    # (cost, batch), the least first.
    by_cost = [(0.0, pack) for pack in range(num_packs)]

    def takes(pack: int, index: int) -> bool:
        is_full = max_examples is not None and len(batches[pack]) >= max_examples
        return not batches[pack] or (lengths[index] <= rooms[pack] and not is_full)

    for index in order:
        place = next((place for place, (_, pack) in enumerate(by_cost) if takes(pack, index)), None)
        if place is None:
            return None
        cost, pack = by_cost.pop(place)
        batches[pack].append(index)
        rooms[pack] -= lengths[index]
        insort(by_cost, (cost + costs[index], pack))
    return batches


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, ties in order: what does not fit into memory shows at once."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])

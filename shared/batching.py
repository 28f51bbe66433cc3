"""Grouping examples into batches of bounded size. Imports no torch."""

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


def bounded_packs(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut an order of examples into batches that are laid end to end: as `bounded_batches`, the bound is on the sum.

    Example: lengths [5, 9, 4], order [1, 0, 2], max_tokens 14 gives [[1, 0], [2]].
    """
    batches: list[list[int]] = []
    num_tokens = 0
    for index in order:
        num_tokens += lengths[index]
        if not batches or num_tokens > max_tokens:
            batches.append([])
            num_tokens = lengths[index]
        batches[-1].append(index)
    return batches


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Indices by falling length, ties in order: what does not fit into memory shows at once."""
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])

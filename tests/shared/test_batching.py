"""Batches of bounded size."""

import random
from itertools import pairwise

import pytest

from shared.batching import bounded_batches, bounded_packs, longest_first


def test_examples_of_the_docstrings():
    assert bounded_batches([5, 9, 4], [1, 0, 2], 18) == [[1, 0], [2]]
    assert bounded_packs([5, 9, 4], [1, 0, 2], 14) == [[1, 0], [2]]


@pytest.mark.parametrize("max_examples", [None, 1, 3])
@pytest.mark.parametrize("max_tokens", [1, 16, 40, 10_000])
def test_every_index_once_in_order_and_within_the_bounds(max_tokens: int, max_examples: int | None):
    chance = random.Random(max_tokens)
    lengths = [chance.randint(1, 20) for _ in range(60)]
    order = chance.sample(range(60), 50)
    batches = bounded_batches(lengths, order, max_tokens, max_examples)
    assert [index for batch in batches for index in batch] == order
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
        assert max_examples is None or len(batch) <= max_examples
    # No two neighbours would have fitted together: batches are as full as their order allows.
    for left, right in pairwise(batches):
        joined = [*left, right[0]]
        too_long = len(joined) * max(lengths[index] for index in joined) > max_tokens
        assert too_long or len(joined) > (max_examples or 99)


@pytest.mark.parametrize("max_tokens", [1, 16, 40, 10_000])
def test_packs_hold_real_tokens_up_to_the_bound(max_tokens: int):
    chance = random.Random(max_tokens)
    lengths = [chance.randint(1, 20) for _ in range(60)]
    order = chance.sample(range(60), 50)
    packs = bounded_packs(lengths, order, max_tokens)
    assert [index for pack in packs for index in pack] == order
    sizes = [sum(lengths[index] for index in pack) for pack in packs]
    assert all(len(pack) == 1 or size <= max_tokens for pack, size in zip(packs, sizes, strict=True))
    for size, following in zip(sizes, packs[1:], strict=False):
        assert size + lengths[following[0]] > max_tokens


@pytest.mark.parametrize("cut", [bounded_batches, bounded_packs])
def test_an_example_longer_than_the_bound_goes_alone(cut):
    assert cut([2, 50, 2], [0, 1, 2], 10) == [[0], [1], [2]]


@pytest.mark.parametrize("cut", [bounded_batches, bounded_packs])
def test_nothing_gives_no_batch(cut):
    assert cut([], [], 10) == []


def test_longest_first_keeps_ties_in_order():
    assert longest_first([3, 7, 3, 9, 7]) == [3, 1, 4, 0, 2]


def test_the_bound_itself_is_allowed():
    assert bounded_batches([3, 3, 3], [0, 1, 2], 9) == [[0, 1, 2]]
    assert bounded_batches([3, 3, 3], [0, 1, 2], 8) == [[0, 1], [2]]

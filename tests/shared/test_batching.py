"""Batches of bounded size."""

import random
from itertools import pairwise

import pytest

from shared.batching import best_fit_packs, bounded_batches, bounded_packs, even_packs, longest_first


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


@pytest.mark.parametrize("cut", [bounded_batches, bounded_packs, best_fit_packs])
def test_nothing_gives_no_batch(cut):
    assert cut([], [], 10) == []


def test_longest_first_keeps_ties_in_order():
    assert longest_first([3, 7, 3, 9, 7]) == [3, 1, 4, 0, 2]


def test_the_bound_itself_is_allowed():
    assert bounded_batches([3, 3, 3], [0, 1, 2], 9) == [[0, 1, 2]]
    assert bounded_batches([3, 3, 3], [0, 1, 2], 8) == [[0, 1], [2]]


@pytest.mark.parametrize("pack", ["best fit", "even"])
@pytest.mark.parametrize("max_examples", [None, 3])
def test_packs_hold_each_example_once_within_the_bounds(pack: str, max_examples: int | None):
    chance = random.Random(0)
    for _ in range(200):
        lengths = [chance.randint(1, 30) for _ in range(chance.randint(1, 40))]
        order, bound = longest_first(lengths), chance.randint(20, 60)
        packs = best_fit_packs(lengths, order, bound, max_examples)
        if pack == "even":
            packs = even_packs(lengths, lengths, order, len(packs) + 2, bound, max_examples)
            if packs is None:
                continue
        assert sorted(index for members in packs for index in members) == list(range(len(lengths)))
        for members in packs:
            assert len(members) <= (max_examples or len(lengths))
            assert len(members) <= 1 or sum(lengths[index] for index in members) <= bound


def test_best_fit_takes_the_fullest_batch_that_has_room():
    # 6 leaves 4 of 10, 7 leaves 3, and the 3 fills the latter.
    assert best_fit_packs([6, 7, 3, 4], [1, 0, 3, 2], 10) == [[1, 2], [0, 3]]
    assert best_fit_packs([50, 2, 2], [0, 1, 2], 10) == [[0], [1, 2]]


def test_best_fit_needs_no_more_batches_than_the_tokens_do():
    chance = random.Random(7)
    lengths = [chance.randint(20, 700) for _ in range(2000)]
    assert len(best_fit_packs(lengths, longest_first(lengths), 4096)) == -(-sum(lengths) // 4096)


def test_even_packs_spread_the_cost_and_say_where_there_is_no_room():
    assert even_packs([5, 9, 4], [5, 9, 4], [1, 0, 2], 2, 13) == [[1], [0, 2]]
    assert even_packs([5, 5, 5], [1, 1, 1], [0, 1, 2], 2, 9) is None
    assert even_packs([99, 5, 5], [9, 1, 1], [0, 1, 2], 2, 10) == [[0], [1, 2]]
    # By cost, not by length: the two that cost much part company.
    assert even_packs([2, 2, 9], [50, 40, 1], [0, 1, 2], 2, 20) == [[0], [1, 2]]

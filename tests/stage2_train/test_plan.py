"""The order of examples and their dealing: pure, complete, and the same for any number of ranks."""

import numpy as np
import pytest

from shared.errors import UserError
from stage2_train.plan import Bounds, deal, make_plan


def test_each_epoch_is_a_permutation_and_the_last_partial_batch_is_dropped():
    plan = make_plan(num_rows=23, batch_size=5, epochs=2, max_steps=None, seed=7)
    assert plan.num_steps == 8
    epochs = [np.concatenate([plan.rows_of_step(step) for step in steps]) for steps in (range(1, 5), range(5, 9))]
    for rows in epochs:
        assert len(set(rows.tolist())) == 20
        assert 0 <= min(rows) <= max(rows) < 23
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_plan_is_what_it_was():
    """Written out: a change of the generator would train other examples than a checkpoint expects."""
    plan = make_plan(num_rows=10, batch_size=4, epochs=1, max_steps=None, seed=3)
    assert [plan.rows_of_step(step).tolist() for step in (1, 2)] == [[6, 8, 4, 1], [3, 5, 9, 7]]
    assert make_plan(10, 4, 1, None, seed=4).rows_of_step(1).tolist() != [6, 8, 4, 1]


def test_max_steps_only_shortens():
    assert make_plan(100, 10, 1, 3, 0).num_steps == 3
    assert make_plan(100, 10, 1, 300, 0).num_steps == 10


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"batch_size=11 .* 10 rows"):
        make_plan(10, 11, 1, None, 0)


def size_of(batch: tuple[int, ...], lengths: list[int], packed: bool) -> int:
    chosen = [lengths[place] for place in batch]
    return sum(chosen) if packed else len(chosen) * max(chosen)


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize("keep_groups", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_example_is_dealt_once_and_ranks_are_even(num_ranks: int, keep_groups: bool, packed: bool):
    lengths = np.random.default_rng(0).integers(3, 700, size=37).tolist()
    ranks = deal(lengths, num_ranks, Bounds(1024, 4, keep_groups, packed))
    assert len(ranks) == num_ranks
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(place for batch in batches for place in batch) == list(range(37))
    for batch in batches:
        assert len(batch) <= 4
        assert len(batch) <= 1 or size_of(batch, lengths, packed) <= 1024


@pytest.mark.parametrize("packed", [False, True])
def test_groups_are_the_same_for_any_world_size(packed: bool):
    lengths = np.random.default_rng(1).integers(3, 200, size=30).tolist()
    bounds = Bounds(10_000, 4, keep_groups=True, packed=packed)
    groups = [sorted(batch for rank in deal(lengths, size, bounds) for batch in rank if batch) for size in (1, 2, 3, 8)]
    assert groups[0] == [tuple(range(start, min(start + 4, 30))) for start in range(0, 30, 4)]
    assert all(group == groups[0] for group in groups)


@pytest.mark.parametrize("packed", [False, True])
def test_work_is_balanced_over_ranks(packed: bool):
    lengths = np.random.default_rng(2).integers(50, 500, size=256).tolist()
    ranks = deal(lengths, 4, Bounds(4096, packed=packed, attention_tokens=1000))

    def cost(batch: tuple[int, ...]) -> float:
        if packed:
            return sum(lengths[place] * (1 + lengths[place] / 1000) for place in batch)
        return size_of(batch, lengths, packed)

    costs = [sum(cost(batch) for batch in rank if batch) for rank in ranks]
    # The step takes as long as its slowest rank.
    assert max(costs) <= (1.001 if packed else 1.1) * np.mean(costs)


def test_packed_micro_batches_are_as_few_as_they_can_be():
    lengths = np.random.default_rng(3).integers(50, 500, size=512).tolist()
    for num_ranks in (1, 2, 8):
        ranks = deal(lengths, num_ranks, Bounds(4096, packed=True))
        fewest = -(-sum(lengths) // 4096)
        assert len(ranks[0]) == -(-fewest // num_ranks)


def test_fewer_examples_than_ranks_leave_empty_micro_batches():
    for packed in (False, True):
        ranks = deal([5, 6], 4, Bounds(100, packed=packed))
        assert sorted(len(batch) for rank in ranks for batch in rank) == [0, 0, 1, 1]


def test_an_example_longer_than_the_bound_goes_alone():
    for packed in (False, True):
        ranks = deal([500, 10, 10], 1, Bounds(100, packed=packed))
        assert sorted(ranks[0]) == [(0,), (1, 2)]

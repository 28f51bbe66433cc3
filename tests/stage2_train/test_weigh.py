"""Weights and scales of a step, against the definitions written out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.config import TrainConfig
from shared.weighting import resolve_weighting
from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import ScoreCache, open_cache
from stage2_train.loss import GivenWeights
from stage2_train.plan import Bounds, deal
from stage2_train.weigh import StepWeigher, WeighedBatch

PACKED = BatchForm(packed=True)
ROWS = np.array([3, 11, 0, 20, 7, 9])


@pytest.fixture
def cache(scored_store: Path, tmp_path: Path) -> ScoreCache:
    return open_cache(scored_store, ("logprob", "mass_rank"), tmp_path)


def prepared(cache: ScoreCache, world_size: int, **train) -> list[WeighedBatch]:
    """The micro-batches of all of several ranks, which see each other's sums."""
    config = TrainConfig(**train)
    bounds = Bounds(300, config.micro_batch_examples, config.normalize_by == "micro_batch", packed=True)
    dealt = deal(cache.lengths[ROWS].tolist(), world_size, bounds)
    num_groups = sum(1 for batches_of_rank in dealt for micro_batch in batches_of_rank if micro_batch)
    sums: list[torch.Tensor] = []

    def prepare(rank: int, all_reduce) -> list[WeighedBatch]:
        batches = [make_batch(cache, ROWS, micro_batch, (), PACKED) for micro_batch in dealt[rank]]
        weigher = StepWeigher(resolve_weighting(config), config, cache, all_reduce)
        given = weigher.given(1, ROWS, batches)
        return weigher.prepare(1, ROWS, batches, given, num_groups, forward=no_forward)

    for rank in range(world_size):
        prepare(rank, lambda tensor: (sums.append(tensor), tensor)[1])
    return [part for rank in range(world_size) for part in prepare(rank, lambda _: torch.stack(sums).sum(dim=0))]


def no_forward(batch, weights):
    raise AssertionError("the prior's weights need no forward pass")


def total(cache: ScoreCache, world_size: int, **train) -> float:
    """Sum of weight * (-logprob) * scale over all ranks: the loss of a model that is the prior."""
    loss = 0.0
    for part in prepared(cache, world_size, **train):
        assert isinstance(part.weights, GivenWeights)
        nll_K = -part.batch.prior["logprob"][part.weights.kept_K]
        loss += float((part.weights.weights_K * nll_K).sum(dtype=torch.float64)) * part.scale
    return loss


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("normalize_by", ["targets", "kept", "weights", "micro_batch"])
def test_the_loss_is_the_definition_at_any_world_size(cache: ScoreCache, world_size: int, normalize_by: str):
    rows = [cache.row(int(row)).statistics for row in ROWS]
    weights = [np.exp(row["logprob"].astype(np.float64)) * (row["mass_rank"] <= 1) for row in rows]
    sums = [float((w * -row["logprob"]).sum()) for w, row in zip(weights, rows, strict=True)]
    counts = [len(w) for w in weights]
    expected = {
        "targets": sum(sums) / sum(counts),
        "kept": sum(sums) / sum(int((w != 0).sum()) for w in weights),
        "weights": sum(sums) / sum(w.sum() for w in weights),
        "micro_batch": np.mean([(sums[i] + sums[i + 1]) / (counts[i] + counts[i + 1]) for i in (0, 2, 4)]),
    }[normalize_by]
    examples = 2 if normalize_by == "micro_batch" else None
    found = total(cache, world_size, method="prift_prob", normalize_by=normalize_by, micro_batch_examples=examples)
    assert found == pytest.approx(expected, rel=1e-6)


def test_kept_counts_what_the_mask_leaves(cache: ScoreCache):
    kept = [row["mass_rank"] <= 0.5 for row in (cache.row(int(row)).statistics for row in ROWS)]
    (scale,) = {part.scale for part in prepared(cache, 1, method="prift_mass", normalize_by="kept")}
    assert scale == pytest.approx(1 / sum(int(k.sum()) for k in kept))
    assert 0 < sum(int(k.sum()) for k in kept) < sum(len(k) for k in kept)


def test_nothing_kept_is_a_loss_of_zero(cache: ScoreCache):
    weighting = {"rule": "prob_threshold", "min_prob": 1.0}
    cache.columns["logprob"] = np.full_like(cache.columns["logprob"], -1.0)
    for normalize_by in ("kept", "weights", "targets"):
        assert total(cache, 2, weighting=weighting, normalize_by=normalize_by) == 0.0


def test_targets_of_weight_zero_are_sampled_alike_at_any_world_size(cache: ScoreCache):
    """By row and position: which rank holds a target does not matter; with 1, all are looked at."""

    def watched(world_size: int, nll_every: int) -> set[tuple[int, int]]:
        found = set()
        for part in prepared(cache, world_size, method="prift_mass", nll_every=nll_every):
            assert isinstance(part.weights, GivenWeights)
            chosen = part.weights.watched_M
            found |= set(
                zip(part.batch.places_N[chosen].tolist(), part.batch.positions_N[chosen].tolist(), strict=True)
            )
        return found

    dropped = {
        (place, int(position))
        for place, row in enumerate(cache.row(int(row)) for row in ROWS)
        for position in row.target_positions[row.statistics["mass_rank"] > 0.5]
    }
    assert watched(1, 1) == dropped
    sample = watched(1, 4)
    assert sample == watched(3, 4) == watched(8, 4)
    assert sample < dropped
    assert len(dropped) / 8 < len(sample) < len(dropped) / 2

"""Held-out evaluation on score stores: plain nll, and nll over the targets that the prior supports."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stage2_train.batch import Batch, make_batch
from stage2_train.cache import ScoreCache
from stage2_train.distributed import World
from stage2_train.plan import deal

SUPPORTED_MASS_RANK = 0.5
"""A target counts as supported where the prior's mass_rank is at most this: where PriFT-mass keeps it by default."""


@dataclass(frozen=True)
class Evaluation:
    """One line of eval.jsonl."""

    step: int
    """Optimizer steps made so far."""
    name: str
    """Of the store, as in train.eval_scores."""
    nll: float
    """Mean over all targets, nats."""
    nll_supported: float | None
    """Mean over the targets with mass_rank <= 0.5, nats; None where there is none."""
    num_targets: int
    num_supported: int


def evaluate(
    step: int, name: str, cache: ScoreCache, forward: Callable[[Batch], Tensor], world: World, micro_batch_tokens: int
) -> Evaluation:
    """Evaluate on one store; called by all ranks.

    Args:
        cache: with the column mass_rank.
        forward: nll_N of a micro-batch, without gradient.
    """
    rows = np.arange(len(cache))
    dealt = deal(cache.lengths.tolist(), world.size, micro_batch_tokens, None)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for micro_batch in dealt[world.rank]:
        batch = make_batch(cache, rows, micro_batch, (), world.device)
        nll_N = forward(batch).double()
        is_supported_N = batch.prior["mass_rank"] <= SUPPORTED_MASS_RANK
        sums += torch.stack([nll_N.sum(), nll_N[is_supported_N].sum(), is_supported_N.sum().double()])
    total, supported, num_supported = world.all_reduce(sums).tolist()
    num_targets = int(cache.num_targets.sum())
    return Evaluation(
        step, name, total / num_targets, supported / num_supported if num_supported else None, num_targets,
        int(num_supported),
    )  # fmt: skip

"""Held-out evaluation on score stores: plain nll, and nll over the targets that the prior supports."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shared.stopping import StopSwitch
from stage2_train.batch import Batch, BatchForm, make_batch
from stage2_train.cache import ScoreCache
from stage2_train.distributed import World
from stage2_train.plan import Bounds, deal

SUPPORTED_MASS_RANK = 0.5
"""A target counts as supported where the prior's mass_rank is at most this: where PriFT-mass keeps it by default."""

_ROWS_AT_ONCE = 16384
"""Rows that are dealt to ranks together: sorting them by length is what keeps micro-batches even."""


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
    step: int,
    name: str,
    cache: ScoreCache,
    forward: Callable[[Batch], Tensor],
    world: World,
    bounds: Bounds,
    form: BatchForm,
    stop: StopSwitch,
) -> Evaluation | None:
    """Evaluate on one store; called by all ranks. None where one of them was asked to stop.

    Args:
        cache: with the column mass_rank.
        forward: nll_N of a micro-batch, without gradient.
        bounds: of micro-batches; bounds on examples and on their order are those of a training step, and left out.
    """
    bounds = replace(bounds, max_examples=None, keep_groups=False)
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    for start in range(0, len(cache), _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, len(cache)))
        dealt = deal(cache.lengths[rows].tolist(), world.size // form.num_parts, bounds)
        for micro_batch in dealt[world.rank // form.num_parts]:
            batch = make_batch(cache, rows, micro_batch, (), form).to(world.device)
            sums += _sums(batch, forward(batch).double())
            if world.any(stop.is_pressed):
                return None
    total, supported, num_supported = world.all_reduce(sums).tolist()
    num_targets = cache.num_targets.sum()
    return Evaluation(
        step, name, total / num_targets, supported / num_supported if num_supported else None, num_targets,
        int(num_supported),
    )  # fmt: skip


def _sums(batch: Batch, nll_N: Tensor) -> Tensor:
    """Sum of the nll of all targets, of the supported ones, and their number."""
    is_supported_N = batch.prior["mass_rank"] <= SUPPORTED_MASS_RANK
    return torch.stack([nll_N.sum(), nll_N[is_supported_N].sum(), is_supported_N.sum().double()])

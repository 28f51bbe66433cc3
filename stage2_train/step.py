"""Gradients of one optimizer step: every micro-batch forward and backward, and what is counted on the way.

Shape suffixes: R rows of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.stopping import StopSwitch
from stage2_train.distributed import World
from stage2_train.step_loader import LoadedStep
from stage2_train.weigh import StepWeigher, WeighedBatch


@dataclass(frozen=True)
class StepTotals:
    """Sums over the targets of a step, all ranks'."""

    loss: float
    """Weighted loss, normalised as the run is."""
    weight_sum: float
    num_kept: int
    """Targets of non-zero weight."""
    kept_nll: float
    """Sum of their nll, nats."""
    num_watched: int
    """Targets of weight zero that went through the head."""
    watched_nll: float
    num_tokens: int
    """Padding not counted."""
    num_stopping: int
    """Ranks that a signal asked to stop."""
    row_nll_R: np.ndarray
    """Sum of the nll of each row's targets that went through the head."""

    def nll(self, num_targets: int) -> float | None:
        """Mean over all targets; None where some did not go through the head."""
        if self.num_kept + self.num_watched < num_targets:
            return None
        return (self.kept_nll + self.watched_nll) / num_targets

    def nll_sampled(self, num_targets: int) -> float | None:
        """The mean over all targets, those of weight zero counted by their sample; None where there is no sample."""
        num_zero = num_targets - self.num_kept
        if num_zero and not self.num_watched:
            return None
        return (self.kept_nll + self.watched_nll * num_zero / max(1, self.num_watched)) / num_targets


def weigh_step(step: int, loaded: LoadedStep, weigher: StepWeigher, engine: Any, world: World) -> list[WeighedBatch]:
    """This rank's share of a step on its device, weighed; called by all ranks."""
    batches = [batch.to(world.device) for batch in loaded.batches]
    given = None if loaded.given is None else [weights.to(world.device) for weights in loaded.given]
    return weigher.prepare(
        step, loaded.rows, batches, given, loaded.num_groups, lambda batch, weights: engine(batch.tokens, weights)
    )


def accumulate_gradients(
    engine: Any, world: World, weighed: Sequence[WeighedBatch], num_rows: int, stop: StopSwitch
) -> StepTotals:
    """Run this rank's micro-batches of a step; called by all ranks, with equally many.

    Args:
        engine: DeepSpeed's, around a `stage2_train.loss.WeightedLM`; its gradients are added to.
        num_rows: R.
        stop: of this rank; the ranks learn of each other's with the sums.
    """
    sums = torch.zeros(8 + num_rows, dtype=torch.float64, device=world.device)
    for part in weighed:
        loss, nll, weights = engine(part.batch.tokens, part.weights, part.scale)
        # DeepSpeed averages gradients over ranks; the loss is a sum over them.
        engine.backward(loss * world.size, scale_wrt_gas=False)
        nll, is_kept = nll.double(), weights != 0
        numbers = (
            loss.detach().double(), weights.sum(dtype=torch.float64), is_kept.sum().double(), (nll * is_kept).sum(),
            (~is_kept).sum().double(), (nll * ~is_kept).sum(),
        )  # fmt: skip
        sums[:6] += torch.stack(numbers)
        sums[8:].index_add_(0, part.weights.of_seen(part.batch.places_N), nll)
    sums[6] = float(sum(part.batch.num_tokens for part in weighed))
    sums[7] = float(stop.is_pressed)
    numbers = world.all_reduce(sums).cpu().numpy()
    loss, weight_sum, num_kept, kept_nll, num_watched, watched_nll, num_tokens, num_stopping = numbers[:8].tolist()
    return StepTotals(
        loss, weight_sum, int(num_kept), kept_nll, int(num_watched), watched_nll, int(num_tokens), int(num_stopping),
        numbers[8:],
    )  # fmt: skip

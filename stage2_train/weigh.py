"""Weights and denominators of an optimizer step.

Shape suffixes: N targets of a micro-batch, R rows of the step.

Where the prior's statistics are used, weights are known before any forward pass, and are made on the host while the
step before runs. A rule that runs on the model's own statistics gets them in the forward pass; only where the rule or
the denominator looks at the whole batch does a first pass without gradient gather them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shared.config import TrainConfig
from shared.score_store import TARGET_WEIGHT
from shared.weighting import TargetStatistics, Weighting
from stage2_train.batch import Batch
from stage2_train.cache import TrainingRows
from stage2_train.loss import GivenWeights, OnlineWeights, Weights

Forward = Callable[[Batch, Weights], tuple[Tensor, Tensor, Tensor]]
"""The model's forward pass, as `stage2_train.loss.WeightedLM.forward`."""

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks."""


@dataclass(frozen=True)
class WeighedBatch:
    """A micro-batch with what its loss needs."""

    batch: Batch
    weights: Weights
    scale: float
    """What its weighted sum is multiplied by; the scaled sums of all micro-batches and ranks add up to the loss."""


class StepWeigher:
    """Prepares the micro-batches of a step: how each target is weighted, and what the sum is divided by."""

    def __init__(self, weighting: Weighting, config: TrainConfig, cache: TrainingRows, all_reduce: AllReduce):
        self._weighting, self._config, self._cache = weighting, config, cache
        self._all_reduce = all_reduce

    def given(self, step: int, rows: np.ndarray, batches: Sequence[Batch]) -> list[GivenWeights] | None:
        """Weights from the prior's statistics; None where the rule runs on the model's own. Communicates nothing.

        Args:
            rows: the rows of the step, all ranks'.
            batches: this rank's micro-batches, on the CPU.
        """
        if self._weighting.source != "prior":
            return None
        row_nll_R = self._stored_row_nll(rows) if self._weighting.needs_row_nll else None
        return [
            self._chosen(step, rows, batch, self._weigh(batch.prior, slice(None), batch=batch, row_nll_R=row_nll_R))
            for batch in batches
        ]

    def prepare(
        self,
        step: int,
        rows: np.ndarray,
        batches: Sequence[Batch],
        given: Sequence[GivenWeights] | None,
        num_groups: int,
        forward: Forward,
    ) -> list[WeighedBatch]:
        """Weights and scales of this rank's micro-batches; called by all ranks.

        Args:
            given: what `given` returned for them.
            num_groups: micro-batches of the step over all ranks, those without targets left out.
            forward: runs the model, for the online rules that look before they weigh.
        """
        looks_at_all = self._weighting.needs_row_nll or self._config.normalize_by in ("kept", "weights")
        if given is None and looks_at_all:
            given = self._first_pass(step, rows, batches, forward)
        if given is None:
            columns = self._weighting.columns
            weights = [OnlineWeights(columns, partial(self._weigh, batch=batch, row_nll_R=None)) for batch in batches]
            return self._scaled(rows, batches, weights, num_groups, None)
        sums = None
        if self._config.normalize_by in ("kept", "weights"):
            # The sum of the weights, and how many are not zero.
            local = [torch.stack([part.weights_K.double().sum(), torch.tensor(float(len(part.weights_K)),
                     device=part.weights_K.device)]) for part in given]  # fmt: skip
            sums = self._all_reduce(torch.stack(local).sum(dim=0).to(batches[0].places_N.device))
        return self._scaled(rows, batches, given, num_groups, sums)

    def _stored_row_nll(self, rows: np.ndarray) -> Tensor:
        members = (self._cache.row(int(row)) for row in rows)
        return torch.tensor([-float(member.statistics["logprob"].mean(dtype=np.float64)) for member in members])

    def _first_pass(
        self, step: int, rows: np.ndarray, batches: Sequence[Batch], forward: Forward
    ) -> list[GivenWeights]:
        """Weights from the model's statistics over the whole step, by a pass without gradient."""
        statistics, nll_by_batch = [], []
        for batch in batches:
            seen: list[dict[str, Tensor]] = []
            with torch.no_grad():
                nll_by_batch.append(forward(batch, OnlineWeights(self._weighting.columns, partial(_keep, seen)))[1])
            statistics.append({name: torch.cat([part[name] for part in seen]) for name in self._weighting.columns})
        row_nll_R = self._row_nll(rows, batches, nll_by_batch)
        return [
            self._chosen(step, rows, batch, self._weigh(columns, slice(None), batch=batch, row_nll_R=row_nll_R))
            for columns, batch in zip(statistics, batches, strict=True)
        ]

    def _row_nll(self, rows: np.ndarray, batches: Sequence[Batch], nll_by_batch: Sequence[Tensor]) -> Tensor:
        """Mean nll of each row of the step, the same on all ranks."""
        sums_R = torch.zeros(len(rows), dtype=torch.float64, device=nll_by_batch[0].device)
        for batch, nll_N in zip(batches, nll_by_batch, strict=True):
            sums_R.index_add_(0, batch.places_N, nll_N.double())
        counts_R = torch.from_numpy(self._cache.num_targets[rows]).to(sums_R.device)
        return (self._all_reduce(sums_R) / counts_R).float()

    def _chosen(self, step: int, rows: np.ndarray, batch: Batch, weights_N: Tensor) -> GivenWeights:
        """Which targets go through the head: those of non-zero weight, and a sample of the others."""
        is_kept_N = weights_N != 0
        # By row, position and step alone: the same targets at any world size, others in the next epoch.
        rows_N = torch.from_numpy(rows).to(weights_N.device)[batch.places_N]
        is_sampled_N = (rows_N * 31 + batch.positions_N + step) % self._config.nll_every == 0
        kept_K = is_kept_N.nonzero()[:, 0]
        return GivenWeights(weights_N[kept_K], kept_K, (is_sampled_N & ~is_kept_N).nonzero()[:, 0])

    def _scaled(
        self,
        rows: np.ndarray,
        batches: Sequence[Batch],
        weights: Sequence[Weights],
        num_groups: int,
        sums: Tensor | None,
    ) -> list[WeighedBatch]:
        """Attach the scale of the chosen normalisation.

        Args:
            sums: sum of the weights of the whole step and how many are not zero, for the normalisations that divide
                by them.
        """
        if self._config.normalize_by == "micro_batch":
            scales = [1.0 / (max(batch.num_targets, 1) * num_groups) for batch in batches]
        elif self._config.normalize_by == "targets":
            scales = [1.0 / float(self._cache.num_targets[rows].sum())] * len(batches)
        else:
            assert sums is not None
            denominator = float(sums[0] if self._config.normalize_by == "weights" else sums[1])
            # Nothing is kept: the sum is 0 whatever it is divided by.
            scales = [1.0 / denominator if denominator > 0 else 0.0] * len(batches)
        return [WeighedBatch(*parts) for parts in zip(batches, weights, scales, strict=True)]

    def _weigh(self, statistics: dict[str, Tensor], part: slice, *, batch: Batch, row_nll_R: Tensor | None) -> Tensor:
        given_N = batch.prior.get(TARGET_WEIGHT)
        seen = TargetStatistics(statistics, row_nll_R, None if given_N is None else given_N[part])
        return self._weighting.weights(seen, batch.is_stop_token_N[part])


def _keep(seen: list[dict[str, Tensor]], statistics: dict[str, Tensor], part: slice) -> Tensor:
    seen.append(statistics)
    return torch.zeros_like(next(iter(statistics.values())))

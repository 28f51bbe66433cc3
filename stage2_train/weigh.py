"""Weights and denominators of an optimizer step.

Shape suffixes: N targets of a micro-batch, S targets of the whole step, R rows of the step.

The prior's statistics of the whole step lie in the cache of every node, so each rank works out the whole step for
itself and nothing is communicated. A rule that runs on the model's own statistics gets them in the forward pass; only
where the rule or the denominator looks at the whole batch does a first pass without gradient gather them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from shared.config import TrainConfig
from shared.weighting import TargetStatistics, Weighting
from stage2_train.batch import Batch
from stage2_train.cache import ScoreCache
from stage2_train.loss import Weigh

Forward = Callable[[Batch, Weigh], tuple[Tensor, Tensor, Tensor]]
"""The model's forward pass: weighted sum, nll_N, weights_N."""

AllReduce = Callable[[Tensor], Tensor]
"""Sum over ranks."""


@dataclass(frozen=True)
class WeighedBatch:
    """A micro-batch with what its loss needs."""

    batch: Batch
    weigh: Weigh
    scale: float
    """What its weighted sum is multiplied by; the scaled sums of all micro-batches and ranks add up to the loss."""


class StepWeigher:
    """Prepares the micro-batches of a step: how each target is weighted, and what the sum is divided by."""

    def __init__(self, weighting: Weighting, config: TrainConfig, cache: ScoreCache, all_reduce: AllReduce):
        self._weighting, self._normalize_by, self._cache = weighting, config.normalize_by, cache
        self._all_reduce = all_reduce
        self._stop_token_ids = torch.tensor(cache.manifest.stop_token_ids, dtype=torch.int64)

    @property
    def online_columns(self) -> tuple[str, ...]:
        """Statistics of the model itself that the forward pass must compute."""
        return self._weighting.columns if self._weighting.source == "online" else ()

    def prepare(
        self, rows: np.ndarray, batches: Sequence[Batch], num_groups: int, forward: Forward
    ) -> list[WeighedBatch]:
        """Weights and scales of this rank's micro-batches.

        Args:
            rows: the rows of the step, all ranks'.
            batches: this rank's micro-batches.
            num_groups: micro-batches of the step over all ranks, those without targets left out.
            forward: runs the model, for the rules that look before they weigh.
        """
        if self._weighting.source == "prior":
            return self._from_prior(rows, batches, num_groups)
        if self._weighting.needs_row_nll or self._normalize_by in ("kept", "weights"):
            return self._from_first_pass(rows, batches, num_groups, forward)
        weighs = [partial(self._weigh, batch=batch, row_nll_R=None) for batch in batches]
        return self._scaled(rows, batches, weighs, num_groups, None)

    def _from_prior(self, rows: np.ndarray, batches: Sequence[Batch], num_groups: int) -> list[WeighedBatch]:
        row_nll_R = self._stored_row_nll(rows) if self._weighting.needs_row_nll else None
        sums = None
        if self._normalize_by in ("kept", "weights"):
            sums = _sum_and_count(self._stored_weights(rows, row_nll_R))
        if row_nll_R is not None:
            row_nll_R = row_nll_R.to(batches[0].places_N.device)
        weighs = [partial(self._weigh_prior, batch=batch, row_nll_R=row_nll_R) for batch in batches]
        return self._scaled(rows, batches, weighs, num_groups, sums)

    def _stored_row_nll(self, rows: np.ndarray) -> Tensor:
        members = (self._cache.row(int(row)) for row in rows)
        return torch.tensor([-float(member.statistics["logprob"].mean(dtype=np.float64)) for member in members])

    def _stored_weights(self, rows: np.ndarray, row_nll_R: Tensor | None) -> Tensor:
        """Weights of the whole step, (S,), on the CPU."""
        members = [self._cache.row(int(row)) for row in rows]
        columns_S = {
            name: torch.from_numpy(np.concatenate([member.statistics[name] for member in members]))
            for name in self._weighting.columns
        }
        ids_S = np.concatenate([member.input_ids[member.target_positions] for member in members])
        is_stop_token_S = torch.isin(torch.from_numpy(ids_S.astype(np.int64)), self._stop_token_ids)
        return self._weighting.weights(TargetStatistics(columns_S, row_nll_R), is_stop_token_S)

    def _from_first_pass(
        self, rows: np.ndarray, batches: Sequence[Batch], num_groups: int, forward: Forward
    ) -> list[WeighedBatch]:
        seen: list[dict[str, Tensor]] = []

        def keep(online: dict[str, Tensor]) -> Tensor:
            seen.append(online)
            return torch.zeros_like(next(iter(online.values())))

        with torch.no_grad():
            nll_by_batch = [forward(batch, keep)[1] for batch in batches]
        row_nll_R = self._row_nll(rows, batches, nll_by_batch)
        weights = [
            self._weigh(online, batch=batch, row_nll_R=row_nll_R) for online, batch in zip(seen, batches, strict=True)
        ]
        weighs = [partial(_given, weights_N=weights_N) for weights_N in weights]
        sums = self._all_reduce(_sum_and_count(torch.cat(weights)))
        return self._scaled(rows, batches, weighs, num_groups, sums)

    def _row_nll(self, rows: np.ndarray, batches: Sequence[Batch], nll_by_batch: Sequence[Tensor]) -> Tensor:
        """Mean nll of each row of the step, the same on all ranks."""
        sums_R = torch.zeros(len(rows), dtype=torch.float64, device=nll_by_batch[0].device)
        for batch, nll_N in zip(batches, nll_by_batch, strict=True):
            sums_R.index_add_(0, batch.places_N, nll_N.double())
        counts_R = torch.from_numpy(self._cache.num_targets[rows]).to(sums_R.device)
        return (self._all_reduce(sums_R) / counts_R).float()

    def _scaled(
        self, rows: np.ndarray, batches: Sequence[Batch], weighs: Sequence[Weigh], num_groups: int, sums: Tensor | None
    ) -> list[WeighedBatch]:
        """Attach the scale of the chosen normalisation.

        Args:
            sums: `_sum_and_count` of the weights of the whole step, for the normalisations that divide by them.
        """
        if self._normalize_by == "micro_batch":
            scales = [1.0 / (max(batch.num_targets, 1) * num_groups) for batch in batches]
        elif self._normalize_by == "targets":
            scales = [1.0 / float(self._cache.num_targets[rows].sum())] * len(batches)
        else:
            assert sums is not None
            denominator = float(sums[0] if self._normalize_by == "weights" else sums[1])
            # Nothing is kept: the sum is 0 whatever it is divided by.
            scales = [1.0 / denominator if denominator > 0 else 0.0] * len(batches)
        return [WeighedBatch(*parts) for parts in zip(batches, weighs, scales, strict=True)]

    def _weigh(self, online: dict[str, Tensor], *, batch: Batch, row_nll_R: Tensor | None) -> Tensor:
        return self._weighting.weights(TargetStatistics(online, row_nll_R), batch.is_stop_token_N)

    def _weigh_prior(self, online: dict[str, Tensor], *, batch: Batch, row_nll_R: Tensor | None) -> Tensor:
        return self._weigh(batch.prior, batch=batch, row_nll_R=row_nll_R)


def _sum_and_count(weights: Tensor) -> Tensor:
    """float64 (2,): the sum of the weights, and how many are not zero."""
    return torch.stack([weights.sum(dtype=torch.float64), weights.count_nonzero().double()])


def _given(online: dict[str, Tensor], *, weights_N: Tensor) -> Tensor:
    return weights_N

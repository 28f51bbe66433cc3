"""Token-weighting rules: statistics of the targets to weights.

Shape suffixes: N targets of the global batch (or of a part of it), R its rows.

A rule is a pure function of `TargetStatistics`; where the statistics come from, the frozen prior or the model
in training, is none of its business. p stands for e^logprob.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.config import TrainConfig
from shared.errors import UserError
from shared.rules import RULE_COLUMNS, RULE_PARAMETERS, Source


@dataclass(frozen=True)
class TargetStatistics:
    """What a rule sees."""

    columns: Mapping[str, Tensor]
    """Statistic name to float32 (N,); see `shared/statistics.py`."""
    row_nll_R: Tensor | None = None
    """Mean nll in nats of each row of the global batch, for rules that look at the whole batch."""
    target_weights_N: Tensor | None = None
    """The data's own weights, float32, > 0, which multiply the rule's; None where it has none."""

    @property
    def logprob_N(self) -> Tensor:
        """ln p, float32."""
        return self.columns["logprob"]

    @property
    def prob_N(self) -> Tensor:
        """p, float32."""
        return self.columns["logprob"].exp()


@dataclass(frozen=True)
class Weighting:
    """A rule with its source and parameters, all resolved."""

    rule: str
    source: Source
    parameters: Mapping[str, float]
    floor: float | None
    stop_token_weight: float | None

    @property
    def columns(self) -> tuple[str, ...]:
        """Statistics the rule reads."""
        return RULE_COLUMNS[self.rule]

    @property
    def needs_row_nll(self) -> bool:
        """Whether the rule reads `row_nll_R`."""
        return self.rule == "talr"

    def weights(self, statistics: TargetStatistics, is_stop_token_N: Tensor) -> Tensor:
        """Weights of the targets, detached.

        Args:
            statistics: of the chosen source.
            is_stop_token_N: bool, where the target is a stop token.

        Returns:
            float32 (N,), >= 0.
        """
        if self.rule == "sft":
            weights_N = torch.ones(is_stop_token_N.shape, device=is_stop_token_N.device)
        else:
            weights_N = _FORMULAS[self.rule](statistics, self.parameters).detach()
        if self.floor is not None:
            weights_N = weights_N.clamp(min=self.floor)
        if self.stop_token_weight is not None:
            weights_N = torch.where(is_stop_token_N, self.stop_token_weight, weights_N)
        if statistics.target_weights_N is not None:
            weights_N = weights_N * statistics.target_weights_N
        return weights_N


def resolve_weighting(config: TrainConfig) -> Weighting:
    """The weighting that `train.method` and `train.weighting` mean.

    Raises:
        UserError: neither names a rule.
    """
    rule, source = config.rule_and_source()
    if rule is None:
        raise UserError("expected train.method or train.weighting.rule, such as train.method=prift_mass; got neither")
    if not RULE_COLUMNS[rule]:
        source = "prior"  # a rule that reads no statistic needs no forward pass to know its weights
    given = config.weighting.model_dump(exclude_none=True)
    parameters = {name: given.get(name, default) for name, default in RULE_PARAMETERS[rule].items()}
    # talr's own floor is a parameter of the rule, with a default; for other rules it is a knob, off by default.
    floor = None if "floor" in parameters else given.get("floor")
    return Weighting(rule, source, parameters, floor, given.get("stop_token_weight"))


_Parameters = Mapping[str, float]


def _mass(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """PriFT-mass, arXiv 2606.09396: 1 iff u >= threshold, that is iff mass_rank <= 1 - threshold."""
    return (statistics.columns["mass_rank"] <= 1.0 - parameters["threshold"]).float()


def _prob_threshold(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """ProFit, arXiv 2601.09195."""
    return (statistics.prob_N >= parameters["min_prob"]).float()


def _prob_above(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """Beyond Log Likelihood, OnlyTopP-q, arXiv 2510.00526."""
    return statistics.prob_N * _prob_threshold(statistics, parameters)


def _talr(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """TALR, arXiv 2509.20758: max(p^(1/tau), floor), tau = median over rows of the mean nll of a row."""
    assert statistics.row_nll_R is not None
    tau = statistics.row_nll_R.median().clamp(min=torch.finfo(torch.float32).tiny)
    return (statistics.logprob_N / tau).exp().clamp(min=parameters["floor"])


def _infosft(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """InfoSFT, arXiv 2605.14967: p * max(0, 1 - logit(p) / logit(max_prob)).

    logit(p) = logprob - log1p(-p) stays finite for p that underflows; p = 1 has logit +inf and weight 0.
    """
    max_prob = parameters["max_prob"]
    logit_N = statistics.logprob_N - torch.log(-torch.expm1(statistics.logprob_N))
    return statistics.prob_N * (1.0 - logit_N / math.log(max_prob / (1.0 - max_prob))).clamp(min=0.0)


def _entropy(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """EAFT, arXiv 2601.02151: (H_top20 / 3)^alpha."""
    return (statistics.columns["entropy_top20"] / 3.0).pow(parameters["alpha"])


def _chord(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """CHORD-phi, arXiv 2508.11408: p (1 - p)."""
    return statistics.prob_N * -torch.expm1(statistics.logprob_N)


def _deft(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """DEFT, arXiv 2602.11424: p^collision."""
    return (statistics.columns["collision"] * statistics.logprob_N).exp()


def _idft(statistics: TargetStatistics, parameters: _Parameters) -> Tensor:
    """IDFT, arXiv 2602.12222: p^g with g = clamp(exp(-(logprob + entropy) / beta), lo, hi)."""
    exponent_N = (-(statistics.logprob_N + statistics.columns["entropy"]) / parameters["beta"]).exp()
    return (exponent_N.clamp(parameters["lo"], parameters["hi"]) * statistics.logprob_N).exp()


_FORMULAS: dict[str, Callable[[TargetStatistics, _Parameters], Tensor]] = {
    "prob": lambda statistics, _: statistics.prob_N,
    "mass": _mass,
    "prob_power": lambda statistics, parameters: (parameters["alpha"] * statistics.logprob_N).exp(),
    "prob_threshold": _prob_threshold,
    "prob_above": _prob_above,
    "talr": _talr,
    "infosft": _infosft,
    "entropy": _entropy,
    "chord": _chord,
    "deft": _deft,
    "idft": _idft,
}

"""What a rule will do with the targets of a store, from the stored statistics, before anything is trained.

Shape suffix: N targets that are looked at.
"""

from dataclasses import dataclass

from torch import Tensor

from shared.weighting import Weighting

_LEAST_STOP_WEIGHT = 0.1
_LEAST_SHARE, _LARGEST_SHARE = 0.05, 0.95
_SELECTING_RULES = {"mass", "prob_threshold", "prob_above"}
"""Rules whose purpose is to leave targets out."""


@dataclass(frozen=True)
class Outlook:
    """What a rule gives to the first targets of a store."""

    num_targets: int
    """That were looked at."""
    kept_share: float
    """Of targets with a weight that is not zero."""
    effective_share: float
    """(sum of weights)^2 / sum of squared weights, Kish's effective sample size, by the number of targets: 1 where all
    weigh the same, k / N where k of N weigh the same and the others nothing; 0 where all weights are zero."""
    mean: float
    stop_mean: float | None
    """Mean weight of stop tokens; None where there is none."""


@dataclass
class WeightSums:
    """What an outlook is made of, added up block by block."""

    num_targets: int = 0
    num_kept: int = 0
    total: float = 0.0
    squares: float = 0.0
    num_stop: int = 0
    stop_total: float = 0.0

    def add(self, weights_N: Tensor, is_stop_N: Tensor) -> None:
        """Add the weights of some targets; sums are taken in float64."""
        weights_N = weights_N.double()
        self.num_targets += len(weights_N)
        self.num_kept += int((weights_N != 0).sum())
        self.total += float(weights_N.sum())
        self.squares += float(weights_N.square().sum())
        self.num_stop += int(is_stop_N.sum())
        self.stop_total += float(weights_N[is_stop_N].sum())

    def outlook(self) -> Outlook:
        """Shares and means of all that was added, one target at least."""
        effective = self.total**2 / self.squares / self.num_targets if self.squares else 0.0
        stop_mean = self.stop_total / self.num_stop if self.num_stop else None
        mean = self.total / self.num_targets
        return Outlook(self.num_targets, self.num_kept / self.num_targets, effective, mean, stop_mean)


def describe(outlook: Outlook) -> str:
    """The outlook as one line."""
    return (
        f"of the first {outlook.num_targets:,} targets {outlook.kept_share:.1%} keep a weight, {outlook.mean:.3f} on "
        f"average; they count as {outlook.effective_share * outlook.num_targets:,.0f} effective ones "
        f"({outlook.effective_share:.1%})"
    )


def warnings_of(outlook: Outlook, weighting: Weighting) -> list[str]:
    """What a user should know before the first step."""
    found = (_of_share(outlook, weighting), _of_stop_tokens(outlook, weighting))
    return [warning for warning in found if warning is not None]


def _of_share(outlook: Outlook, weighting: Weighting) -> str | None:
    # A smooth rule keeps every target: there the effective share says how few of them count.
    selects = weighting.rule in _SELECTING_RULES
    share, what = (outlook.kept_share, "keeps") if selects else (outlook.effective_share, "effectively trains on")
    if share < _LEAST_SHARE:
        return (
            f"WARNING: rule {weighting.rule} {what} {share:.2%} of the targets: little is learnt from a step; look at "
            f"its parameters ({_parameters(weighting)}), or raise train.batch_size"
        )
    if selects and share > _LARGEST_SHARE:
        return (
            f"WARNING: rule {weighting.rule} keeps {share:.2%} of the targets: this is nearly plain fine-tuning; look "
            f"at its parameters ({_parameters(weighting)})"
        )
    return None


def _parameters(weighting: Weighting) -> str:
    return ", ".join(f"{name}={value}" for name, value in weighting.parameters.items()) or "none"


def _of_stop_tokens(outlook: Outlook, weighting: Weighting) -> str | None:
    """Where the prior hardly supports stop tokens, the model may not learn to stop."""
    if weighting.stop_token_weight is not None or outlook.stop_mean is None or outlook.stop_mean >= _LEAST_STOP_WEIGHT:
        return None
    return (
        f"WARNING: stop tokens get a mean weight of {outlook.stop_mean:.4f} (all targets: {outlook.mean:.4f}) over the "
        f"first {outlook.num_targets:,} targets: the prior hardly supports them, and the model may not learn to stop. "
        "train.weighting.stop_token_weight=1 gives them full weight"
    )

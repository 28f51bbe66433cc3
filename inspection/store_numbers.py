"""The numbers of a report and what each means.

p = e^logprob and u = 1 - mass_rank are taken in float64 from the stored float32 values. What a rule does is asked of
`shared/weighting.py`, with the prior as source.
"""

from dataclasses import dataclass

from shared.outlook import Outlook
from shared.weighting import Weighting

THRESHOLDS = tuple(round(0.01 * step, 2) for step in range(101))
"""For u by PriFT-mass, and for p by prob_threshold."""


@dataclass(frozen=True)
class Histogram:
    """Counts of targets in bins: [edge, next edge), the last one closed."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Column:
    """A statistic over all targets."""

    mean: float
    smallest: float
    largest: float


@dataclass(frozen=True)
class PositionBin:
    """Targets by their place in the completion, counted from 0."""

    first: int
    last: int
    num_targets: int
    mean_prob: float
    mean_mass_weight: float
    """Share that PriFT-mass keeps at threshold 0.5."""


@dataclass(frozen=True)
class TokenNumbers:
    """All targets with one id."""

    token: int
    num_targets: int
    mean_prob: float
    mean_u: float
    num_dropped: int
    """By PriFT-mass at threshold 0.5."""


@dataclass(frozen=True)
class StoreNumbers:
    """What there is to say of a store."""

    num_rows: int
    num_dropped_rows: int
    num_tokens: int
    num_targets: int
    num_shards: int
    num_bytes: int
    longest_row: int
    tau: float
    """Median over the rows of their mean nll, nats: talr's, over the whole store."""
    columns: dict[str, Column]
    histograms: dict[str, Histogram]
    """prob, u, and entropy where it was stored."""
    rules: list[tuple[Weighting, Outlook]]
    kept_by_mass: list[int]
    """Targets with u of at least each of THRESHOLDS."""
    kept_by_prob: list[int]
    """Targets with p of at least each of THRESHOLDS."""
    positions: list[PositionBin]
    tokens: list[TokenNumbers]
    """By id, those that are a target somewhere."""

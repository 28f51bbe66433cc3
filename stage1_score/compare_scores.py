"""How far statistics that were scored again lie from the stored ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ColumnDifference:
    """How far a statistic scored again lies from the stored one, in the statistic's own unit."""

    column: str
    num_targets: int
    median: float
    """Of the absolute differences, as are the next three."""
    p90: float
    p99: float
    largest: float
    mean_signed: float
    """Mean of rescored - stored."""


@dataclass(frozen=True)
class Flips:
    """Decisions of PriFT-mass that come out differently when scored again."""

    threshold: float
    num_targets: int
    num_kept: int
    """Targets that the stored numbers keep."""
    num_flipped: int
    """Targets that the stored or the new numbers keep, but not both."""


def compare(stored: Mapping[str, np.ndarray], rescored: Mapping[str, np.ndarray]) -> list[ColumnDifference]:
    """Differences of each column, logprob first.

    Args:
        stored, rescored: float32 (N,) by column, N >= 1.
    """
    found = []
    for column in sorted(stored, key=lambda name: name != "logprob"):
        signed_N = rescored[column].astype(np.float64) - stored[column]
        quantiles = np.quantile(np.abs(signed_N), [0.5, 0.9, 0.99, 1.0]).tolist()
        found.append(ColumnDifference(column, len(signed_N), *quantiles, mean_signed=float(signed_N.mean())))
    return found


def flips(stored_N: np.ndarray, rescored_N: np.ndarray, threshold: float) -> Flips:
    """Decisions of PriFT-mass by the stored and by the new mass ranks.

    Args:
        stored_N, rescored_N: mass ranks, float32 (N,).
        threshold: smallest u = 1 - mass_rank that is kept.
    """
    import torch

    from shared.weighting import TargetStatistics, Weighting

    rule = Weighting("mass", "prior", {"threshold": threshold}, None, None)
    no_stop_N = torch.zeros(len(stored_N), dtype=torch.bool)
    kept, kept_again = (
        rule.weights(TargetStatistics({"mass_rank": torch.from_numpy(mass_rank_N)}), no_stop_N) > 0
        for mass_rank_N in (stored_N, rescored_N)
    )
    return Flips(threshold, len(stored_N), int(kept.sum()), int((kept != kept_again).sum()))


def print_differences(differences: Sequence[ColumnDifference]) -> None:
    """One line per column."""
    names = ("targets", "median", "p90", "p99", "largest", "mean signed")
    print(f"{'|difference|':14}" + "".join(f"{name:>13}" for name in names))
    for it in differences:
        sizes = "".join(f"{value:13.2e}" for value in (it.median, it.p90, it.p99, it.largest, it.mean_signed))
        print(f"{it.column:14}{it.num_targets:13,}{sizes}")


def print_flips(found: Sequence[Flips]) -> None:
    """One line per threshold."""
    print(f"{'PriFT-mass':14}{'targets':>13}{'kept':>13}{'flipped':>13}{'share':>13}")
    for it in found:
        name = f"threshold {it.threshold:g}"
        share = it.num_flipped / it.num_targets
        print(f"{name:14}{it.num_targets:13,}{it.num_kept:13,}{it.num_flipped:13,}{share:13.4%}")

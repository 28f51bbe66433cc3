"""All numbers of a store, in one pass over its pages.

Shape suffix: N targets of a block.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from inspection.row_table import row_table
from inspection.store_numbers import THRESHOLDS, Column, Histogram, PositionBin, StoreNumbers, TokenNumbers
from inspection.target_blocks import TargetBlock, target_blocks
from shared.errors import UserError
from shared.outlook import Outlook, WeightSums
from shared.places import Place
from shared.rules import RULE_COLUMNS, RULE_PARAMETERS
from shared.score_store import TARGET_WEIGHT, Manifest
from shared.shards import dropped_path, open_store
from shared.weighting import TargetStatistics, Weighting

_CHOSEN = {"prob_power": {"alpha": 0.5}, "prob_above": {"min_prob": 0.1}}
"""Parameters of rules that have no default, chosen for the table."""


def measure(store: Place) -> StoreNumbers:
    """Read a finished store once, every page's checksum and every shard's digest verified.

    Raises:
        UserError: not a finished store, or a page that does not hold.
    """
    manifest, shards = open_store(store)
    missing = {"logprob", "mass_rank"} - set(manifest.identity.columns)
    if missing:
        raise UserError(
            f"{store}: the columns logprob and mass_rank are needed; {', '.join(sorted(missing))} is missing"
        )
    rows = row_table(shards)
    median = rows["mean_logprob"].median()
    if not isinstance(median, float):
        raise UserError(f"{store}: a row has no target: prift-inspect verify says more")
    tau = -median
    sums = _Sums(manifest, tau)
    for block in target_blocks(manifest, shards):
        sums.add(block)
    return StoreNumbers(
        num_rows=rows.height, num_dropped_rows=sum(_lines(dropped_path(store, shard.index)) for shard in shards),
        num_tokens=int(rows["num_tokens"].sum()), num_targets=int(rows["num_targets"].sum()), num_shards=len(shards),
        num_bytes=sum(shard.path.stat().st_size for shard in shards),
        longest_row=int(rows["num_tokens"].to_numpy().max()),
        tau=tau, columns=sums.columns(), histograms=sums.histograms(), rules=sums.rules(),
        kept_by_mass=sums.kept_by["mass"].tolist(), kept_by_prob=sums.kept_by["prob_threshold"].tolist(),
        positions=sums.positions(), tokens=sums.tokens(),
    )  # fmt: skip


def _lines(path: Place) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def rules_of(columns: Sequence[str]) -> list[Weighting]:
    """Every rule that the columns of a store allow, with its defaults and the prior as source."""
    return [
        Weighting(rule, "prior", {**RULE_PARAMETERS[rule], **_CHOSEN.get(rule, {})}, None, None)  # type: ignore[dict-item]
        for rule, needed in RULE_COLUMNS.items()
        if set(needed) <= set(columns)
    ]


class _Sums:
    """What is added up over the blocks: nothing here grows with the number of targets."""

    def __init__(self, manifest: Manifest, tau: float):
        names, size = manifest.float_columns, manifest.vocab_size
        self._stop_ids, self._row_nll = torch.tensor(manifest.stop_token_ids), torch.tensor([tau])
        self._edges = {"prob": np.linspace(0, 1, 21), "u": np.linspace(0, 1, 21)}
        if "entropy" in names:
            self._edges["entropy"] = np.linspace(0, math.log(size), 25)
        self._counts = {name: np.zeros(len(edges) - 1, np.int64) for name, edges in self._edges.items()}
        self._totals = dict.fromkeys(names, (0.0, math.inf, -math.inf))
        self._weights = [(weighting, WeightSums()) for weighting in rules_of(names)]
        self.kept_by = {rule: np.zeros(len(THRESHOLDS), np.int64) for rule in ("mass", "prob_threshold")}
        self._by_token = np.zeros((4, size))
        self._by_position = np.zeros((3, 64))
        self._num_targets = 0

    def add(self, block: TargetBlock) -> None:
        """Add the targets of a block."""
        self._num_targets += len(block.ids_N)
        for name, values_N in block.columns.items():
            total, low, high = self._totals[name]
            found = float(values_N.sum(dtype=np.float64)), float(values_N.min()), float(values_N.max())
            self._totals[name] = (total + found[0], min(low, found[1]), max(high, found[2]))
        shown = {"prob": block.prob_N, "u": block.u_N, "entropy": block.columns.get("entropy")}
        for name, edges in self._edges.items():
            # float32 entropy may exceed ln V by its rounding.
            self._counts[name] += np.histogram(np.clip(shown[name], edges[0], edges[-1]), edges)[0]
        columns = {name: torch.from_numpy(it) for name, it in block.columns.items()}
        statistics = TargetStatistics(columns, self._row_nll, columns.get(TARGET_WEIGHT))
        is_stop_N = torch.isin(torch.from_numpy(block.ids_N), self._stop_ids)
        for weighting, sums in self._weights:
            sums.add(weighting.weights(statistics, is_stop_N), is_stop_N)
        self._add_thresholds(block)
        is_kept_N = (mass_at(0.5).weights(statistics, is_stop_N) > 0).numpy().astype(np.float64)
        self._add_groups(block, is_kept_N)

    def _add_thresholds(self, block: TargetBlock) -> None:
        likely_first = np.sort(block.columns["logprob"])[::-1]
        best_first = {"mass": np.sort(block.columns["mass_rank"]), "prob_threshold": likely_first}
        for rule, values_N in best_first.items():
            self.kept_by[rule] += [num_kept(rule, threshold, values_N) for threshold in THRESHOLDS]

    def _add_groups(self, block: TargetBlock, is_kept_N: np.ndarray) -> None:
        bin_N = np.frexp(block.place_N + 1.0)[1] - 1  # 0; 1-2; 3-6; 7-14; ...
        for table, group_N, values in (
            (self._by_token, block.ids_N, (None, block.prob_N, block.u_N, is_kept_N)),
            (self._by_position, bin_N, (None, block.prob_N, is_kept_N)),
        ):
            for line, weights_N in zip(table, values, strict=True):
                line += np.bincount(group_N, weights_N, minlength=len(line))

    def columns(self) -> dict[str, Column]:
        """Means and ranges of the statistics."""
        return {name: Column(total / self._num_targets, low, high) for name, (total, low, high) in self._totals.items()}

    def histograms(self) -> dict[str, Histogram]:
        """Counts with their edges."""
        return {name: Histogram(edges.tolist(), self._counts[name].tolist()) for name, edges in self._edges.items()}

    def rules(self) -> list[tuple[Weighting, Outlook]]:
        """What each rule does."""
        return [(weighting, sums.outlook()) for weighting, sums in self._weights]

    def positions(self) -> list[PositionBin]:
        """Bins that double in width, those with targets."""
        filled = np.flatnonzero(self._by_position[0])
        return [
            PositionBin(2**place - 1, 2 ** (place + 1) - 2, int(count), prob / count, kept / count)
            for place in filled.tolist()
            for count, prob, kept in [self._by_position[:, place].tolist()]
        ]

    def tokens(self) -> list[TokenNumbers]:
        """Every id that is a target."""
        return [
            TokenNumbers(token, int(count), prob / count, u / count, int(count - kept))
            for token in np.flatnonzero(self._by_token[0]).tolist()
            for count, prob, u, kept in [self._by_token[:, token].tolist()]
        ]


def mass_at(threshold: float) -> Weighting:
    """PriFT-mass at a threshold of u."""
    return Weighting("mass", "prior", {"threshold": threshold}, None, None)


def num_kept(rule: str, threshold: float, values_N: np.ndarray) -> int:
    """How many targets a rule with a threshold keeps.

    The rule itself is asked, but for some of them only: it keeps the best supported ones, however many these are.

    Args:
        rule: mass or prob_threshold.
        values_N: float32, the statistic that the rule reads, the best supported target first.
    """
    (parameter,), (column,) = RULE_PARAMETERS[rule], RULE_COLUMNS[rule]
    weighting, no_stop = Weighting(rule, "prior", {parameter: threshold}, None, None), torch.zeros(1, dtype=torch.bool)

    def is_dropped(place: int) -> bool:
        value = torch.tensor([values_N[place]])
        return float(weighting.weights(TargetStatistics({column: value}), no_stop)) == 0

    return bisect_left(range(len(values_N)), True, key=is_dropped)

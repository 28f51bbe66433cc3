"""Several score stores as one: their rows numbered through, store by store, and drawn in the proportions asked for."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from shared.config import StoreShare
from shared.errors import UserError
from shared.score_store import TARGET_WEIGHT, Manifest
from stage2_train.cache import CachedRow, RowCounts, ScoreCache
from stage2_train.plan import order_of_rows

_PERIOD = 100_000
"""Draws after which the order of stores repeats: shares are multiples of its inverse."""


class MixedCounts:
    """`RowCounts` of several stores, one after the other."""

    def __init__(self, counts: Sequence[RowCounts]):
        self._counts = counts
        self._starts = np.cumsum([0, *(len(each) for each in counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        places = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        found = np.zeros(places.shape, np.int64)
        for start, stop, counts in zip(self._starts, self._starts[1:], self._counts, strict=False):
            is_here = (places >= start) & (places < stop)
            found[is_here] = counts[places[is_here] - start]
        return found

    def sum(self) -> int:
        """Values of all rows."""
        return sum(each.sum() for each in self._counts)


class MixedCache:
    """Rows of several stores, numbered through in their order; see `stage2_train.cache.TrainingRows`."""

    def __init__(self, parts: Sequence[ScoreCache], weights: Sequence[float] | None):
        """
        Args:
            weights: share of the draws that each store gets; None: each row once per epoch.
        """
        self._parts = list(parts)
        self.manifest = parts[0].manifest
        self.weights = weights
        names = [each.key if weights is None else f"{each.key}*{weight!r}" for each, weight in
                 zip(parts, weights or [0.0] * len(parts), strict=True)]  # fmt: skip
        self.key = "+".join(names)
        self.lengths = MixedCounts([each.lengths for each in parts])
        self.num_targets = MixedCounts([each.num_targets for each in parts])
        self._starts = np.cumsum([0, *(len(each) for each in parts)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def parts(self) -> list[ScoreCache]:
        """The stores."""
        return self._parts

    @property
    def column_names(self) -> tuple[str, ...]:
        """Statistics of every row; with `target_weight` where any of the stores has it."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.column_names))

    def row(self, index: int) -> CachedRow:
        """A row by its number."""
        place, within = self._find(index)
        row = self.parts[place].row(within)
        if TARGET_WEIGHT in self.column_names and TARGET_WEIGHT not in row.statistics:
            ones = np.ones(len(row.target_positions), np.float32)
            row = CachedRow(row.input_ids, row.target_positions, {**row.statistics, TARGET_WEIGHT: ones})
        return row

    def stored_rows(self, indices: Sequence[int], columns: Sequence[str]) -> list[dict[str, list[Any]]]:
        """Columns of some rows, read from the Parquet files themselves."""
        found = [self._find(index) for index in indices]
        rows: dict[tuple[int, int], dict[str, list[Any]]] = {}
        for place, part in enumerate(self.parts):
            within = [row for which, row in found if which == place]
            for row, record in zip(within, part.stored_rows(within, columns) if within else [], strict=True):
                rows[place, row] = record
        return [rows[key] for key in found]

    def _find(self, index: int) -> tuple[int, int]:
        """Which store holds a row, and where in it."""
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        return place, index - int(self._starts[place])


class MixedPlan:
    """The order of examples of a run that draws from several stores in proportion.

    After any number of draws each store was drawn from as often as its share says, give or take as many draws as there
    are stores. A store that is drawn from more often than it has rows begins again, in another order.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float], batch_size: int, num_steps: int, seed: int
    ):  # fmt: skip
        """
        Args:
            sizes: rows of each store.
            weights: one for each, > 0; only their proportion matters.

        Raises:
            UserError: a share is too small.
        """
        self.batch_size, self.num_steps = batch_size, num_steps
        self._sizes, self._seed = sizes, seed
        self._per_period = _shares(weights)
        # The t-th draw of a store is due when (t + 1/2) / its draws of the period is over.
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self._per_period])
        stores = np.repeat(np.arange(len(sizes)), self._per_period)
        self._store_of_draw = stores[np.argsort(due, kind="stable")]
        taken = self._store_of_draw[:, None] == np.arange(len(sizes))
        self._before = np.cumsum(taken, axis=0) - taken
        """(period, stores): how often each store was drawn from before each draw."""
        self._starts = np.cumsum([0, *sizes])
        # A step may see the end of one epoch of each store and the beginning of the next.
        self._order = lru_cache(maxsize=2 * len(sizes))(order_of_rows)

    def rows_of_step(self, step: int) -> np.ndarray:
        """Rows (int64, batch_size of them) of a step, steps counted from 1."""
        draws = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        periods, places = np.divmod(draws, _PERIOD)
        stores = self._store_of_draw[places]
        turns = periods * self._per_period[stores] + self._before[places, stores]
        rows = np.zeros(len(draws), np.int64)
        for store, size in enumerate(self._sizes):
            is_here = stores == store
            epochs, within = np.divmod(turns[is_here], size)
            found = np.zeros(len(within), np.int64)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                found[of_epoch] = self._order(size, self._seed, epoch, store)[within[of_epoch]]
            rows[is_here] = self._starts[store] + found
        return rows

    def num_draws(self) -> list[int]:
        """How often the whole run draws from each store."""
        periods, place = divmod(self.batch_size * self.num_steps, _PERIOD)
        rest = np.bincount(self._store_of_draw[:place], minlength=len(self._sizes))
        return (periods * self._per_period + rest).tolist()


def _shares(weights: Sequence[float]) -> np.ndarray:
    """Draws of each store in a period: int64, their sum is the period."""
    exact = np.array(weights) / sum(weights) * _PERIOD
    counts = np.floor(exact).astype(np.int64)
    for store in np.argsort(counts - exact, kind="stable")[: _PERIOD - counts.sum()]:
        counts[store] += 1
    if (counts == 0).any():
        raise UserError(
            f"train.scores: weight {weights[int(np.argmin(counts))]} is less than a {_PERIOD:,}th of the sum "
            f"{sum(weights)}: too little to draw from the store at all"
        )
    return counts


def refuse_incompatible(parts: Sequence[ScoreCache], starts_from_prior: bool) -> None:
    """Refuse stores that cannot be trained from together.

    What differs in how rows were made and scored (template, targets, lengths, engine, dtypes) may differ.

    Args:
        starts_from_prior: the model is that which scored, so it must be one.

    Raises:
        UserError: they differ in what training needs; names both stores and the fields.
    """
    first = parts[0]
    for part in parts[1:]:
        ours, theirs = (_needs(each.manifest, starts_from_prior) for each in (first, part))
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            way_out = "; give train.model to train from stores of several priors" if differing == ["prior"] else ""
            raise UserError(
                f"train.scores: {part.store} cannot be trained from beside {first.store}: they differ in "
                f"{', '.join(differing)}{way_out}"
            )


def _needs(manifest: Manifest, starts_from_prior: bool) -> dict[str, Any]:
    needs: dict[str, Any] = {f"tokenizer.{name}": it for name, it in manifest.tokenizer.model_dump().items()}
    needs |= {
        "vocab_size": manifest.vocab_size,
        "stop_token_ids": sorted(manifest.stop_token_ids),
        "statistics_version": manifest.identity.statistics_version,
    }
    return {**needs, "prior": manifest.identity.prior_weights} if starts_from_prior else needs


def described(cache: MixedCache, shares: Sequence[StoreShare], plan: Any) -> list[str]:
    """A line for each store: its rows, and how often they are drawn."""
    if not isinstance(plan, MixedPlan):
        return [f"  {share.store}: {len(part):,} rows" for share, part in zip(shares, cache.parts, strict=True)]
    total = plan.batch_size * plan.num_steps
    return [
        f"  {share.store}: {len(part):,} rows, drawn {draws:,} times ({draws / total:.2%}), "
        f"{draws / len(part):.2f} epochs"
        for share, part, draws in zip(shares, cache.parts, plan.num_draws(), strict=True)
    ]

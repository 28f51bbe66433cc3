"""Numbers that are not finite: the run stops at the first one, or goes on past as many as it was allowed.

DeepSpeed leaves an update out where the gradient's norm is not finite, and says nothing.
"""

import math
from collections.abc import Callable

import numpy as np

from shared.errors import UserError
from stage2_train.step import StepTotals

_ADVICE = "Lower train.learning_rate, raise train.warmup_ratio, or look at these rows"


class NonFiniteGuard:
    """Counts the steps whose loss or gradient is not finite; the same on all ranks."""

    def __init__(self, most: int, row_ids: Callable[[np.ndarray], list[str]], says: Callable[[str], None]):
        """
        Args:
            most: steps that are let pass, over the whole run.
            row_ids: names of rows, quoted.
            says: prints a warning, on one rank.
        """
        self.num_steps = 0
        self._most, self._row_ids, self._says = most, row_ids, says

    def check_loss(self, step: int, rows: np.ndarray, totals: StepTotals) -> bool:
        """Look at the loss before the update; whether it is finite.

        Raises:
            UserError: it is not, and no more are let pass; nothing was applied.
        """
        is_bad_R = ~np.isfinite(totals.row_nll_R)
        if not is_bad_R.any() and math.isfinite(totals.loss):
            return True
        named = rows[is_bad_R] if is_bad_R.any() else rows
        self._count(f"step {step}: the loss is not finite before the update", named)
        return False

    def check_update(self, step: int, rows: np.ndarray, grad_norm: float, was_applied: bool) -> None:
        """Look at the gradient of a finite loss, and whether DeepSpeed applied the update.

        Raises:
            UserError: the norm is not finite or the update was left out, and no more of these are let pass.
        """
        if math.isfinite(grad_norm) and was_applied:
            return
        left = "was applied all the same" if was_applied else "was not applied"
        self._count(f"step {step}: the gradient's norm is {grad_norm}; the update {left}", rows)

    def _count(self, message: str, rows: np.ndarray) -> None:
        self.num_steps += 1
        message = f"{message}; rows concerned: {', '.join(self._row_ids(rows))}"
        if self.num_steps > self._most:
            allowed = f" train.max_nonfinite_steps={self._most} such steps are let pass." if self._most else ""
            raise UserError(f"{message}.{allowed} {_ADVICE}")
        self._says(f"WARNING: {message} ({self.num_steps} of {self._most} that train.max_nonfinite_steps lets pass)")

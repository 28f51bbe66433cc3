"""The recorded batch: the same at any number of ranks, and how far its loss may be off."""

from pathlib import Path

import pytest

from shared.errors import UserError
from stage2_train.probe import refuse_other_loss


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_rounding_passes_and_more_does_not(dtype: str, bound: float):
    for stored in (0.7, 12.0):
        refuse_other_loss(stored, stored * (1 + 0.9 * bound), dtype, Path("step-0000001"))
        for computed in (stored * (1 + 1.1 * bound), stored * (1 - 1.1 * bound), float("nan"), float("inf")):
            with pytest.raises(UserError, match="step-0000001: expected nll"):
                refuse_other_loss(stored, computed, dtype, Path("step-0000001"))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-7), ("bfloat16", 1e-4)])
def test_rows_learnt_by_heart_leave_rounding_alone(dtype: str, bound: float):
    """One bit of one probability makes a mean nll of 0 one of 1e-8."""
    for stored in (0.0, 1e-9, 1e-4):
        refuse_other_loss(stored, stored + 0.9 * bound, dtype, Path("step-0000001"))
        with pytest.raises(UserError, match="step-0000001: expected nll"):
            refuse_other_loss(stored, stored + 1.1 * bound, dtype, Path("step-0000001"))

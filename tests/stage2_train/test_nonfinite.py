"""What counts as a step that is not finite, and when a run stops for it."""

import math

import numpy as np
import pytest

from shared.errors import UserError
from stage2_train.nonfinite import NonFiniteGuard
from stage2_train.step import StepTotals

ROWS = np.array([7, 3, 5])


def totals(loss: float, *row_nll: float) -> StepTotals:
    return StepTotals(loss, 3.0, 3, 1.0, 0, 0.0, 10, 0, np.array(row_nll))


def guard(most: int) -> tuple[NonFiniteGuard, list[str]]:
    said: list[str] = []
    return NonFiniteGuard(most, lambda rows: [f"row-{row}" for row in rows], said.append), said


def test_finite_steps_are_not_counted():
    made, said = guard(0)
    assert made.check_loss(1, ROWS, totals(0.5, 1.0, 2.0, 3.0))
    made.check_update(1, ROWS, 1e30, True)
    assert (made.num_steps, said) == (0, [])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_rows_that_are_not_finite_are_named(bad: float):
    with pytest.raises(UserError, match=r"step 4: the loss is not finite before the update; rows concerned: row-3\. "):
        guard(0)[0].check_loss(4, ROWS, totals(bad, 1.0, bad, 3.0))


def test_where_no_row_is_to_blame_all_are_named():
    with pytest.raises(UserError, match="rows concerned: row-7, row-3, row-5"):
        guard(0)[0].check_loss(4, ROWS, totals(math.nan, 1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("norm", "was_applied", "expected"),
    [(math.inf, False, "inf; the update was not applied"), (1.0, False, "1.0; the update was not applied"),
     (math.nan, True, "nan; the update was applied all the same")],
)  # fmt: skip
def test_an_update_that_deepspeed_left_out_is_seen(norm: float, was_applied: bool, expected: str):
    with pytest.raises(UserError, match=expected):
        guard(0)[0].check_update(2, ROWS, norm, was_applied)


def test_as_many_as_allowed_pass_with_a_warning_each_over_the_whole_run():
    made, said = guard(2)
    assert not made.check_loss(1, ROWS, totals(math.nan, math.nan, 1.0, 1.0))
    made.check_update(5, ROWS, math.inf, False)
    assert [line.split(";")[0] for line in said] == [
        "WARNING: step 1: the loss is not finite before the update", "WARNING: step 5: the gradient's norm is inf",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"train\.max_nonfinite_steps=2 such steps are let pass"):
        made.check_update(9, ROWS, math.inf, False)

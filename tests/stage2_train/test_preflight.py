"""Refusals of weights that belong to other tokens."""

from pathlib import Path

import numpy as np
import pytest

from shared.errors import UserError
from stage2_train.cache import open_cache
from stage2_train.preflight import refuse_misaligned, stored_logprobs


def test_the_model_must_agree_row_by_row(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    refuse_misaligned(cache, [3, 4], [0.009, 0.0], {"float32"}, "model")
    for dtypes in ({"bfloat16"}, {"float32", "bfloat16"}):  # the coarser of training and scoring decides
        refuse_misaligned(cache, [3, 4], [0.49, 0.0], dtypes, "model")
    row_id = cache.stored_rows([4], ["row_id"])[0]["row_id"]
    for bad in (0.02, float("nan")):
        with pytest.raises(UserError, match=rf"row '{row_id}'.*belong to other tokens"):
            refuse_misaligned(cache, [3, 4], [0.0, bad], {"float32"}, "model")


def test_stored_logprobs_are_those_of_the_targets(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, ("logprob",), tmp_path)
    for stored, index in zip(stored_logprobs(cache, [7, 1]), (7, 1), strict=True):
        row = cache.row(index)
        assert np.array_equal(np.flatnonzero(~np.isnan(stored)), row.target_positions)
        assert np.array_equal(stored[row.target_positions], row.statistics["logprob"])

"""Numbers of a store where the rules are delicate: thresholds among ties, empty shards, missing columns."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from inspection.measure import measure, num_kept, rules_of
from inspection.store_numbers import THRESHOLDS
from shared.errors import UserError
from shared.rules import RULE_COLUMNS
from shared.shards import write_shard
from shared.weighting import TargetStatistics, Weighting


@pytest.mark.parametrize(("rule", "parameter", "column"), [("mass", "threshold", "mass_rank"),
                                                           ("prob_threshold", "min_prob", "logprob")])  # fmt: skip
def test_what_a_threshold_keeps_is_what_the_rule_keeps(rule: str, parameter: str, column: str):
    """Values on the thresholds themselves, their float32 neighbours, ties and both ends."""
    grid = np.array(THRESHOLDS, np.float32)
    near = np.concatenate([np.nextafter(grid, np.float32(side)) for side in (-1, 2)])
    unit = np.clip(np.concatenate([grid, grid, near, 1 - grid]), 0, 1).astype(np.float32)
    values = unit if rule == "mass" else np.log(np.maximum(unit, 1e-30))
    values = np.sort(values) if rule == "mass" else np.sort(values)[::-1]
    statistics = TargetStatistics({column: torch.from_numpy(values.copy())})
    counts = []
    for threshold in THRESHOLDS:
        weighting = Weighting(rule, "prior", {parameter: threshold}, None, None)
        weights = weighting.weights(statistics, torch.zeros(len(values), dtype=torch.bool))
        counts.append(int(weights.sum()))
        assert num_kept(rule, threshold, values) == counts[-1]
    assert len(set(counts)) > 50


def test_every_rule_is_there_where_its_columns_are():
    assert [it.rule for it in rules_of(["logprob", "mass_rank", "entropy", "entropy_top20", "collision"])] == list(
        RULE_COLUMNS
    )
    assert {it.rule for it in rules_of(["logprob", "mass_rank"])} & {"entropy", "deft", "idft"} == set()


def test_a_shard_without_rows_and_a_column_less(tmp_path: Path, manifest_with, scored_row, store_of):
    manifest = manifest_with(4, 2, columns=("logprob", "mass_rank"))
    rows = [scored_row(index) for index in range(4)]
    rows = [dataclasses.replace(row, statistics={name: row.statistics[name] for name in ("logprob", "mass_rank")})
            for row in rows]  # fmt: skip
    store = store_of(tmp_path / "store", manifest, rows)
    write_shard(
        store, 0, manifest, [], [{"row_id": f"row-{n}", "source_index": n, "reason": "none"} for n in range(2)], {}
    )
    numbers = measure(store)
    assert (numbers.num_rows, numbers.num_dropped_rows, numbers.num_targets, numbers.num_shards) == (2, 2, 6, 2)
    assert "entropy" not in numbers.histograms
    assert [(it.first, it.last, it.num_targets) for it in numbers.positions] == [(0, 0, 2), (1, 2, 4)]


def test_a_store_without_rows_and_one_without_ranks_are_refused(tmp_path: Path, manifest_with, scored_row, store_of):
    manifest = manifest_with(1, 1)
    store = store_of(tmp_path / "empty", manifest, [])
    with pytest.raises(UserError, match="no row in it"):
        measure(store)
    lean = manifest_with(1, 1, columns=("logprob",))
    row = scored_row(0)
    row = dataclasses.replace(row, statistics={"logprob": row.statistics["logprob"]})
    with pytest.raises(UserError, match="mass_rank is missing"):
        measure(store_of(tmp_path / "lean", lean, [row]))


def test_rows_that_do_not_hold_are_refused(tmp_path: Path, manifest_with, scored_row, store_of):
    row = scored_row(0, input_ids=np.array([1, 10, 20, 100_000, 2], np.int32))
    with pytest.raises(UserError, match="outside the vocabulary"):
        measure(store_of(tmp_path / "store", manifest_with(1, 1), [row]))

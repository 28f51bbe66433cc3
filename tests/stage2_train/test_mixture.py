"""Several stores in one run: which rows a step draws, and the rows behind their numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.config import StoreShare, TrainConfig
from shared.errors import UserError
from shared.load_config import load_config
from shared.score_store import TARGET_WEIGHT
from shared.weighting import resolve_weighting
from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import ScoreCache, open_cache
from stage2_train.mixture import MixedCache, MixedPlan, described, refuse_incompatible
from stage2_train.outlook import weight_outlook
from stage2_train.plan import make_plan


def drawn(plan: Any, steps: range) -> np.ndarray:
    return np.concatenate([plan.rows_of_step(step) for step in steps])


@pytest.mark.parametrize(
    ("sizes", "weights"),
    [
        ([700, 300], [0.7, 0.3]),
        ([50, 5000], [0.7, 0.3]),
        ([10, 20, 30, 40], [1, 2, 3, 4]),
        ([40, 30, 20, 10], [1, 2, 3, 4]),
        ([7, 11, 13], [1 / 3, 1 / 3, 1 / 3]),
        ([1000, 10], [0.999, 0.001]),
        ([5, 5], [1, 1e-4]),
    ],
)
def test_after_any_number_of_draws_the_shares_are_those_asked_for(sizes: list[int], weights: list[float]):
    plan = MixedPlan(sizes, weights, 16, 15_000, seed=3)
    rows = drawn(plan, range(1, 15_001))  # 240,000 draws: more than two periods
    stores = np.searchsorted(np.cumsum(sizes), rows, side="right")
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(stores[:, None] == np.arange(len(sizes)), axis=0)
    quota = (np.arange(len(rows)) + 1)[:, None] * shares
    # Two of rounding to a period's whole draws, the rest of taking turns.
    assert np.abs(counts - quota).max() <= len(sizes) + 2
    assert plan.num_draws() == counts[-1].tolist()


def test_each_store_is_passed_through_whole_and_then_again_in_another_order():
    sizes = [30, 200]
    rows = drawn(MixedPlan(sizes, [0.5, 0.5], 10, 40, seed=1), range(1, 41))
    first, second = rows[rows < 30], rows[rows >= 30]
    assert len(first) == len(second) == 200
    epochs = first[:180].reshape(6, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert sorted(second) == list(range(30, 230))
    # Stores of one size are not drawn from in the same order.
    rows = drawn(MixedPlan([50, 50], [1, 1], 10, 10, seed=1), range(1, 11))
    assert rows[rows < 50].tolist() != (rows[rows >= 50] - 50).tolist()


def test_a_step_is_a_function_of_its_number():
    sizes, weights = [33, 17, 80], [0.2, 0.5, 0.3]
    plan = MixedPlan(sizes, weights, 24, 6000, seed=7)
    in_order = [plan.rows_of_step(step) for step in range(1, 6001)]
    for step in (6000, 1, 4167, 4168, 17, 2500):
        again = MixedPlan(sizes, weights, 24, 6000, seed=7)
        np.testing.assert_array_equal(again.rows_of_step(step), in_order[step - 1])
    # As quick as any other: nothing is replayed.
    assert len(MixedPlan(sizes, weights, 24, 10**9, seed=7).rows_of_step(10**9)) == 24
    assert not np.array_equal(MixedPlan(sizes, weights, 24, 6000, seed=8).rows_of_step(1), in_order[0])


def test_only_the_proportion_of_weights_matters():
    one, other = (MixedPlan([30, 50], weights, 8, 100, seed=0) for weights in ([0.7, 0.3], [7, 3]))
    np.testing.assert_array_equal(drawn(one, range(1, 101)), drawn(other, range(1, 101)))


def test_a_share_that_is_never_drawn_is_refused():
    with pytest.raises(UserError, match="weight 1e-07 is less than a 100,000th of the sum"):
        MixedPlan([10, 10], [1.0, 1e-7], 4, 10, seed=0)


def test_one_store_is_drawn_from_as_before():
    # Written out: a run that was begun by an older version goes on in the same order.
    plan = make_plan(10, 4, 2, None, seed=5)
    assert [plan.rows_of_step(step).tolist() for step in (1, 3)] == [[4, 6, 9, 8], [6, 3, 1, 2]]


@pytest.fixture
def two(scored_store: Path, manifest_with, scored_row, store_of, tmp_path: Path) -> list[Path]:
    """A store of four rows and one of six, of other lengths."""
    folders = []
    for name, count in (("four", 4), ("six", 6)):
        manifest = manifest_with(count, 4)
        rows = [scored_row(n, row_id=f"{name}-{n}") for n in range(count)]
        folders.append(store_of(tmp_path / name, manifest, rows))
    return folders


def opened(folders: list[Path], tmp_path: Path, weights: list[float] | None = None) -> MixedCache:
    return MixedCache([open_cache(folder, ("logprob", "mass_rank"), tmp_path / "cache") for folder in folders], weights)


def test_rows_are_numbered_through(two: list[Path], tmp_path: Path, read_store):
    cache, stored = opened(two, tmp_path), [row for folder in two for row in read_store(folder)]
    assert len(cache) == len(stored) == 10
    for number, row in enumerate(stored):
        found = cache.row(number)
        assert found.input_ids.tolist() == row["input_ids"]
        assert found.statistics["logprob"].tolist() == [value for value in row["logprob"] if value is not None]
    order = [9, 0, 4, 3, 5, 9]
    assert [row["row_id"] for row in cache.stored_rows(order, ["row_id"])] == [stored[n]["row_id"] for n in order]
    places = np.array([[9, 0], [4, 3]])
    np.testing.assert_array_equal(cache.lengths[places], [[5, 5], [5, 5]])
    np.testing.assert_array_equal(cache.num_targets[2:7], [3] * 5)
    assert (cache.lengths.sum(), cache.num_targets.sum()) == (50, 30)


def test_the_key_names_content_and_proportion(two: list[Path], tmp_path: Path):
    keys = [open_cache(folder, ("logprob",), tmp_path / "cache").key for folder in two]
    assert opened(two, tmp_path).key == f"{keys[0]}+{keys[1]}"
    assert opened(two, tmp_path, [0.7, 0.3]).key == f"{keys[0]}*0.7+{keys[1]}*0.3"


def test_a_store_without_weights_of_its_own_beside_one_with(
    two: list[Path], tmp_path: Path, manifest_with, scored_row, store_of
):
    manifest = manifest_with(2, 4)
    manifest = manifest.model_copy(update={"source": manifest.source.model_copy(update={"weighted": True})})
    rows = []
    for n in range(2):
        row = scored_row(n)
        row.statistics[TARGET_WEIGHT] = np.array([0.5, 2.0, 3.0], np.float32)
        rows.append(row)
    weighted = store_of(tmp_path / "weighted", manifest, rows)
    for folders in ([two[0], weighted], [weighted, two[0]]):
        cache = opened(folders, tmp_path)
        batch = make_batch(cache, np.arange(6), (0, 1, 4, 5), (), BatchForm(packed=True))
        ones, given = [1.0] * 6, [0.5, 2.0, 3.0] * 2
        expected = ones + given if folders[0] == two[0] else given + ones
        assert batch.prior[TARGET_WEIGHT].tolist() == expected


def test_the_outlook_is_that_of_what_the_run_sees(two: list[Path], tmp_path: Path):
    weighting = resolve_weighting(TrainConfig(method="prift_prob"))

    def mean_of(folders: list[Path], weights: list[float] | None) -> float:
        outlook = weight_outlook(opened(folders, tmp_path, weights), weighting)
        assert outlook is not None
        return outlook.mean

    alone = [
        float(np.exp(np.array(open_cache(folder, ("logprob",), tmp_path / "cache").columns["logprob"])).mean())
        for folder in two
    ]
    assert mean_of(two, None) == pytest.approx((4 * alone[0] + 6 * alone[1]) / 10, rel=1e-6)
    # All of the second store's 18 targets, as many of the first's.
    assert mean_of(two, [0.4, 0.6]) == pytest.approx((4 * alone[0] + 6 * alone[1]) / 10, rel=1e-6)


def changed(cache: ScoreCache, **manifest: Any) -> ScoreCache:
    cache.manifest = cache.manifest.model_copy(update=manifest)
    return cache


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("vocab_size", 101, "vocab_size"),
        ("stop_token_ids", (2, 3), "stop_token_ids"),
    ],
)
def test_stores_that_differ_in_what_training_needs(two: list[Path], tmp_path: Path, field: str, value: Any, named: str):
    parts = opened(two, tmp_path).parts
    refuse_incompatible(parts, True)
    changed(parts[1], **{field: value})
    with pytest.raises(UserError) as refused:
        refuse_incompatible(parts, False)
    assert str(refused.value) == (
        f"train.scores: {two[1]} cannot be trained from beside {two[0]}: they differ in {named}"
    )


def test_tokenizers_and_priors(two: list[Path], tmp_path: Path):
    parts = opened(two, tmp_path).parts
    identity = parts[1].manifest.identity
    # How rows were made and scored may differ.
    changed(parts[1], identity=identity.model_copy(update={"template": "plain", "max_length": 7, "engine": "vllm"}))
    refuse_incompatible(parts, True)
    changed(parts[1], identity=identity.model_copy(update={"prior_weights": "0" * 64}))
    refuse_incompatible(parts, False)
    with pytest.raises(UserError, match=r"they differ in prior; give train\.model to train from stores of several"):
        refuse_incompatible(parts, True)
    tokenizer = parts[1].manifest.tokenizer.model_copy(update={"token_map": "0" * 64})
    changed(parts[1], tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"they differ in tokenizer\.token_map, prior$"):
        refuse_incompatible(parts, True)


def test_what_is_said_before_the_run(two: list[Path], tmp_path: Path):
    shares = [StoreShare(store="four"), StoreShare(store="six")]
    plan = MixedPlan([4, 6], [0.7, 0.3], 2, 10, seed=0)
    assert described(opened(two, tmp_path, [0.7, 0.3]), shares, plan) == [
        "  four: 4 rows, drawn 14 times (70.00%), 3.50 epochs",
        "  six: 6 rows, drawn 6 times (30.00%), 1.00 epochs",
    ]
    assert described(opened(two, tmp_path), shares, make_plan(10, 2, 1, None, 0)) == [
        "  four: 4 rows",
        "  six: 6 rows",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{store: a, weight: 1}, b]", "train.scores gives b no weight, but others: give all of them one, or none"),
        ("[a, b, a]", "train.scores names a twice: give it the sum of both weights"),
        ("[{store: a, weight: 0}, {store: b, weight: 1}]", "train.scores.0.weight=0: input should be greater than 0"),
        ("[{store: a, wieght: 1}]", "unknown key train.scores.0.wieght; the nearest known one is train.scores"),
        ("3", "train.scores=3: expected a folder, or a list of folders or of {store, weight}"),
        ("[{weight: 1}]", "train.scores.0.store"),
    ],
)
def test_lists_that_make_no_sense(tmp_path: Path, given: str, message: str):
    (tmp_path / "pipeline.yaml").write_text(f"train: {{scores: {given}}}\n")
    with pytest.raises(UserError) as refused:
        load_config(tmp_path / "pipeline.yaml")
    assert message in str(refused.value)

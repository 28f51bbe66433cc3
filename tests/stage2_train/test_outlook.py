"""What is said of a rule before the first step."""

from pathlib import Path

import numpy as np
import pytest

from shared.outlook import Outlook, describe, warnings_of
from shared.weighting import Weighting
from stage2_train.cache import ScoreCache, open_cache
from stage2_train.outlook import weight_outlook

PROB = Weighting("prob", "prior", {}, None, None)


@pytest.fixture
def cache(scored_store: Path, tmp_path: Path) -> ScoreCache:
    return open_cache(scored_store, ("logprob", "mass_rank"), tmp_path)


def mass(threshold: float) -> Weighting:
    return Weighting("mass", "prior", {"threshold": threshold}, None, 1.0)


def outlook_of(cache: ScoreCache, weighting: Weighting) -> Outlook:
    outlook = weight_outlook(cache, weighting)
    assert outlook is not None
    return outlook


def test_shares_equal_those_counted_apart(cache: ScoreCache):
    logprob, mass_rank = (np.array(cache.columns[name], dtype=np.float64) for name in ("logprob", "mass_rank"))
    prob = outlook_of(cache, PROB)
    weights = np.exp(logprob)
    assert prob.num_targets == len(weights)
    assert prob.kept_share == 1
    assert prob.mean == pytest.approx(weights.mean(), rel=1e-6)
    assert prob.effective_share == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / len(weights), rel=1e-6)
    kept = mass_rank <= 0.5
    kept[cache.target_ids(10**6) == cache.manifest.stop_token_ids[0]] = True
    half = outlook_of(cache, mass(0.5))
    assert half.kept_share == half.effective_share == pytest.approx(kept.mean())
    assert f"{kept.mean():.1%} keep a weight" in describe(half)
    assert f"they count as {kept.sum():,} effective ones" in describe(half)


def test_stop_tokens_without_support_are_told_of(cache: ScoreCache):
    """The warning follows the weights that the rule gives to the stop tokens of this very store."""
    (eos,) = cache.manifest.stop_token_ids
    assert warnings_of(outlook_of(cache, PROB), PROB) == [], "the demo's prior knows where a text ends"
    # A prior that does not.
    cache.columns["logprob"] = np.where(cache.target_ids(10**6) == eos, -8.0, cache.columns["logprob"])
    (warning,) = warnings_of(outlook_of(cache, PROB), PROB)
    assert "mean weight of 0.0003" in warning
    assert "stop_token_weight=1" in warning
    given = Weighting("prob", "prior", {}, None, 1.0)
    assert warnings_of(outlook_of(cache, given), given) == []


@pytest.mark.parametrize(
    "weighting", [Weighting("prob", "online", {}, None, None), Weighting("sft", "prior", {}, None, None)]
)
def test_nothing_is_said_of_what_is_not_known_or_all_alike(cache: ScoreCache, weighting: Weighting):
    assert weight_outlook(cache, weighting) is None


@pytest.mark.parametrize(
    ("weighting", "kept", "effective", "expected"),
    [
        (mass(0.5), 0.04, 0.04, "WARNING: rule mass keeps 4.00% of the targets: little is learnt"),
        (mass(0.5), 0.06, 0.06, None),
        (mass(0.1), 0.94, 0.94, None),
        (mass(0.1), 0.96, 0.96, "nearly plain fine-tuning; look at its parameters (threshold=0.1)"),
        (PROB, 1.0, 0.6, None),
        (PROB, 1.0, 0.03, "WARNING: rule prob effectively trains on 3.00% of the targets"),
        (PROB, 0.0, 0.0, "WARNING: rule prob effectively trains on 0.00% of the targets"),
    ],
)
def test_rules_that_keep_hardly_any_or_nearly_all_are_told_of(
    weighting: Weighting, kept: float, effective: float, expected: str | None
):
    found = warnings_of(Outlook(1000, kept, effective, 0.5, None), weighting)
    assert len(found) == (expected is not None)
    assert expected is None or expected in found[0]

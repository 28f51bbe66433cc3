"""The rules against reference numbers and against formulas written out in plain Python."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from shared.config import TrainConfig, WeightingConfig
from shared.errors import UserError
from shared.rules import METHODS, RULE_COLUMNS, RULE_PARAMETERS
from shared.weighting import TargetStatistics, Weighting, resolve_weighting

GOLDEN: dict[str, tuple[str, dict[str, float]]] = {
    "sft": ("sft", {}),
    "prob": ("prob", {}),
    "mass(threshold=0.5)": ("mass", {}),
    "mass(threshold=0.1)": ("mass", {"threshold": 0.1}),
    "prob_power(alpha=2)": ("prob_power", {"alpha": 2.0}),
    "prob_threshold(min_prob=0.1)": ("prob_threshold", {}),
    "prob_above(min_prob=0.1)": ("prob_above", {"min_prob": 0.1}),
    "infosft(max_prob=0.93)": ("infosft", {}),
    "entropy(k=20,scale=3.0,alpha=1)": ("entropy", {}),
    "chord": ("chord", {}),
    "deft": ("deft", {}),
    "idft(beta=1,gamma=[0.1,2])": ("idft", {}),
}
"""Entries of step0.json: the rule and the parameters that are not its defaults."""

LOGPROBS = [0.0, -0.0, -1e-8, -1e-4, -0.07, -0.7, -2.5, -9.0, -50.0, -200.0]


def weighting(rule: str, **fields: Any) -> Weighting:
    """The rule as a config resolves it."""
    return resolve_weighting(TrainConfig(weighting=WeightingConfig(rule=rule, **fields)))  # pyright: ignore


def weights_of(rule: str, columns: dict[str, list[float]], row_nll: list[float] | None = None, **fields: Any) -> Tensor:
    count = len(next(iter(columns.values())))
    given = {name: torch.tensor(values, dtype=torch.float32) for name, values in columns.items()}
    seen = TargetStatistics(given, None if row_nll is None else torch.tensor(row_nll))
    return weighting(rule, **fields).weights(seen, torch.zeros(count, dtype=torch.bool))


@pytest.fixture(scope="module")
def golden_columns(reference: Path) -> dict[str, Tensor]:
    rows = pq.read_table(reference / "golden" / "gsm8k_scores.parquet").slice(0, 16).to_pylist()
    return {
        column: torch.tensor([value for row in rows for value in row[column] if value is not None])
        for column in ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
    }


@pytest.fixture(scope="module")
def golden_step(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "golden" / "step0.json").read_text())


def test_every_rule_is_compared_with_something():
    # talr is not among the reference numbers; its formula is written out below.
    assert {rule for rule, _ in GOLDEN.values()} | {"talr"} == set(RULE_COLUMNS) == set(RULE_PARAMETERS)


def test_every_reference_entry_is_compared(golden_step: dict[str, Any]):
    assert golden_step["rules"].keys() == GOLDEN.keys()


@pytest.mark.parametrize("entry", GOLDEN)
def test_rule_gives_the_reference_numbers(entry: str, golden_columns: dict[str, Tensor], golden_step: dict[str, Any]):
    rule, fields = GOLDEN[entry]
    expected = golden_step["rules"][entry]
    # A rule gets the columns that it declares and no other: one that reads more fails here.
    seen = TargetStatistics({name: golden_columns[name] for name in RULE_COLUMNS[rule]})
    num_targets = golden_step["targets"]
    weights = weighting(rule, **fields).weights(seen, torch.zeros(num_targets, dtype=torch.bool)).double()
    assert len(golden_columns["logprob"]) == len(weights) == num_targets
    loss = (weights * -golden_columns["logprob"].double()).sum() / num_targets
    assert weights.mean().item() == pytest.approx(expected["mean_weight"], rel=1e-5)
    # Not one of the targets may be on the other side.
    assert (weights == 0).double().mean().item() == pytest.approx(expected["zero_fraction"], abs=0.5 / num_targets)
    assert loss.item() == pytest.approx(expected["loss_at_step_0"], rel=2e-5)


@pytest.mark.parametrize("floor", [None, 0.2])
def test_talr_by_its_formula(floor: float | None):
    logprobs = [-0.01, -0.4, -1.3, -3.0, -8.0, -40.0]
    row_nll = [0.9, 5.0, 1.7, 0.2, 2.2]
    tau = statistics.median(row_nll)
    expected = [max(math.exp(logprob) ** (1 / tau), floor or 0.01) for logprob in logprobs]
    fields = {} if floor is None else {"floor": floor}
    ours = weights_of("talr", {"logprob": logprobs}, row_nll, **fields)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=0.0)
    assert weighting("talr").needs_row_nll
    assert not weighting("prob").needs_row_nll


def plain(rule: str, logprob: float, entropy: float, top20: float, collision: float, mass_rank: float) -> float:
    """The table of docs/design.md in plain Python, default parameters (alpha 2, min_prob 0.1 where there are none)."""
    p = math.exp(logprob)
    match rule:
        case "sft":
            return 1.0
        case "prob":
            return p
        case "mass":
            return float(mass_rank <= 0.5)
        case "prob_power":
            return p**2
        case "prob_threshold":
            return float(p >= 0.1)
        case "prob_above":
            return p if p >= 0.1 else 0.0
        case "infosft":
            return p * max(0.0, 1 - math.log(p / (1 - p)) / math.log(0.93 / 0.07))
        case "entropy":
            return top20 / 3
        case "chord":
            return p * (1 - p)
        case "deft":
            return p**collision
        case "idft":
            return p ** min(max(math.exp(-(logprob + entropy)), 0.1), 2.0)
    raise AssertionError(rule)


PARAMETERS = {"prob_power": {"alpha": 2.0}, "prob_above": {"min_prob": 0.1}}
TARGETS = [
    # logprob, entropy, entropy_top20, collision, mass_rank
    (-0.02, 0.1, 0.09, 0.95, 0.0),
    (-0.05, 0.3, 0.2, 0.9, 0.0),
    (-0.69, 1.2, 1.1, 0.4, 0.2),
    (-2.0, 3.5, 2.7, 0.06, 0.5),
    (-2.31, 3.5, 2.7, 0.06, 0.51),
    (-7.0, 2.0, 1.9, 0.2, 0.97),
]


@pytest.mark.parametrize("rule", sorted(set(RULE_COLUMNS) - {"talr"}))
def test_rule_by_its_formula(rule: str):
    names = ("logprob", "entropy", "entropy_top20", "collision", "mass_rank")
    columns = {name: [target[place] for target in TARGETS] for place, name in enumerate(names)}
    ours = weights_of(rule, columns, **PARAMETERS.get(rule, {}))
    torch.testing.assert_close(ours, torch.tensor([plain(rule, *target) for target in TARGETS]), rtol=2e-5, atol=1e-7)


def test_mass_keeps_the_target_at_exactly_the_threshold():
    # u = 1 - mass_rank >= threshold: with threshold 0.5 a mass_rank of 0.5 is kept, the next float32 above is not.
    above = 0.5 + 2**-24
    assert weights_of("mass", {"mass_rank": [0.5, above + 2**-24]}).tolist() == [1.0, 0.0]
    assert weights_of("mass", {"mass_rank": [0.75, 0.7501]}, threshold=0.25).tolist() == [1.0, 0.0]
    # threshold 1 keeps the likeliest token alone.
    assert weights_of("mass", {"mass_rank": [0.0, 1e-6]}, threshold=1.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rule", sorted(RULE_COLUMNS))
def test_weights_are_finite_at_the_ends_of_the_scale(rule: str):
    for entropy in (0.0, 1e-8, 2.0, 11.0):
        columns = {
            "logprob": LOGPROBS,
            "mass_rank": [0.0] * 5 + [1.0] * 5,
            "entropy": [entropy] * 10,
            "entropy_top20": [min(entropy, 2.99)] * 10,
            "collision": [1.0] * 5 + [1e-6] * 5,
        }
        for row_nll in ([0.0], [1e-9, 0.0, 0.0], [2.0, 1.0]):
            ours = weights_of(rule, columns, row_nll, **PARAMETERS.get(rule, {}))
            assert torch.isfinite(ours).all(), (rule, ours)
            assert (ours >= 0).all(), (rule, ours)
            assert ours.dtype == torch.float32


@pytest.mark.parametrize("max_prob", [0.5, 0.3])
def test_infosft_refuses_a_max_prob_that_turns_the_rule_over(max_prob: float):
    # logit(0.5) = 0 divides by zero: infinite weights. Below it the sign of the rule is the other way round.
    with pytest.raises(ValueError, match="max_prob"):
        weighting("infosft", max_prob=max_prob)


def test_floor_then_stop_token_weight():
    seen = TargetStatistics({"logprob": torch.tensor([-0.1, -5.0, -5.0])})
    is_stop = torch.tensor([False, False, True])
    p = [math.exp(-0.1), math.exp(-5.0)]
    cases: list[tuple[dict[str, float], list[float]]] = [
        ({}, [p[0], p[1], p[1]]),
        ({"floor": 0.1}, [p[0], 0.1, 0.1]),
        ({"stop_token_weight": 1.0}, [p[0], p[1], 1.0]),
        # The stop token's weight replaces that of the rule, floor and all.
        ({"floor": 0.1, "stop_token_weight": 0.0}, [p[0], 0.1, 0.0]),
    ]
    for fields, expected in cases:
        torch.testing.assert_close(weighting("prob", **fields).weights(seen, is_stop), torch.tensor(expected))
    ones = weighting("sft", stop_token_weight=3.0).weights(TargetStatistics({}), is_stop)
    assert ones.tolist() == [1.0, 1.0, 3.0]


def test_weights_carry_no_gradient():
    logprob = torch.tensor([-0.5, -2.0], requires_grad=True)
    seen = TargetStatistics({"logprob": logprob}, torch.tensor([1.0]))
    for rule in ("prob", "talr", "infosft", "chord"):
        weights = weighting(rule).weights(seen, torch.zeros(2, dtype=torch.bool))
        assert not weights.requires_grad, rule


def test_methods_of_the_paper():
    assert METHODS.keys() == {"sft", "dft", "prift_prob", "prift_mass"}
    for method, rule, source, columns in [
        ("sft", "sft", "prior", ()),
        ("dft", "prob", "online", ("logprob",)),
        ("prift_prob", "prob", "prior", ("logprob",)),
        ("prift_mass", "mass", "prior", ("mass_rank",)),
    ]:
        resolved = resolve_weighting(TrainConfig(method=method))
        assert (resolved.rule, resolved.source, resolved.columns) == (rule, source, columns)
        assert (resolved.floor, resolved.stop_token_weight) == (None, None)
    assert resolve_weighting(TrainConfig(method="prift_mass")).parameters == {"threshold": 0.5}


def test_every_rule_that_reads_statistics_runs_from_either_source():
    for rule in RULE_COLUMNS.keys() - {"sft"}:
        for source in ("prior", "online"):
            assert weighting(rule, source=source, **PARAMETERS.get(rule, {})).source == source


def test_talr_takes_floor_as_its_own_parameter():
    assert weighting("talr").parameters == {"floor": 0.01}
    assert weighting("talr", floor=0.05).parameters == {"floor": 0.05}
    assert weighting("talr", floor=0.05).floor is None


def test_neither_method_nor_rule_is_refused():
    with pytest.raises(UserError, match=r"train\.method or train\.weighting\.rule"):
        resolve_weighting(TrainConfig())

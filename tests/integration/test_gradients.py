"""Loss and gradient norm against references: golden numbers, and a one-process float64 program."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from launching import Finished, metrics_of
from transformers import AutoModelForCausalLM

TrainCases = Callable[..., Finished]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_first_step_equals_the_golden_numbers(
    golden_store: Path, reference: Path, train_cases: TrainCases, tmp_path: Path, stage: int, ranks: int
):
    rules = json.loads((reference / "golden/step0.json").read_text())["rules"]
    golden = {"sft": "sft", "prift_prob": "prob", "prift_mass": "mass(threshold=0.5)"}
    cases = [
        [f"train.scores={golden_store}", f"train.method={method}", "train.batch_size=16", "train.max_steps=1",
         f"train.output={tmp_path}/{method}", f"train.deepspeed.zero_optimization.stage={stage}"]
        for method in golden
    ]  # fmt: skip
    done = train_cases(cases, ranks)
    assert done.code == 0, done.output
    for method, name in golden.items():
        (line,) = metrics_of(tmp_path / method)
        assert line["loss"] == pytest.approx(rules[name]["loss_at_step_0"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(rules[name]["grad_norm"], rel=1e-4)
        assert line["weight_mean"] == pytest.approx(rules[name]["mean_weight"], rel=1e-5)
        assert line["weight_zero_fraction"] == pytest.approx(rules[name]["zero_fraction"])
        assert line["num_targets"] == 3133


RULES = {
    "sft": [], "prob": [], "mass": [], "prob_power": ["alpha=2"], "prob_threshold": [], "prob_above": ["min_prob=0.1"],
    "talr": [], "infosft": [], "entropy": [], "chord": [], "deft": [], "idft": [],
}  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rule_source_and_normalisation_against_float64(
    demo_store: Path, train_cases: TrainCases, tmp_path: Path, ranks: int
):
    """The trained model is the prior, so both sources must give the numbers that the store's columns give."""
    normalisations = ["targets", "kept", "weights"]
    combinations = [
        (rule, source, normalisations[index % 3])
        for index, (rule, source) in enumerate(itertools.product(RULES, ["prior", "online"]))
    ] + [("mass", "prior", "kept"), ("prob", "online", "weights"), ("prob", "prior", "micro_batch")]
    shared = [("talr", "online", "targets"), ("prob", "prior", "micro_batch"), ("mass", "prior", "kept")]
    cases, expected = [], []
    for index, (rule, source, normalisation) in enumerate(combinations + shared):
        output = tmp_path / f"{index}-{rule}-{source}-{normalisation}"
        sequence_parallel = ranks if index >= len(combinations) else 1
        parameters = [f"train.weighting.{parameter}" for parameter in RULES[rule]]
        examples = ["train.micro_batch_examples=4"] if normalisation == "micro_batch" else []
        cases.append([f"train.scores={demo_store}", f"train.weighting.rule={rule}", f"train.weighting.source={source}",
                      f"train.normalize_by={normalisation}", "train.batch_size=24", "train.max_steps=1",
                      "train.micro_batch_tokens=512", f"train.sequence_parallel={sequence_parallel}",
                      f"train.output={output}", *parameters, *examples])  # fmt: skip
        expected.append((output, *reference_step(demo_store, rule, normalisation)))
    done = train_cases(cases, ranks)
    assert done.code == 0, done.output
    for output, loss, grad_norm in expected:
        (line,) = metrics_of(output)
        assert line["loss"] == pytest.approx(loss, rel=2e-5), output.name
        assert line["grad_norm"] == pytest.approx(grad_norm, rel=2e-4), output.name


def reference_step(store: Path, rule: str, normalisation: str) -> tuple[float, float]:
    """Loss and gradient norm of step 1 by a plain float64 loop over single examples."""
    generator = np.random.Generator(np.random.Philox(key=np.array([0, 0], dtype=np.uint64)))
    order = generator.permutation(96)[:24]
    table = pq.read_table(sorted(store.glob("*.parquet"))).to_pylist()
    rows = [table[index] for index in order]
    prior = json.loads((store / "store.json").read_text())["prior_name"]
    model = AutoModelForCausalLM.from_pretrained(prior, dtype=torch.float64)
    tau = float(np.median([-np.mean(_targets(row, "logprob")) for row in rows]))
    if len(rows) % 2 == 0:  # torch takes the lower of the two middle values
        tau = sorted(-np.mean(_targets(row, "logprob")) for row in rows)[len(rows) // 2 - 1]
    sums, weights, counts = [], [], []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        logits = model(ids[None]).logits[0].double()
        positions = [i for i, value in enumerate(row["logprob"]) if value is not None]
        nll = F.cross_entropy(logits[[i - 1 for i in positions]], ids[positions], reduction="none")
        row_weights = torch.tensor([_weight(rule, row, i, tau) for i in positions], dtype=torch.float64)
        sums.append((row_weights * nll).sum())
        weights += row_weights.tolist()
        counts.append(len(positions))
    loss = sum(sums) / _denominator(normalisation, weights, counts)
    if normalisation == "micro_batch":
        groups = [range(start, start + 4) for start in range(0, 24, 4)]
        loss = sum(sum(sums[i] for i in group) / sum(counts[i] for i in group) for group in groups) / len(groups)
    loss.backward()
    return float(loss), float(sum(p.grad.square().sum() for p in model.parameters()).sqrt())


def _denominator(normalisation: str, weights: list[float], counts: list[int]) -> float:
    kept = sum(weight != 0 for weight in weights)
    return {"targets": sum(counts), "kept": kept, "weights": sum(weights), "micro_batch": 1}[normalisation]


def _targets(row: dict, column: str) -> list[float]:
    return [value for value in row[column] if value is not None]


def _weight(rule: str, row: dict, i: int, tau: float) -> float:
    p, logprob = math.exp(row["logprob"][i]), row["logprob"][i]
    match rule:
        case "sft":
            return 1.0
        case "prob":
            return p
        case "mass":
            return float(1 - row["mass_rank"][i] >= 0.5)
        case "prob_power":
            return p**2
        case "prob_threshold":
            return float(p >= 0.1)
        case "prob_above":
            return p if p >= 0.1 else 0.0
        case "talr":
            return max(p ** (1 / tau), 0.01)
        case "infosft":
            logit = math.log(p / -math.expm1(logprob)) if logprob < 0 else math.inf
            return p * max(0.0, 1 - logit / math.log(0.93 / 0.07))
        case "entropy":
            return row["entropy_top20"][i] / 3
        case "chord":
            return p * (1 - p)
        case "deft":
            return p ** row["collision"][i]
        case "idft":
            return p ** min(max(math.exp(-(logprob + row["entropy"][i])), 0.1), 2.0)
    raise AssertionError(rule)

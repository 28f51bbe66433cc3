"""Every parameter's gradient, as the optimizer is given it, against a one-process float64 program."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from launching import REPOSITORY, finish, free_port
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stage2_train.plan import make_plan

BATCH_SIZE = 24
METHODS = {
    "sft": ["train.method=sft"],
    "dft": ["train.method=dft"],
    "prift_prob": ["train.method=prift_prob"],
    "prift_mass": ["train.method=prift_mass"],
    "entropy": ["train.weighting.rule=entropy", "train.weighting.source=online"],
}
MICRO_BATCHES = {"small": "train.micro_batch_tokens=200", "large": "train.micro_batch_tokens=100000"}
FLOAT32, BFLOAT16 = "train.dtype=float32", "train.dtype=bfloat16"
PACKED, PADDED = "train.padding_free=true", "train.padding_free=false"
# A few rows of logits at a time, a number that divides nothing.
CHUNKS = "train.logits_mebibytes=1"


@dataclass(frozen=True)
class Reference:
    """What the float64 program gives for a method."""

    loss: float
    gradients: Path


@pytest.fixture(scope="session")
def trainee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model with grouped queries; its vocabulary is the demo's, rounded up to fill several chunks."""
    folder = tmp_path_factory.mktemp("trainee")
    torch.manual_seed(0)
    sizes = {"vocab_size": 4001, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1))
    # bfloat16 holds these weights exactly, so that both dtypes train the same model.
    model.bfloat16().float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(REPOSITORY / "data/demo/prior").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(demo_store: Path) -> list[dict]:
    """Of the first step."""
    table = pq.read_table(sorted(demo_store.glob("*.parquet"))).to_pylist()
    return [table[index] for index in make_plan(len(table), BATCH_SIZE, 1, None, 0).rows_of_step(1)]


@pytest.fixture(scope="session")
def methods(rows: list[dict]) -> dict[str, list[str]]:
    """METHODS, and rules that keep a single target of the step, on one of the ranks, and none at all."""
    probs = sorted(math.exp(value) for row in rows for value in row["logprob"] if value is not None)
    threshold = "train.weighting.rule=prob_threshold"
    one = [threshold, f"train.weighting.min_prob={(probs[-1] + probs[-2]) / 2!r}"]
    return {**METHODS, "one": one, "none": [threshold, "train.weighting.min_prob=1.0"]}


@pytest.fixture(scope="session")
def references(rows: list[dict], trainee: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Loss and gradients of the first step by a plain float64 loop over single examples."""
    folder = tmp_path_factory.mktemp("references")
    found = {}
    for method in (*METHODS, "one", "none"):
        model = AutoModelForCausalLM.from_pretrained(trainee, dtype=torch.float64)
        highest = max(value for row in rows for value in row["logprob"] if value is not None)
        loss = sum(weighted_sum(model, row, method, highest) for row in rows) / sum(map(num_targets, rows))
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        save_file(gradients, folder / f"{method}.safetensors")
        found[method] = Reference(float(loss.detach()), folder / f"{method}.safetensors")
    return found


def weighted_sum(model, row: dict, method: str, highest: float) -> torch.Tensor:
    """
    Args:
        highest: log-probability of the target that the prior supports most.
    """
    ids = torch.tensor(row["input_ids"])
    positions = [i for i, value in enumerate(row["logprob"]) if value is not None]
    logits = model(ids[None]).logits[0][[i - 1 for i in positions]]
    nll = F.cross_entropy(logits, ids[positions], reduction="none")
    prior = {name: torch.tensor([row[name][i] for i in positions]).double() for name in ("logprob", "mass_rank")}
    top = logits.detach().topk(20).values.softmax(-1)
    weights = {
        "sft": torch.ones_like(nll),
        "dft": (-nll).exp().detach(),
        "prift_prob": prior["logprob"].exp(),
        "prift_mass": (prior["mass_rank"] <= 0.5).double(),
        "entropy": -(top * top.log()).sum(-1) / 3,
        "one": (prior["logprob"] == highest).double(),
        "none": torch.zeros_like(nll),
    }[method]
    return (weights * nll).sum()


def num_targets(row: dict) -> int:
    return sum(value is not None for value in row["logprob"])


@pytest.fixture
def run_gradients(pipeline: Path, tmp_path: Path) -> Callable[..., list[dict]]:
    """Gradients of many cases in one process group of so many ranks."""

    def run(engines: list[list[str]], cases: list[tuple[list[str], str]], ranks: int) -> list[dict]:
        plan, output = tmp_path / f"plan-{free_port()}.json", tmp_path / "found.json"
        plan.write_text(json.dumps({"engines": engines, "cases": cases, "output": str(output)}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        done = finish([sys.executable, *launcher, "tests/integration/run_gradients.py", str(pipeline), str(plan)])
        assert done.code == 0, done.output
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_equal_a_float64_reference(
    references: dict[str, Reference], methods: dict[str, list[str]], trainee: Path, demo_store: Path, tmp_path: Path,
    run_gradients, stage: int, ranks: int,
):  # fmt: skip
    """dtype x packed, padded, sequence parallel and offloaded x micro-batch size x method."""
    zero = "train.deepspeed.zero_optimization"
    offload = [f"{zero}.offload_optimizer.device=cpu"] + [f"{zero}.offload_param.device=cpu"] * (stage == 3)
    forms = [[PACKED], [PADDED], *([["train.sequence_parallel=2"]] if ranks == 2 else [])]
    engines = [[dtype, *form] for dtype, form in itertools.product((FLOAT32, BFLOAT16), forms)]
    engines += [[dtype, PACKED, *offload] for dtype in (FLOAT32, BFLOAT16)]
    common = [f"train.scores={demo_store}", f"train.model={trainee}", f"train.batch_size={BATCH_SIZE}", CHUNKS,
              f"train.output={tmp_path}/run", f"{zero}.stage={stage}"]  # fmt: skip
    cases = {
        (method, size): ([*common, *methods[method], MICRO_BATCHES[size]], str(references[method].gradients))
        for method, size in itertools.product(methods, MICRO_BATCHES)
    }
    found = run_gradients(engines, list(cases.values()), ranks)
    assert len(found) == len(engines) * len(cases)
    for method, case in zip([method for _ in engines for method, _ in cases], found, strict=True):
        dtype = case["engine"][0]
        assert case["loss"] == pytest.approx(references[method].loss, rel=LARGEST_ERROR[dtype]), (method, case)
        assert case["error"] < LARGEST_ERROR[dtype], (method, case)
        assert (case["norm"] == 0) == (method == "none")


@pytest.mark.parametrize("tied", [False, True])
def test_zero_3_gathers_the_head_once_a_micro_batch(
    trainee: Path, demo_store: Path, pipeline: Path, tmp_path: Path, tied: bool
):
    """In a steady state, however many chunks of logits there are; the embedding is gathered once besides."""
    model = AutoModelForCausalLM.from_pretrained(trainee, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(trainee).save_pretrained(tmp_path / "model")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    zero = "train.deepspeed.zero_optimization"
    done = finish([
        sys.executable, *launcher, "tests/integration/run_gathers.py", str(pipeline), str(tmp_path / "found.json"),
        f"train.scores={demo_store}", f"train.model={tmp_path}/model", "train.method=prift_mass", CHUNKS,
        "train.batch_size=24", f"train.output={tmp_path}/run", f"{zero}.stage=3", "train.micro_batch_tokens=300",
        f"{zero}.stage3_param_persistence_threshold=0",
    ])  # fmt: skip
    assert done.code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    # In the first step DeepSpeed only learns in which order parameters are used.
    for step in found[1:]:
        assert step["micro_batches"] > 1
        assert step["gathers"] == step["micro_batches"] * (1 if tied else 2)


LARGEST_ERROR = {FLOAT32: 3e-6, BFLOAT16: 0.02}
"""Of a gradient, relative to its norm: rounding of float32, and of bfloat16 activations with float32 sums."""

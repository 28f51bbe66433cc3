"""LoRA in real trainings: gradients, what a checkpoint holds, resuming, and the two forms of export."""

import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from launching import REPOSITORY, Finished, finish, metrics_of
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shared.errors import UserError
from shared.load_config import load_config
from stage2_train.plan import make_plan
from stage2_train.setup import prepare

PRIOR = REPOSITORY / "data/demo/prior"
FLOAT32, BFLOAT16 = "train.dtype=float32", "train.dtype=bfloat16"
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = ["train.lora.rank=4", "train.lora.alpha=8", f"train.lora.target_modules={TARGETS}"]
STAGE = "train.deepspeed.zero_optimization.stage"


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with grouped queries and a head of its own; bfloat16 holds its weights exactly."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    sizes = {"vocab_size": 1001, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.1))
    model.bfloat16().float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(PRIOR).save_pretrained(folder)
    return folder


class Reference:
    """Adapters of random A and B, and the gradients of a plain float64 program of peft, by method."""

    def __init__(self, trainee: Path, store: Path, folder: Path):
        table = scored_rows(store)
        rows = [table[index] for index in make_plan(len(table), 24, 1, None, 0).rows_of_step(1)]
        num_targets = sum(value is not None for row in rows for value in row["logprob"])
        self.adapters, self.gradients, self.losses = folder / "adapters.safetensors", {}, {}
        for method in ("prift_prob", "dft"):
            model = AutoModelForCausalLM.from_pretrained(trainee, dtype=torch.float64)
            get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
            torch.manual_seed(1)
            trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
            for parameter in trained.values():
                parameter.data = (0.1 * torch.randn(parameter.shape)).bfloat16().double()
            save_file({name: parameter.data.float() for name, parameter in trained.items()}, self.adapters)
            loss = sum(weighted_sum(model, row, method) for row in rows) / num_targets
            loss.backward()
            self.losses[method] = float(loss.detach())
            self.gradients[method] = folder / f"{method}.safetensors"
            save_file({name: parameter.grad for name, parameter in trained.items()}, self.gradients[method])


def scored_rows(store: Path) -> list[dict]:
    return pq.read_table(sorted(store.glob("*.parquet"))).to_pylist()


def weighted_sum(model: Any, row: dict, method: str) -> torch.Tensor:
    ids = torch.tensor(row["input_ids"])
    positions = [i for i, value in enumerate(row["logprob"]) if value is not None]
    logits = model(ids[None]).logits[0][[i - 1 for i in positions]]
    nll = F.cross_entropy(logits, ids[positions], reduction="none")
    weights = torch.tensor([math.exp(row["logprob"][i]) for i in positions]) if method == "prift_prob" else (-nll).exp()
    return (weights.detach() * nll).sum()


@pytest.fixture(scope="module")
def reference(untied: Path, demo_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(untied, demo_store, tmp_path_factory.mktemp("reference"))


LARGEST_ERROR = {FLOAT32: 3e-6, BFLOAT16: 0.03}
"""Of the gradient of each matrix, relative to its norm."""


@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_of_the_adapters_equal_a_float64_reference(
    reference: Reference, untied: Path, demo_store: Path, pipeline: Path, tmp_path: Path, ranks: int
):
    """ZeRO stage x packed, padded, recomputed, offloaded, sequence parallel x given weights and online ones."""
    recomputed = "train.gradient_checkpointing=true"
    forms = [[FLOAT32, "train.padding_free=true"], [FLOAT32, "train.padding_free=false", recomputed],
             [BFLOAT16, "train.gradient_checkpointing=offload"]]  # fmt: skip
    if ranks == 2:
        forms.append([FLOAT32, "train.sequence_parallel=2", recomputed])
    engines = [[*form, f"{STAGE}={stage}"] for stage, form in itertools.product((1, 2, 3), forms)]
    common = [f"train.scores={demo_store}", f"train.model={untied}", "train.batch_size=24", *LORA,
              "train.logits_mebibytes=1", f"train.output={tmp_path}/run"]  # fmt: skip
    cases = [
        ([*common, f"train.method={method}", f"train.micro_batch_tokens={tokens}"], str(reference.gradients[method]))
        for method, tokens in (("prift_prob", 200), ("dft", 100_000))
    ]
    plan, output = tmp_path / "plan.json", tmp_path / "found.json"
    adapters = str(reference.adapters)
    plan.write_text(json.dumps({"engines": engines, "cases": cases, "output": str(output), "adapters": adapters}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = finish([sys.executable, *launcher, "tests/integration/run_gradients.py", str(pipeline), str(plan)])
    assert done.code == 0, done.output
    found = json.loads(output.read_text())
    assert len(found) == len(engines) * len(cases)
    for method, case in zip(["prift_prob", "dft"] * len(engines), found, strict=True):
        largest = LARGEST_ERROR[case["engine"][0]]
        assert case["loss"] == pytest.approx(reference.losses[method], rel=largest), case
        assert case["worst"] < largest, case
        assert case["norm"] > 0


def training(store: Path, output: Path, *more: str) -> list[str]:
    return [f"train.scores={store}", "train.batch_size=16", "train.epochs=1", "train.learning_rate=0.01",
            "train.checkpoint_steps=2", "train.keep_checkpoints=9", f"train.output={output}", *LORA, *more]  # fmt: skip


def weights_in(checkpoint: Path) -> set[str]:
    """Names of the weights in the files of a checkpoint, of whatever kind."""
    names: set[str] = set()
    for path in checkpoint.rglob("*model_states.pt"):
        state = torch.load(path, weights_only=True)
        names |= {*state["module"], *(state["frozen_param_fragments"] or {})}
    return names


def test_checkpoints_hold_the_adapters_alone_and_resume_to_the_same_bits(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    """With dropout, from an older checkpoint, at every stage, in both dtypes; and at first the model is the prior."""
    common = ["train.lora.dropout=0.1", f"train.eval_scores={demo_store}", "train.eval_steps=2"]
    settings = [("train.method=prift_mass", FLOAT32, 1), ("train.method=dft", BFLOAT16, 2),
                ("train.method=prift_mass", BFLOAT16, 3), ("train.method=dft", FLOAT32, 3)]  # fmt: skip
    runs = {tmp_path / f"run{i}": [m, d, f"{STAGE}={s}", *common] for i, (m, d, s) in enumerate(settings)}
    done = train_cases([training(demo_store, run, *more) for run, more in runs.items()], ranks=2)
    assert done.code == 0, done.output
    adapter = load_file(tmp_path / "run0/model/adapter_model.safetensors")
    assert f"trains {sum(tensor.numel() for tensor in adapter.values()):,} parameters" in done.output
    whole = {run: (metrics_of(run), files_of(run / "model"), (run / "eval.jsonl").read_text()) for run in runs}
    for run in runs:
        assert len(metrics_of(run)) == 6
        assert weights_in(run / "checkpoints/step-0000006")
        assert all("lora_" in name for name in weights_in(run / "checkpoints/step-0000006"))
    stored = [value for row in scored_rows(demo_store) for value in row["logprob"] if value is not None]
    for run, more in runs.items():
        first = json.loads((run / "eval.jsonl").read_text().splitlines()[0])
        assert first["nll"] == pytest.approx(-sum(stored) / len(stored), abs=1e-4 if FLOAT32 in more else 0.02)
    older = [training(demo_store, run, *more, f"train.resume={run}/checkpoints/step-0000002")
             for run, more in runs.items()]  # fmt: skip
    again = train_cases(older, ranks=2)
    assert again.code == 0, again.output
    assert again.output.count("after step 2") == len(runs)
    for run in runs:
        assert (metrics_of(run), files_of(run / "model"), (run / "eval.jsonl").read_text()) == whole[run]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_merged_model_is_the_base_model_with_the_adapter(
    untied: Path, demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path, ranks: int
):
    """Tied and not, both dtypes, ZeRO 1 and 3: both forms load, agree, and hold the frozen weights as they were."""
    settings = {
        (dtype, model, stage): tmp_path / f"{dtype}-{model.name}-{stage}"
        for dtype, model, stage in itertools.product(("float32", "bfloat16"), (PRIOR, untied), (1, 3))
        # Half of them at either number of ranks.
        if (ranks == 1) == ((dtype == "float32") ^ (model == PRIOR) ^ (stage == 1))
    }
    cases = [
        training(demo_store, run / export, f"train.dtype={dtype}", f"train.model={model}", f"{STAGE}={stage}",
                 "train.method=sft", "train.max_steps=3", f"train.lora.export={export}")
        for (dtype, model, stage), run in settings.items() for export in ("adapter", "merged")
    ]  # fmt: skip
    done = train_cases(cases, ranks=ranks)
    assert done.code == 0, done.output
    for (name, model, _), run in settings.items():
        dtype, folder = getattr(torch, name), run / "adapter/model"
        names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}
        assert files_of(folder).keys() == names
        adapted = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        merged = AutoModelForCausalLM.from_pretrained(run / "merged/model", dtype="auto").eval()
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        assert_same_logits(adapted, merged, base)
        found, expected = merged.state_dict(), base.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            is_target = key.split(".")[-2] in TARGETS
            assert torch.equal(found[key], tensor) == (not is_target), key


def assert_same_logits(adapted: Any, merged: Any, base: Any) -> None:
    """Up to rounding, relative to the largest logit; and training has changed them by much more."""
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        ours, theirs, before = (model(input_ids=ids).logits.float() for model in (merged, adapted, base))
    assert merged.dtype == adapted.dtype == base.dtype
    largest = theirs.abs().max() * {torch.float32: 1e-5, torch.bfloat16: 2**-6}[merged.dtype]
    assert (ours - theirs).abs().max() < largest
    assert (ours - before).abs().max() > 10 * largest


def test_a_finished_run_is_exported_in_the_other_form(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    case = training(demo_store, tmp_path / "run", "train.method=sft", "train.max_steps=2")
    done = train_cases([case, [*case, "train.lora.export=merged"]])
    assert done.code == 0, done.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert (tmp_path / "run/model/model.safetensors").is_file()
    assert not (tmp_path / "run/model/adapter_config.json").exists()
    assert len(metrics_of(tmp_path / "run")) == 2


def test_other_weights_under_the_same_name_are_refused(
    untied: Path, demo_store: Path, train_cases: Callable[..., Finished], pipeline: Path, tmp_path: Path
):
    """No checkpoint holds what the adapters were trained beside."""
    shutil.copytree(untied, tmp_path / "model")
    case = training(demo_store, tmp_path / "run", f"train.model={tmp_path}/model", "train.method=sft",
                    "train.max_steps=2")  # fmt: skip
    assert train_cases([case]).code == 0
    prepare(load_config(pipeline, case))
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["lm_head.weight"][5, 5] += 1.0
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is of a run with other settings \(train.model_weights: "):
        prepare(load_config(pipeline, case))


def test_without_peft_or_with_a_module_that_is_not_there_the_run_ends_with_one_line(
    demo_store: Path, pipeline: Path, tmp_path: Path
):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['peft'] = None\n")
    train = [sys.executable, "stage2_train/train.py", str(pipeline)]
    case = [*training(demo_store, tmp_path / "run"), "train.method=sft"]
    without = finish([*train, *case], PYTHONPATH=str(tmp_path))
    unknown = finish([*train, *case, "train.lora.target_modules=[q_prj]"])
    for done, message in (
        (without, "train.lora needs peft, which is not installed: pip install 'prift[lora]'"),
        (unknown, "no such linear module (the head stays as it is); it has down_proj, gate_proj, k_proj"),
    ):
        assert done.code == 2, done.output
        assert message in done.output
        assert "Traceback" not in done.output

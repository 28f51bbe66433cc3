"""Hugging Face's Trainer and TRL's SFTTrainer, the real ones, train from a store as this trainer does."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY, Finished, finish, metrics_of
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from shared.errors import UserError
from stage2_train.hf import ScoreStore

NUM_ROWS = 16
RULES: dict[str, dict[str, Any]] = {
    "prift_mass": {"method": "prift_mass"}, "prift_prob": {"method": "prift_prob"}, "dft": {"method": "dft"},
    "sft": {"method": "sft"}, "mass-online": {"rule": "mass", "source": "online"},
    "entropy-prior": {"rule": "entropy", "source": "prior"}, "deft-online": {"rule": "deft", "source": "online"},
    "idft-prior": {"rule": "idft", "source": "prior"},
    "mass-kept": {"method": "prift_mass", "normalize_by": "kept"},
}  # fmt: skip


@pytest.fixture(scope="module")
def model_path(reference: Path) -> Path:
    return reference / "data" / "stories260K"


@pytest.fixture(scope="module")
def ours(
    golden_store: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, float]]:
    """The first step of this trainer on all rows of the store, by rule."""
    folder = tmp_path_factory.mktemp("ours")
    cases = []
    for name, given in RULES.items():
        weighting = [f"train.weighting.{key}={value}" for key, value in given.items() if key in ("rule", "source")]
        others = [f"train.{key}={value}" for key, value in given.items() if key not in ("rule", "source")]
        cases.append([
            f"train.scores={golden_store}", f"train.batch_size={NUM_ROWS}", "train.max_steps=1", *weighting, *others,
            f"train.output={folder}/{name}",
        ])  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    runner = Path(__file__).with_name("run_cases.py")
    done = finish([sys.executable, str(runner), str(pipeline), str(folder / "cases.json")])
    assert done.code == 0, done.output
    return lambda name: metrics_of(folder / name)[0]


def arguments_of(kind: type, output: Path, micro_batch: int, **more: Any) -> Any:
    """One step over all rows, whatever the micro-batch."""
    settings = {
        "remove_unused_columns": False, "per_device_train_batch_size": micro_batch, "max_steps": 1,
        "gradient_accumulation_steps": NUM_ROWS // micro_batch, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "bf16": False, "learning_rate": 1e-3, "weight_decay": 0.0,
        "max_grad_norm": 1e9, "lr_scheduler_type": "constant",
    }  # fmt: skip
    if kind is SFTConfig:
        settings |= {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None,
                     "gradient_checkpointing": False}  # fmt: skip
    return kind(str(output), **{**settings, **more})


def trained(kind: type, store: Path, model_path: Path, folder: Path, micro_batch: int, **given: Any) -> Any:
    """A trainer after its step."""
    config = SFTConfig if kind is SFTTrainer else TrainingArguments
    arguments = arguments_of(config, folder / "run", micro_batch)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    made = ScoreStore(store, cache_dir=folder / "cache", **given)
    trainer = kind(model, arguments, **made.trainer_arguments(model, arguments, tokenizer))
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("name", RULES)
def test_the_first_step_equals_this_trainers(
    golden_store: Path, model_path: Path, ours: Callable[[str], dict[str, float]], tmp_path: Path, kind: type, name: str
):
    """Loss and norm of the gradient, in micro-batches of 4."""
    line = trained(kind, golden_store, model_path, tmp_path, 4, **RULES[name]).state.log_history[0]
    expected = ours(name)
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)  # the log is rounded
    assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_accumulation_changes_nothing(golden_store: Path, model_path: Path, tmp_path: Path, kind: type):
    norms = [
        trained(kind, golden_store, model_path, tmp_path, size, method="prift_mass").state.log_history[0]["grad_norm"]
        for size in (1, 8, 16)
    ]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("source", ["prior", "online"])
def test_weights_of_zero_leave_the_model_as_it_was(
    golden_store: Path, model_path: Path, tmp_path: Path, kind: type, source: str
):
    before = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).state_dict()
    zero = {"rule": "prob_threshold", "source": source, "min_prob": 1.0}
    still = trained(kind, golden_store, model_path, tmp_path, 8, **zero).model.state_dict()
    assert all(torch.equal(still[name], before[name]) for name in before)
    moved = trained(kind, golden_store, model_path, tmp_path, 8, **{**zero, "min_prob": 0.5}).model.state_dict()
    assert not any(torch.equal(moved[name], before[name]) for name in before if name.endswith("proj.weight"))


def test_two_processes_divide_by_the_targets_of_both(
    golden_store: Path, model_path: Path, ours: Callable[[str], dict[str, float]], tmp_path: Path
):
    """With a worker process that reads the rows, besides."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = finish([
        sys.executable, *launcher, "tests/integration/run_hf_trainer.py", str(golden_store), str(model_path),
        str(tmp_path / "run"), str(tmp_path / "cache"), "prift_mass", "4", "2",
    ])  # fmt: skip
    assert done.code == 0, done.output
    line = json.loads((tmp_path / "run" / "log.json").read_text())[0]
    assert line["loss"] == pytest.approx(ours("prift_mass")["loss"], rel=1e-5, abs=1e-5)
    assert line["grad_norm"] == pytest.approx(ours("prift_mass")["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("packing", ["packing", "padding_free"])
def test_packing_is_refused(golden_store: Path, model_path: Path, tmp_path: Path, packing: str):
    arguments = arguments_of(SFTConfig, tmp_path, 4, **{packing: True})
    model = AutoModelForCausalLM.from_pretrained(model_path)
    with pytest.raises(UserError, match=f"{packing}=True"):
        ScoreStore(golden_store, method="sft", cache_dir=tmp_path).trainer_arguments(model, arguments)


EXAMPLES = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/other-trainers.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("place", range(len(EXAMPLES)))
def test_the_examples_of_the_docs_run(golden_store: Path, model_path: Path, tmp_path: Path, place: int):
    """As they are printed, but for the paths and for the device."""
    code = EXAMPLES[place].replace('"MODEL"', f'"{model_path}"').replace('"STORE"', f'"{golden_store}"')
    code = code.replace('"runs/', f'"{tmp_path}/')
    script = tmp_path / "example.py"
    script.write_text(code)
    done: Finished = finish([sys.executable, str(script)], HOME=str(tmp_path), PYTHONPATH=str(REPOSITORY))
    assert done.code == 0, done.output
    assert "train_loss" in done.output

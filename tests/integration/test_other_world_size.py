"""A checkpoint of two ranks goes on with one, and back: the same examples in the same steps, the same losses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import Finished, metrics_of

LEVELS = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in (1, 2, 3)]


def training(store: Path, output: Path, stage: int, dtype: str, *more: str) -> list[str]:
    return [
        f"train.scores={store}", "train.method=prift_mass", "train.batch_size=8", "train.learning_rate=1e-3",
        "train.checkpoint_steps=3", "train.keep_checkpoints=9", "train.nll_every=1", f"train.output={output}",
        f"train.deepspeed.zero_optimization.stage={stage}", f"train.dtype={dtype}", *more,
    ]  # fmt: skip


def remove_after(run: Path, step: int) -> None:
    """Make a run one that was stopped after a step."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > f"step-{step:07d}":
            shutil.rmtree(folder)


def test_two_ranks_one_rank_two_ranks(demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path):
    runs = {(stage, dtype): tmp_path / f"{stage}-{dtype}" for stage, dtype in LEVELS}
    cases = [training(demo_store, runs[stage, dtype], stage, dtype) for stage, dtype in LEVELS]
    whole: dict[tuple[int, str], list[dict]] = {}
    for ranks, kept in ((2, 3), (1, 9), (2, None)):
        done = train_cases(cases, ranks)
        assert done.code == 0, done.output
        assert done.output.count(f"is converted for {ranks} ranks") == (0 if not whole else len(LEVELS))
        for level, run in runs.items():
            if not whole.get(level):
                whole[level] = metrics_of(run)
            if kept is not None:
                remove_after(run, kept)
    for (stage, dtype), run in runs.items():
        lines, expected = metrics_of(run), whole[stage, dtype]
        assert [line["step"] for line in lines] == list(range(1, 13))
        for name in ("num_targets", "num_nll_targets", "weight_mean", "weight_zero_fraction", "lr"):
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-12)
        # bfloat16 rounds each update, and what two ranks add in another order drifts: its first converted step counts.
        num_compared, rel = {"float32": (12, 1e-5), "bfloat16": (4, 1e-3)}[dtype]
        for name in ("loss", "nll", "grad_norm"):
            ours, theirs = ([line[name] for line in part[:num_compared]] for part in (lines, expected))
            assert ours == pytest.approx(theirs, rel=rel), (run, name)
        assert not list((run / "checkpoints").glob(".*"))


LORA = ["train.lora.rank=4", "train.lora.target_modules=[q_proj,down_proj]"]


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_go_on_with_another_number_of_ranks(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path, stage: int
):
    """A checkpoint holds what is trained only."""
    run = tmp_path / "run"
    case = training(demo_store, run, stage, "float32", *LORA)
    assert train_cases([case], 2).code == 0
    expected = metrics_of(run)
    remove_after(run, 6)
    done = train_cases([case], 1)
    assert done.code == 0, done.output
    assert "is converted for 1 ranks" in done.output
    assert [line["loss"] for line in metrics_of(run)] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_master_weights_are_the_same_bits_on_the_other_side(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path, stage: int
):
    """No step is made between loading with one rank and saving: the state is only spread otherwise."""
    run = tmp_path / "run"
    case = training(demo_store, run, stage, "bfloat16", "train.max_steps=3")
    assert train_cases([case], 2).code == 0
    model = (run / "model" / "model.safetensors").read_bytes()
    done = train_cases([case], 1)
    assert done.code == 0, done.output
    assert "is converted for 1 ranks" in done.output
    assert (run / "model" / "model.safetensors").read_bytes() == model
    record = json.loads((run / "checkpoints/step-0000003/trainer.json").read_text())
    assert record["world_size"] == 2
    assert torch.isfinite(torch.tensor(record["probe_nll"]))

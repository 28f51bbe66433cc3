"""Losses and gradients that are not finite: seen on all ranks, never applied, named, as many as allowed let pass."""

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Finished, finish

LEVELS = [(1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32"), (3, "bfloat16")]


def case(store: Path, output: Path, stage: int, dtype: str, kind: str, steps: list[int], most: int) -> dict[str, Any]:
    overrides = [
        f"train.scores={store}", "train.method=prift_prob", "train.batch_size=8", "train.max_steps=6",
        "train.checkpoint_steps=1", "train.keep_checkpoints=9", f"train.output={output}", f"train.dtype={dtype}",
        f"train.deepspeed.zero_optimization.stage={stage}", f"train.max_nonfinite_steps={most}",
        "train.learning_rate=1e-3",
    ]  # fmt: skip
    return {"overrides": overrides, "steps": steps, "kind": kind}


def run(cases: list[dict[str, Any]], pipeline: Path, folder: Path) -> Finished:
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return finish([sys.executable, *launcher, "tests/integration/run_nonfinite.py", str(pipeline), str(listed)])


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from tensors(part)


def state_after(output: Path, step: int) -> list[torch.Tensor]:
    """Master weights and both moments of AdamW, of rank 0."""
    (path,) = (output / f"checkpoints/step-{step:07d}/deepspeed").glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return [tensor for tensor in tensors(torch.load(path, weights_only=False)) if tensor.is_floating_point()
            and tensor.numel() > 1]  # fmt: skip


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_an_allowed_step_is_left_out_and_the_run_goes_on(demo_store: Path, pipeline: Path, tmp_path: Path, kind: str):
    outputs = [tmp_path / f"{stage}-{dtype}" for stage, dtype in LEVELS]
    cases = [
        case(demo_store, output, stage, dtype, kind, [3], 1)
        for output, (stage, dtype) in zip(outputs, LEVELS, strict=True)
    ]
    done = run(cases, pipeline, tmp_path)
    assert done.code == 0, done.output
    assert done.output.count("(1 of 1 that train.max_nonfinite_steps lets pass)") == len(LEVELS)
    for output in outputs:
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["update_applied"] for line in lines] == [True, True, False, True, True, True]
        assert [line["grad_norm"] is None for line in lines] == [False, False, True, False, False, False]
        assert [line["loss"] is None for line in lines] == [False, False, kind == "loss", False, False, False]
        states = [state_after(output, step) for step in (2, 3, 4)]
        same = [[torch.equal(a, b) for a, b in zip(*pair, strict=True)] for pair in pairwise(states)]
        assert all(same[0]), "the step that was left out changed the state"
        assert not any(same[1])
        state = json.loads((output / "checkpoints/step-0000006/trainer.json").read_text())
        assert state["num_nonfinite_steps"] == 1
        assert (output / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_one_more_than_allowed_stops_all_ranks_and_names_rows(
    demo_store: Path, pipeline: Path, tmp_path: Path, kind: str
):
    first, second = tmp_path / "first", tmp_path / "second"
    cases = [
        case(demo_store, first, 1, "float32", kind, [2], 0),
        case(demo_store, second, 3, "bfloat16", kind, [2, 4], 1),
    ]
    done = run(cases, pipeline, tmp_path)
    assert done.code == 0, done.output
    for output, step in ((first, 2), (second, 4)):
        lines = (output / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step - 1
        assert not (output / "model").exists()
        # Two ranks may print into one line.
        assert {rank for rank in (0, 1) if f"[rank {rank}] step {step}: " in done.output} == {0, 1}
    assert done.output.count("rows concerned: '") == 2 * 2 + 1

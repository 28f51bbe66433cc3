"""SIGKILL in every phase of a run, many of them inside a save: the rerun ends with the same bits."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_in import PHASES
from launching import Finished, deepspeed_command, finish, metrics_of

DTYPES = {1: "float32", 2: "bfloat16", 3: "float32"}

IN_EVERY_TEST_RUN = {
    "update of step 7, on one rank": 1,
    "second save, file half-written by rank 1": 1,
    "export, before its rename": 1,
    "after backward of step 5": 2,
    "second save, before its rename": 2,
    "third save, old one half removed": 2,
    "line of step 8 half-written": 3,
    "second save, before LATEST": 3,
    "load": 3,
}
"""Phases and the ZeRO stage that each is tried at; the others take their turn in `make test-long`."""

IN_LONG_RUNS = {
    phase: 1 + place % 3 for place, phase in enumerate(phase for phase in PHASES if phase not in IN_EVERY_TEST_RUN)
}
WHILE_RESUMING = {"load", "lines cut"}

CASES = [
    *IN_EVERY_TEST_RUN.items(),
    *(pytest.param(phase, stage, marks=pytest.mark.long) for phase, stage in IN_LONG_RUNS.items()),
]


def test_there_are_as_many_moments_as_promised():
    assert len(PHASES) >= 20
    assert sum("save" in phase for phase in PHASES) >= 5
    assert [list(IN_EVERY_TEST_RUN.values()).count(stage) for stage in (1, 2, 3)] == [3, 3, 3]


def training(store: Path, output: Path, stage: int) -> list[str]:
    return [
        f"train.scores={store}", f"train.eval_scores={store}", "train.eval_steps=6", "train.method=prift_mass",
        "train.batch_size=8", "train.learning_rate=1e-3", "train.checkpoint_steps=3", "train.keep_checkpoints=2",
        f"train.output={output}", f"train.deepspeed.zero_optimization.stage={stage}", f"train.dtype={DTYPES[stage]}",
    ]  # fmt: skip


def killed(store: Path, output: Path, stage: int, phase: str, pipeline: Path) -> Finished:
    command = deepspeed_command(2, *training(store, output, stage), pipeline=pipeline)
    place = command.index("stage2_train/train.py")
    command[place : place + 1] = ["tests/integration/killed_in.py", phase]
    return finish(command)


@pytest.fixture(scope="module")
def uninterrupted(demo_store: Path, pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A run that nobody kills, at a ZeRO stage."""
    made: dict[int, Path] = {}

    def run(stage: int) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("whole") / "run"
            done = finish(deepspeed_command(2, *training(demo_store, made[stage], stage), pipeline=pipeline))
            assert done.code == 0, done.output
        return made[stage]

    return run


def assert_same_run(run: Path, whole: Path) -> None:
    assert metrics_of(run) == metrics_of(whole)
    assert [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()] == [
        json.loads(line) for line in (whole / "eval.jsonl").read_text().splitlines()
    ]
    assert len(metrics_of(run)) == 12
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    left = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert left == ["LATEST", "step-0000009", "step-0000012"]
    assert not list(run.glob(".tmp-*"))


@pytest.mark.parametrize(("phase", "stage"), CASES)
def test_a_run_that_is_killed_resumes_to_the_same_bits(
    demo_store: Path, uninterrupted: Callable[[int], Path], pipeline: Path, tmp_path: Path, phase: str, stage: int
):
    run, whole = tmp_path / "run", uninterrupted(stage)
    if phase in WHILE_RESUMING:
        first = killed(demo_store, run, stage, "forward of step 5", pipeline)
        assert "killed in: forward of step 5" in first.output
    stopped = killed(demo_store, run, stage, phase, pipeline)
    assert stopped.code == -signal.SIGKILL, stopped.output
    assert f"killed in: {phase}" in stopped.output
    resumed = finish(deepspeed_command(2, *training(demo_store, run, stage), pipeline=pipeline))
    assert resumed.code == 0, resumed.output
    assert_same_run(run, whole)

"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint is saved, the exit code is 75, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from launching import deepspeed_command, finish, metrics_of, start
from test_kill_and_resume import training, wait_for


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if any(word.startswith("--local_rank") for word in child.cmdline())]
    return sorted(ranks, key=lambda child: child.cmdline())


def num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_signal_to_one_rank_saves_on_all_and_the_launcher_returns_75(
    demo_store: Path, pipeline: Path, tmp_path: Path
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    case = [*training(demo_store, run, 2), "train.checkpoint_steps=1000"]
    process = start(deepspeed_command(2, *case, pipeline=pipeline))
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    ranks_of(process)[1].send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    stopped_after = len(metrics_of(run))
    assert 3 <= stopped_after < 24
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{stopped_after:07d}\n"
    resumed = finish(deepspeed_command(2, *case, pipeline=pipeline))
    assert resumed.code == 0, resumed.output
    assert f"after step {stopped_after}" in resumed.output
    done = finish(deepspeed_command(2, *training(demo_store, whole, 2), pipeline=pipeline))
    assert done.code == 0, done.output
    assert metrics_of(run) == metrics_of(whole)
    assert (run / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_job_saves_within_the_grace_of_the_launcher(
    demo_store: Path, pipeline: Path, tmp_path: Path, number: signal.Signals
):
    """As a scheduler or a terminal does: launcher and ranks get it, the ranks twice, and some of them late."""
    run = tmp_path / "run"
    case = [*training(demo_store, run, 1), "train.checkpoint_steps=1000"]
    process = start(deepspeed_command(2, *case, pipeline=pipeline))
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    ranks = ranks_of(process)
    os.killpg(process.pid, number)
    process.communicate(timeout=120)
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{len(metrics_of(run)):07d}\n"


def test_torchrun_passes_the_signal_on_and_waits(demo_store: Path, pipeline: Path, tmp_path: Path):
    run = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--shutdown-timeout", "60"]
    case = [*training(demo_store, run, 3), "train.checkpoint_steps=1000"]
    process = start([sys.executable, *launcher, "stage2_train/train.py", str(pipeline), *case])
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    process.terminate()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output  # torchrun's, whatever the ranks return
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{len(metrics_of(run)):07d}\n"


def test_a_signal_before_the_first_step_ends_at_once(demo_store: Path, pipeline: Path, tmp_path: Path):
    run = tmp_path / "run"
    process = start([sys.executable, "stage2_train/train.py", str(pipeline), *training(demo_store, run, 1)])
    wait_for(lambda: run.is_dir(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert not (run / "model").exists()


SLOW_EVALUATION = """
import sys, time
import stage2_train.evaluate as module
sums = module._sums
def slow(*arguments):
    print("evaluating", flush=True)
    time.sleep(0.5)
    return sums(*arguments)
module._sums = slow
sys.argv = ["train.py", *sys.argv[1:]]
from stage2_train.train import main
main()
"""


def test_an_evaluation_is_left_and_made_up_for(demo_store: Path, pipeline: Path, tmp_path: Path):
    run = tmp_path / "run"
    case = [*training(demo_store, run, 1), "train.max_steps=4", "train.eval_steps=2", "train.micro_batch_tokens=64",
            f"train.eval_scores={{first: {demo_store}, second: {demo_store}}}"]  # fmt: skip
    process = start([sys.executable, "-c", SLOW_EVALUATION, str(pipeline), *case])
    wait_for(lambda: num_lines(run / "metrics.jsonl") == 2, process)  # it evaluates now, or is about to
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = finish([sys.executable, "stage2_train/train.py", str(pipeline), *case])
    assert done.code == 0, done.output
    evaluations = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [(line["step"], line["name"]) for line in evaluations] == [
        (step, name) for step in (0, 2, 4) for name in ("first", "second")
    ]

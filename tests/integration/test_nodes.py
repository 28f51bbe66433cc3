"""Two launchers as two nodes, and what becomes of a run that loses a node or a rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import deepspeed_command, finish, free_port, metrics_of, start
from test_kill_and_resume import training, wait_for
from test_stop_signals import num_lines, ranks_of

TIMEOUT = 8
"""Seconds, train.timeout_seconds."""
SLACK = 45
"""Besides it: 10 s in which a lost rank may speak first, and up to 30 s that the launcher gives a stopped process."""


def two_nodes(launcher: str, pipeline: Path, folder: Path, case: list[str]) -> list[list[str]]:
    """The command of each node, with a cache folder of its own."""
    port, commands = str(free_port()), []
    (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    for rank in ("0", "1"):
        if launcher == "deepspeed":
            program, hostfile = Path(sys.executable).with_name("deepspeed"), folder / "hostfile"
            words = [str(program), "--hostfile", str(hostfile), "--no_ssh", "--node_rank", rank, "--master_addr",
                     "127.0.0.1", "--master_port", port]  # fmt: skip
        else:
            words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank,
                     "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]  # fmt: skip
        caches = f"train.cache_dir={folder}/cache-{rank}"
        commands.append([*words, "stage2_train/train.py", str(pipeline), *case, caches])
    return commands


def outputs_of(processes: list[subprocess.Popen[str]]) -> list[str]:
    return [process.communicate(timeout=300)[0] for process in processes]


@pytest.mark.parametrize(("launcher", "stage"), [("deepspeed", 3), pytest.param("torchrun", 2, marks=pytest.mark.long)])
def test_two_nodes_give_the_bits_of_one(demo_store: Path, pipeline: Path, tmp_path: Path, launcher: str, stage: int):
    one, two = tmp_path / "one", tmp_path / "two"
    done = finish(deepspeed_command(2, *training(demo_store, one, stage), "train.max_steps=8", pipeline=pipeline))
    assert done.code == 0, done.output
    case = [*training(demo_store, two, stage), "train.max_steps=8"]
    nodes = [start(command) for command in two_nodes(launcher, pipeline, tmp_path, case)]
    outputs = outputs_of(nodes)
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert metrics_of(two) == metrics_of(one)
    assert (two / "model/model.safetensors").read_bytes() == (one / "model/model.safetensors").read_bytes()
    assert all(any((tmp_path / f"cache-{rank}").iterdir()) for rank in (0, 1))


def test_a_lost_node_ends_the_other_in_time_and_both_go_on(demo_store: Path, pipeline: Path, tmp_path: Path):
    run = tmp_path / "run"
    case = [*training(demo_store, run, 2), "train.checkpoint_steps=2", f"train.timeout_seconds={TIMEOUT}"]
    nodes = [start(command) for command in two_nodes("deepspeed", pipeline, tmp_path, case)]
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, nodes[0])
    os.killpg(nodes[1].pid, signal.SIGKILL)
    lost = time.monotonic()
    first, _ = outputs_of(nodes)
    assert time.monotonic() - lost < TIMEOUT + SLACK
    assert nodes[0].returncode == 1, first
    assert "another process of this run died or did not answer" in first
    assert "Traceback" not in first
    again = [start(command) for command in two_nodes("deepspeed", pipeline, tmp_path, case)]
    outputs = outputs_of(again)
    assert [node.returncode for node in again] == [0, 0], outputs
    assert [line["step"] for line in metrics_of(run)] == list(range(1, 25))
    assert "resumed from" in outputs[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_run_in_time(
    demo_store: Path, pipeline: Path, tmp_path: Path, number: signal.Signals
):
    run = tmp_path / "run"
    case = [*training(demo_store, run, 1), f"train.timeout_seconds={TIMEOUT}"]
    process = start(deepspeed_command(2, *case, pipeline=pipeline))
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, process)
    ranks = ranks_of(process)
    ranks[1].send_signal(number)
    lost = time.monotonic()
    output, _ = process.communicate(timeout=300)
    assert time.monotonic() - lost < TIMEOUT + SLACK
    assert process.returncode not in (0, 2, 75), output
    assert "Traceback" not in output
    if number == signal.SIGSTOP:
        assert f"did not answer for {TIMEOUT} s (train.timeout_seconds)" in output
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


SLOW_PHASES = """
import os, sys, time
from contextlib import contextmanager
import stage2_train.checkpoint as checkpoint
import stage2_train.trainer as trainer
convert, export, track = checkpoint.convert, trainer.export_model, trainer.track
def slowly(function):
    def slow(*arguments, **options):
        result = function(*arguments, **options)
        if os.environ["RANK"] == "0":
            time.sleep(12)
        return result
    return slow
@contextmanager
def slow_track(*arguments):
    with track(*arguments) as trackers:
        slowly(print)("trackers start", flush=True)
        yield trackers
        slowly(print)("trackers end", flush=True)
checkpoint.convert, trainer.export_model, trainer.track = slowly(convert), slowly(export), slow_track
if __name__ == "__main__":
    from stage2_train.train import main
    main()
"""


def test_long_work_of_one_rank_is_waited_for(demo_store: Path, pipeline: Path, tmp_path: Path):
    """Converting a checkpoint, starting and ending trackers and writing the model take longer than the timeout."""
    run, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(SLOW_PHASES)
    case = [*training(demo_store, run, 3), "train.max_steps=6", f"train.timeout_seconds={TIMEOUT}"]
    assert finish(deepspeed_command(1, *case, pipeline=pipeline)).code == 0
    (run / "checkpoints" / "step-0000006").rename(tmp_path / "later")
    command = deepspeed_command(2, *case, pipeline=pipeline)
    command[command.index("stage2_train/train.py")] = str(script)
    done = finish(command, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    assert done.code == 0, done.output
    assert "is converted for 2 ranks" in done.output
    assert len(metrics_of(run)) == 6


TIMEOUTS = """
import os, sys
import torch
from torch.distributed import distributed_c10d
from shared.load_config import load_config
from stage2_train.distributed import meet
from stage2_train.setup import prepare
from stage2_train.trainer import Trainer

config = load_config(sys.argv[1], sys.argv[2:])
world = meet(config.train.timeout_seconds)
Trainer(prepare(config), world)
seconds = [
    group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    for group in distributed_c10d._world.pg_map
    if group is not world.patient_group
]
os.write(1, f"TIMEOUTS {len(seconds)} {set(seconds)}\\n".encode())  # one write: ranks share the pipe
os._exit(0)
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_no_group_waits_longer_than_it_may(demo_store: Path, pipeline: Path, tmp_path: Path, stage: int):
    """DeepSpeed's own groups among them: ZeRO's collectives run on those."""
    script = tmp_path / "timeouts.py"
    script.write_text(TIMEOUTS)
    case = [*training(demo_store, tmp_path / "run", stage), "train.timeout_seconds=77", "train.sequence_parallel=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = finish([*launcher, str(pipeline), *case], PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    assert done.code == 0, done.output
    lines = [line.split(maxsplit=2) for line in done.output.splitlines() if line.startswith("TIMEOUTS")]
    assert len(lines) == 2
    for _, count, seconds in lines:
        assert int(count) > 1
        assert seconds == "{77.0}"

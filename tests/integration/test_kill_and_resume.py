"""Killed at any moment, a rerun ends with the same numbers."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from launching import REPOSITORY, Finished, deepspeed_command, demo_overrides, finish, metrics_of, score, start
from transformers import GPT2Config, GPT2LMHeadModel


def training(store: Path, output: Path, stage: int) -> list[str]:
    return [
        f"train.scores={store}", "train.method=prift_mass", "train.batch_size=8", "train.epochs=2",
        "train.learning_rate=1e-3", "train.checkpoint_steps=5", f"train.output={output}",
        f"train.deepspeed.zero_optimization.stage={stage}",
    ]  # fmt: skip


OFFLOADED = [
    "train.deepspeed.zero_optimization.offload_optimizer.device=cpu",
    "train.deepspeed.zero_optimization.offload_param.device=cpu", "train.sequence_parallel=2",
    "train.gradient_checkpointing=offload", "train.schedule=wsd",
]  # fmt: skip


@pytest.mark.parametrize(("stage", "more"), [(1, []), (3, []), (3, OFFLOADED)], ids=["1", "3", "3-offloaded"])
def test_a_killed_training_resumes_to_the_same_bits(
    demo_store: Path, pipeline: Path, tmp_path: Path, stage: int, more: list[str]
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = finish(deepspeed_command(2, *training(demo_store, whole, stage), *more, pipeline=pipeline))
    assert done.code == 0, done.output
    assert len(metrics_of(whole)) == 24

    command = deepspeed_command(2, *training(demo_store, killed, stage), *more, pipeline=pipeline)
    process = start(command)
    wait_for(lambda: (killed / "checkpoints" / "step-0000010").is_dir(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (killed / "model").exists()
    resumed = finish(command)
    assert resumed.code == 0, resumed.output
    assert "resumed from" in resumed.output
    assert metrics_of(killed) == metrics_of(whole)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (killed / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    left = sorted(entry.name for entry in (killed / "checkpoints").iterdir())
    assert left == ["LATEST", "step-0000020", "step-0000024"]


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(
    demo_store: Path, train_cases: Callable[..., Finished], pipeline: Path, tmp_path: Path
):
    case = training(demo_store, tmp_path / "run", 1)
    done = train_cases([case, case])
    assert done.code == 0, done.output
    assert len(metrics_of(tmp_path / "run")) == 24
    other = finish(deepspeed_command(1, *case, "train.learning_rate=2e-3", pipeline=pipeline))
    assert other.code == 2
    assert "train.learning_rate: 0.001 there, 0.002 now" in other.output
    stage = finish(deepspeed_command(1, *case, "train.deepspeed.zero_optimization.stage=2", pipeline=pipeline))
    assert stage.code == 2
    assert "was saved with ZeRO stage 1, this run has 2" in stage.output
    never = finish(deepspeed_command(1, *case, "train.resume=never", pipeline=pipeline))
    assert never.code == 2
    assert "holds a run already" in never.output


def test_a_run_stopped_before_its_first_checkpoint_is_not_overwritten_by_another(
    demo_store: Path, train_cases: Callable[..., Finished], pipeline: Path, tmp_path: Path
):
    case = training(demo_store, tmp_path / "run", 1)
    assert train_cases([case]).code == 0
    for name in ("checkpoints", "model"):
        shutil.rmtree(tmp_path / "run" / name)
    written = metrics_of(tmp_path / "run")
    other = finish(deepspeed_command(1, *case, "train.seed=5", pipeline=pipeline))
    assert other.code == 2
    assert "train.seed: 0 there, 5 now" in other.output
    assert metrics_of(tmp_path / "run") == written
    again = train_cases([case])
    assert again.code == 0, again.output
    assert "starts over at step 1" in again.output
    assert metrics_of(tmp_path / "run") == written


def test_a_finished_run_without_its_checkpoints_is_kept(demo_store: Path, pipeline: Path, tmp_path: Path):
    """As after tidying up; neither its metrics nor its model are written over, nor a base model that lies there."""
    run = tmp_path / "run"
    shutil.copytree(REPOSITORY / "data/demo/prior", run / "model")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    case = [*training(demo_store, run, 1), f"train.model={run}/model"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = finish([sys.executable, "stage2_train/train.py", str(pipeline), *case])
    assert done.code == 2, done.output
    assert f"{run}/model is there, and no checkpoint to go on from" in done.output
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_deterministic_operations_suffice_and_change_nothing_on_a_cpu(demo_store: Path, pipeline: Path, tmp_path: Path):
    """torch raises where an operation has no deterministic form."""
    for name in ("true", "false"):
        case = [*training(demo_store, tmp_path / name, 1), "train.max_steps=3", f"train.deterministic={name}"]
        done = finish([sys.executable, "stage2_train/train.py", str(pipeline), *case])
        assert done.code == 0, done.output
    assert metrics_of(tmp_path / "true") == metrics_of(tmp_path / "false")


def test_a_full_disk_ends_the_run_with_one_line_and_a_rerun_goes_on(demo_store: Path, pipeline: Path, tmp_path: Path):
    """A limit on the size of a file stands in for the full disk."""
    run = tmp_path / "run"
    first = [*training(demo_store, run, 1), "train.epochs=1"]
    train = [sys.executable, "stage2_train/train.py", str(pipeline)]
    limited = ["bash", "-c", 'ulimit -f 2000; exec "$@"', "limited", *train, *first]
    full = finish(limited)
    assert full.code == 2, full.output
    assert "the checkpoint cannot be written" in full.output
    assert "Traceback" not in full.output
    assert not (run / "checkpoints" / "step-0000005").exists()
    done = finish([*train, *first])
    assert done.code == 0, done.output
    assert [line["step"] for line in metrics_of(run)] == list(range(1, 13))
    left = sorted(entry.name for entry in (run / "checkpoints").iterdir())
    assert left == ["LATEST", "step-0000010", "step-0000012"]


def test_a_disk_that_is_full_on_one_rank_only_ends_all_with_its_message(
    demo_store: Path, pipeline: Path, tmp_path: Path
):
    run = tmp_path / "run"
    command = deepspeed_command(2, *training(demo_store, run, 1), pipeline=pipeline)
    command[command.index("stage2_train/train.py")] = "tests/integration/one_rank_fails.py"
    done = finish(command)
    assert done.code == 2, done.output
    assert "could not read or write its part of the checkpoint" in done.output
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def dropout_store(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows scored by a GPT-2 of random weights, whose default dropout is 0.1."""
    folder = tmp_path_factory.mktemp("dropout")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=800, n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder / "prior")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / "data/demo/prior" / name, folder / "prior")
    score(
        pipeline, f"data.path={REPOSITORY}/data/demo/train.jsonl", f"prior.model={folder}/prior", "data.limit=24",
        f"score.output={folder}/store",
    )  # fmt: skip
    return folder / "store"


def test_a_model_with_dropout_resumes_to_the_same_numbers_from_any_checkpoint(
    dropout_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    run = tmp_path / "run"
    case = [
        f"train.scores={dropout_store}", "train.method=sft", "train.batch_size=8", "train.epochs=2",
        "train.checkpoint_steps=1", "train.keep_checkpoints=9", "train.learning_rate=1e-3", f"train.output={run}",
    ]  # fmt: skip
    done = train_cases([case])
    assert done.code == 0, done.output
    whole, weights = metrics_of(run), (run / "model" / "model.safetensors").read_bytes()
    assert len(whole) == 6
    again = train_cases([[*case, f"train.resume={run}/checkpoints/step-0000003"]])
    assert again.code == 0, again.output
    later = ", ".join(f"step-000000{step}" for step in (4, 5, 6))
    assert f"after step 3; {later} removed, these steps are made again" in again.output
    assert "WARNING: train.resume=PATH begins there at each start" in again.output
    assert metrics_of(run) == whole
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    # By itself a run goes on from its newest checkpoint, and nothing is removed or warned of.
    finished = train_cases([case])
    assert f"resumed from {run}/checkpoints/step-0000006, after step 6\n" in finished.output
    assert "train.resume=PATH" not in finished.output
    elsewhere = train_cases([[*case, f"train.resume={tmp_path}/elsewhere"]])
    assert elsewhere.code != 0
    assert "expected a checkpoint in" in elsewhere.output


KILL_AT_RENAME = """
import os, pathlib, signal, sys
renames, fatal = 0, int(sys.argv[1])
replace = pathlib.Path.replace
def dying_replace(self, target):
    global renames
    renames += str(target).endswith(".parquet")
    if renames == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
pathlib.Path.replace = dying_replace
sys.argv = ["prift-score", *sys.argv[2:]]
from stage1_score.cli import main
main()
"""


@pytest.mark.parametrize("nth_shard", [1, 3])
def test_scoring_killed_inside_a_write_loses_that_shard_only(
    demo_store: Path, pipeline: Path, tmp_path: Path, nth_shard: int
):
    """The kill falls between the written temporary and its rename; what was renamed before stays."""
    store = tmp_path / "store"
    arguments = [str(pipeline), *demo_overrides(store)]
    killed = finish([sys.executable, "-c", KILL_AT_RENAME, str(nth_shard), *arguments])
    assert killed.code == -signal.SIGKILL, killed.output
    assert len(list(store.glob("shard-*.parquet"))) == nth_shard - 1
    assert list(store.glob(".tmp-*")), "the kill was meant to leave a half-made shard behind"
    early = finish([sys.executable, "-m", "inspection.cli", "verify", str(store)])
    assert early.code == 3
    assert "unfinished" in early.output
    rerun = finish([sys.executable, "-m", "stage1_score.cli", *arguments])
    assert rerun.code == 0, rerun.output
    assert f"{nth_shard - 1} of 3 shards done" in rerun.output
    assert not list(store.glob(".tmp-*"))
    ours, theirs = (pq.read_table(sorted(folder.glob("*.parquet"))) for folder in (store, demo_store))
    assert ours.equals(theirs)


def wait_for(condition: Callable[[], bool], process, seconds: float = 120.0) -> None:
    """Wait until a condition holds while a process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)

"""Many workers, however they are started and killed, make the store that one makes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import REPOSITORY, demo_overrides, finish, start

ROWS_OF_SHARD = "score.shard_rows=8"
SMALL_BATCHES = "score.batch_tokens=128"


def command(pipeline: Path, store: Path, *overrides: str) -> list[str]:
    """`prift-score` on 96 rows in 12 shards of several batches each."""
    words = [*demo_overrides(store), ROWS_OF_SHARD, SMALL_BATCHES, *overrides]
    return [sys.executable, "-m", "stage1_score.cli", str(pipeline), *words]


@pytest.fixture(scope="module")
def alone(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes, never interrupted."""
    store = tmp_path_factory.mktemp("alone") / "store"
    done = finish(command(pipeline, store))
    assert done.code == 0, done.output
    return store


def assert_same(store: Path, alone: Path, read_store) -> None:
    """Rows, ids and every statistic equal bit for bit; nothing else lies in the folder."""
    assert read_store(store) == read_store(alone)
    assert len(list(alone.glob("shard-*.parquet"))) == 12
    assert not list(store.glob(".tmp-*"))


@pytest.mark.parametrize(
    "moment", ["batch:1", "batch:7", "before-rename:shard-00003.parquet", "after-rename:shard-00005.parquet"]
)
def test_four_workers_one_of_them_killed(pipeline: Path, alone: Path, tmp_path: Path, read_store, moment: str):
    store, mark = tmp_path / "store", tmp_path / "mark"
    done = finish(
        command(pipeline, store, "score.workers=4"),
        PYTHONPATH=f"{REPOSITORY}/tests/integration/sabotage", SABOTAGE=moment, SABOTAGE_MARK=str(mark),
    )  # fmt: skip
    assert done.code == 0, done.output
    assert mark.exists()
    assert "ended by signal SIGKILL; another takes over" in done.output
    again = finish(command(pipeline, store))  # removes what the dead worker left under a temporary name
    assert "12 of 12 shards done, 0 to score" in again.output
    assert_same(store, alone, read_store)


def test_parts_in_any_order_two_of_them_at_once(pipeline: Path, alone: Path, tmp_path: Path, read_store):
    store = tmp_path / "store"
    both = [start(command(pipeline, store, f"score.part={part}/3")) for part in (2, 0)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len(list(store.glob("shard-*.parquet"))) == 8
    last = finish(command(pipeline, store, "score.part=1/3"))
    assert last.code == 0, last.output
    assert "96 rows kept" in last.output
    assert any("is done; " in output for output in outputs)
    assert_same(store, alone, read_store)
    assert {path.name for path in store.glob("*.metrics.*")} == {f"score.metrics.{n}-of-3.jsonl" for n in range(3)}


def test_ray_with_an_actor_killed(pipeline: Path, alone: Path, tmp_path: Path, read_store):
    store = tmp_path / "store"
    process = start(command(pipeline, store, "score.workers=2", "score.launcher=ray"))
    wait_for(lambda: len(list(store.glob("shard-*.parquet"))) >= 2, process)
    actors = [child for child in psutil.Process(process.pid).children(recursive=True) if is_actor(child)]
    assert len(actors) == 2
    actors[0].kill()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "died at shard" in output
    assert "another takes over" in output
    assert_same(store, alone, read_store)


@pytest.mark.parametrize("workers", ["score.workers=1", "score.workers=2", "score.launcher=ray"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_it_goes_on(
    pipeline: Path, alone: Path, tmp_path: Path, read_store, workers: str, number: signal.Signals
):
    store = tmp_path / "store"
    words = command(pipeline, store, workers)
    process = start(words)
    wait_for(lambda: len(list(store.glob("shard-*.parquet"))) >= 2, process)
    # Ctrl-C reaches the whole group of a terminal, SIGTERM of a batch system the process that it started.
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "the same command goes on from the last finished shard" in output
    assert "Traceback" not in output, output
    assert not list(store.glob(".tmp-*"))
    assert len(list(store.glob("shard-*.parquet"))) < 12
    assert finish(words).code == 0
    assert_same(store, alone, read_store)


def test_workers_end_with_the_one_that_started_them(pipeline: Path, tmp_path: Path):
    store = tmp_path / "store"
    process = start(command(pipeline, store, "score.workers=2"))
    wait_for(lambda: len(list(store.glob("shard-*.parquet"))) >= 1, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_a_shard_that_no_worker_survives_ends_the_run_by_name(pipeline: Path, tmp_path: Path):
    store = tmp_path / "store"
    done = finish(
        command(pipeline, store, "score.workers=2"),
        PYTHONPATH=f"{REPOSITORY}/tests/integration/sabotage", SABOTAGE="before-rename:shard-00003.parquet",
    )  # fmt: skip
    assert done.code == 2, done.output
    assert "3 workers died at shard 3, the last of: process" in done.output
    assert "Traceback" not in done.output
    assert list(store.glob("shard-*.parquet"))  # finished shards are kept
    assert not (store / "shard-00003.parquet").exists()


def test_a_mistake_that_a_worker_meets_is_one_line(pipeline: Path, tmp_path: Path, prior_with):
    import safetensors.torch

    broken = prior_with(tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    words = command(pipeline, tmp_path / "store", "score.workers=2", f"prior.model={broken}", "data.template=plain")
    done = finish(words)
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    assert done.output.splitlines()[-1].startswith("prift-score: LlamaForCausalLM: its logits are not finite")
    assert not list((tmp_path / "store").glob("*.parquet"))


def is_actor(process: psutil.Process) -> bool:
    try:
        return any("_Actor" in word for word in process.cmdline())
    except psutil.Error:
        return False


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Wait until something is seen; fail where the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)

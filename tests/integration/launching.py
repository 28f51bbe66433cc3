"""Ways to start scoring and training as a user does."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.load_config import load_config
from stage1_score.run import run as run_scoring

REPOSITORY = Path(__file__).resolve().parents[2]
ALL_COLUMNS = "score.columns=[logprob,mass_rank,entropy,entropy_top20,collision]"


@dataclass(frozen=True)
class Finished:
    """A process that ended."""

    code: int
    output: str


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command in the repository, one thread a process, its output in one pipe."""
    return subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )  # fmt: skip


def finish(command: Sequence[str], **environment: str) -> Finished:
    """Run a command to its end."""
    process = start(command, **environment)
    output, _ = process.communicate(timeout=600)
    return Finished(process.returncode, output)


def deepspeed_command(ranks: int, *overrides: str, pipeline: Path) -> list[str]:
    """The command that the README gives, on a port of its own."""
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), "stage2_train/train.py", str(pipeline), *overrides]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def metrics_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"], line["data_wait_seconds"]
    return lines


def score(pipeline: Path, *overrides: str) -> None:
    """Score in this process, as prift-score does."""
    run_scoring(load_config(pipeline, overrides), ["prift-score", str(pipeline), *overrides])


def demo_overrides(store: Path | str) -> list[str]:
    """How `demo_store` is scored."""
    return [
        f"data.path={REPOSITORY}/data/demo/train.jsonl", f"prior.model={REPOSITORY}/data/demo/prior",
        "prior.dtype=float32", "data.limit=96", "score.shard_rows=32", f"score.output={store}", ALL_COLUMNS,
    ]  # fmt: skip

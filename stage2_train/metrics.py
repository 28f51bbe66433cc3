"""What a run writes about itself while it trains: `metrics.jsonl`, `eval.jsonl` and a progress bar."""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shared.files import replacing

_SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    """From 1."""
    loss: float | None
    """Weighted loss, normalised as the run is; None where it is not finite."""
    nll: float | None
    """Plain mean negative log-likelihood of all targets, nats; None where some did not go through the head."""
    nll_sampled: float | None
    """Else the same, targets of weight zero counted by a sample of them (`train.nll_every`)."""
    num_nll_targets: int
    """Targets that nll or nll_sampled is made of."""
    weight_mean: float | None
    """None where it is not finite, as it may be where a rule weighs by the statistics of a step that is not."""
    weight_zero_fraction: float
    grad_norm: float | None
    """Before clipping; None where it is not finite."""
    update_applied: bool
    """False where DeepSpeed left the update out, since the gradient's norm is not finite."""
    lr: float
    num_targets: int
    tokens_per_second: float
    """Over all ranks, padding not counted."""
    data_wait_seconds: float
    """That rank 0 waited for its micro-batches."""


def metrics_path(run: Path) -> Path:
    """One line per optimizer step."""
    return run / "metrics.jsonl"


def eval_path(run: Path) -> Path:
    """One line per evaluation and score store."""
    return run / "eval.jsonl"


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a JSON line; it is on its way to the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def finite_or_none(value: float | None) -> float | None:
    """The value where it is a number: JSON has no others."""
    return value if value is not None and math.isfinite(value) else None


def cut_after(path: Path, step: int) -> None:
    """Cut the lines after a step: a resumed run writes them again. A torn last line goes too."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read_records(path) if record["step"] <= step]
        with replacing(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def evaluated(run: Path) -> set[tuple[int, str]]:
    """Step and name of each evaluation of a run."""
    path = eval_path(run)
    return {(record["step"], record["name"]) for record in read_records(path)} if path.exists() else set()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file that may still be written; a torn last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class TrainingProgress:
    """Writes the metrics of rank 0 and shows them: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, run: Path, first_step: int, num_steps: int, is_writer: bool):
        self._path, self._num_steps, self._is_writer = metrics_path(run), num_steps, is_writer
        self._last_line = -float("inf")
        self._bar: Progress | None = None
        if is_writer and sys.stdout.isatty():
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                       TimeRemainingColumn())  # fmt: skip
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("training", total=num_steps, completed=first_step - 1, shown="")
            self._bar.start()

    def record(self, metrics: StepMetrics) -> None:
        """Write and show the metrics of a step."""
        if not self._is_writer:
            return
        append_line(self._path, asdict(metrics))
        nll = f"nll {metrics.nll:.4f}  " if metrics.nll is not None else ""
        if metrics.nll_sampled is not None:
            nll = f"nll_sampled {metrics.nll_sampled:.4f}  "
        loss = "not finite" if metrics.loss is None else f"{metrics.loss:.4f}"
        weight = "not finite" if metrics.weight_mean is None else f"{metrics.weight_mean:.3f}"
        shown = (
            f"loss {loss}  {nll}weight {weight} "
            f"({metrics.weight_zero_fraction:.0%} zero)  {metrics.tokens_per_second:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, shown=shown)
            return
        now = time.perf_counter()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES or metrics.step == self._num_steps:
            self._last_line = now
            print(f"step {metrics.step}/{self._num_steps}  {shown}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the terminal as it was, also for an error's message."""
        if self._bar is not None:
            self._bar.stop()

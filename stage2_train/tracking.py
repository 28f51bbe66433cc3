"""What is in metrics.jsonl and eval.jsonl, also to TensorBoard and Weights & Biases: the one place that knows either.

Neither goes through accelerate.tracking: W&B's tracker there raises unless the process keeps accelerate's own state of
ranks and device, and TensorBoard's creates that state, which here is DeepSpeed's business, and cannot purge on resume.
"""

import importlib.util
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from shared.config import TrainConfig
from shared.errors import UserError, first_line
from shared.files import replacing


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed, before a process waits for others.

    Raises:
        UserError: names the package and the extra that brings it.
    """
    for name in names:
        found = importlib.util.find_spec(name)
        # A folder of that name in the working directory, such as wandb leaves, is found too, but is no package.
        if found is None or found.origin is None:
            raise UserError(
                f"train.trackers={list(names)}: expected the package {name}, and it is not installed: "
                "pip install 'prift[tracking]'"
            )


class _Tracker(Protocol):
    def log(self, values: dict[str, Any], step: int) -> None:
        """Log the values of a step by name."""
        ...

    def log_evaluation(self, prefix: str, values: dict[str, Any], step: int) -> None:
        """Log the values of an evaluation after a step."""
        ...

    def finish(self, exit_code: int) -> None:
        """Write what is left."""
        ...


class _TensorBoard:
    """Event files in `tracking/tensorboard`; all sessions of a run share the folder."""

    def __init__(self, config: TrainConfig, folder: Path, done: int | None):
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if done is None else done + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
        text = "".join(f"    {line}\n" for line in yaml.safe_dump(_resolved(config), sort_keys=False).splitlines())
        self._writer.add_text("config", text, done or 0)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # Left alone it flushes every two minutes, and a run that is killed would lose steps that its checkpoint holds.
        self._writer.flush()

    def log_evaluation(self, prefix: str, values: dict[str, Any], step: int) -> None:
        self.log({f"{prefix}/{name}": value for name, value in values.items()}, step)

    def finish(self, exit_code: int) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases, files in `tracking/wandb`; all sessions of a run share its id."""

    def __init__(self, config: TrainConfig, folder: Path, done: int | None):
        import wandb

        # What W&B collects by itself stays out where it may carry more than asked for: the terminal, code, git remotes.
        # The rest bounds how long it may keep training waiting, in seconds.
        settings = wandb.Settings(
            console="off", save_code=False, disable_git=True, quiet=True, login_timeout=30, finish_timeout=60
        )
        self._run = wandb.init(
            project=config.tracking_project, id=_kept_id(folder / "wandb-id"), name=folder.resolve().parent.name,
            dir=folder, resume="allow", config=_resolved(config), allow_val_change=True, settings=settings,
        )  # fmt: skip

    def log(self, values: dict[str, Any], step: int) -> None:
        # W&B takes steps in order only: those that a resumed run makes again are there already.
        if step >= self._run.step:
            self._run.log(values, step=step)

    def log_evaluation(self, prefix: str, values: dict[str, Any], step: int) -> None:
        # An evaluation that is made up for on resume comes after the last step: it carries a step of its own.
        self._run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
        named = {f"{prefix}/{name}": value for name, value in {"step": step, **values}.items()}
        self._run.log(named, step=max(step, self._run.step))

    def finish(self, exit_code: int) -> None:
        import wandb

        self._run.finish(exit_code=exit_code)
        # finish() may return before W&B's process has written its file; this waits until that process has ended.
        wandb.teardown(exit_code)


_KINDS: dict[str, Callable[[TrainConfig, Path, int | None], _Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}


class Trackers:
    """The trackers of a run that have not failed yet; training never fails with one."""

    def __init__(self, config: TrainConfig, folder: Path, done: int | None):
        """Start those that the config names.

        Args:
            folder: for their files.
            done: steps made before, by the checkpoint; None where the run begins.
        """
        self._running: dict[str, _Tracker] = {}
        for name in config.trackers:
            with self._dropped_on_error(name):
                folder.mkdir(parents=True, exist_ok=True)
                self._running[name] = _KINDS[name](config, folder, done)

    def record(self, line: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl under the same names; null is left out."""
        for name, tracker in list(self._running.items()):
            with self._dropped_on_error(name):
                tracker.log(_values(line), line["step"])

    def record_evaluation(self, line: dict[str, Any]) -> None:
        """Log a line of eval.jsonl as `eval/STORE/...`; null is left out."""
        for name, tracker in list(self._running.items()):
            with self._dropped_on_error(name):
                tracker.log_evaluation(f"eval/{line['name']}", _values(line), line["step"])

    def finish(self, exit_code: int) -> None:
        """Let each write what is left.

        Args:
            exit_code: 0 where training ended well.
        """
        for name, tracker in list(self._running.items()):
            with self._dropped_on_error(name):
                tracker.finish(exit_code)

    @contextmanager
    def _dropped_on_error(self, name: str) -> Iterator[None]:
        try:
            yield
        # Whatever a tracker raises (no network, a full disk, no account) is worth less than the run.
        except Exception as error:
            self._running.pop(name, None)
            reason = f"{type(error).__name__}: {first_line(error)}"
            print(f"WARNING: tracker {name} failed and is dropped; training goes on ({reason})", flush=True)


@contextmanager
def track(config: TrainConfig, output: Path, done: int | None, is_writer: bool) -> Iterator[Trackers]:
    """The trackers of `train.trackers` while a run trains; none on ranks that are not the writer."""
    trackers = Trackers(config if is_writer else config.model_copy(update={"trackers": ()}), output / "tracking", done)
    try:
        yield trackers
    except BaseException:
        trackers.finish(1)
        raise
    trackers.finish(0)


def _values(line: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a line; true and false as 1 and 0."""
    return {
        name: int(value) if isinstance(value, bool) else value
        for name, value in line.items()
        if value is not None and name not in ("step", "name")
    }


def _resolved(config: TrainConfig) -> dict[str, Any]:
    return {"train": config.model_dump(mode="json")}


def _kept_id(path: Path) -> str:
    """The id of the run in W&B, made at its first start."""
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()

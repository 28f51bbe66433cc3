"""What trackers get of a run, and that they cannot harm it."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from torch.utils.tensorboard import SummaryWriter
from tracked_runs import tensorboard_scalars, tensorboard_text, wandb_files, wandb_records, wandb_rows

from shared.config import Config, TrainConfig
from shared.errors import UserError
from stage2_train.setup import prepare
from stage2_train.tracking import refuse_missing_trackers, track

BOTH = TrainConfig(trackers=("tensorboard", "wandb"), learning_rate=0.25)
TENSORBOARD, WANDB = TrainConfig(trackers=("tensorboard",)), TrainConfig(trackers=("wandb",))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account and no server. W&B reads its environment once in a process, or after a teardown."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def test_names_are_those_of_the_lines_and_null_is_left_out(tmp_path: Path):
    with track(BOTH, tmp_path, None, True) as trackers:
        trackers.record_evaluation({"step": 0, "name": "held", "nll": 3.0, "nll_supported": None, "num_targets": 7})
        trackers.record({"step": 1, "loss": 0.5, "nll": None, "update_applied": True})
        trackers.record({"step": 2, "loss": None, "nll": 0.25, "update_applied": False})
    assert tensorboard_scalars(tmp_path) == {
        "eval/held/nll": [(0, 3.0)], "eval/held/num_targets": [(0, 7.0)],
        "loss": [(1, 0.5)], "nll": [(2, 0.25)], "update_applied": [(1, 1.0), (2, 0.0)],
    }  # fmt: skip
    (file,) = wandb_files(tmp_path)
    assert wandb_rows(file) == [
        {"_step": 0, "eval/held/step": 0, "eval/held/nll": 3.0, "eval/held/num_targets": 7},
        {"_step": 1, "loss": 0.5, "update_applied": 1},
        {"_step": 2, "nll": 0.25, "update_applied": 0},
    ]
    assert "learning_rate: 0.25" in tensorboard_text(tmp_path, "config")


def test_no_rank_but_the_writer_tracks(tmp_path: Path):
    with track(BOTH, tmp_path, None, False) as trackers:
        trackers.record({"step": 1, "loss": 0.5})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("done", "kept"), [(2, [(1, 1.0), (2, 2.0), (3, 30.0)]), (None, [(3, 30.0)])], ids=["resumed", "starts over"]
)
def test_tensorboard_forgets_what_is_made_again(tmp_path: Path, done: int | None, kept: list[tuple[int, float]]):
    with track(TENSORBOARD, tmp_path, None, True) as trackers:
        for step in range(1, 6):
            trackers.record({"step": step, "loss": float(step)})
    with track(TENSORBOARD, tmp_path, done, True) as trackers:
        trackers.record({"step": 3, "loss": 30.0})
    assert tensorboard_scalars(tmp_path) == {"loss": kept}


def test_tensorboard_has_a_step_on_disk_once_it_is_recorded(tmp_path: Path):
    with track(TENSORBOARD, tmp_path, None, True) as trackers:
        trackers.record({"step": 1, "loss": 0.5})
        assert tensorboard_scalars(tmp_path) == {"loss": [(1, 0.5)]}


def test_wandb_keeps_the_run_and_takes_a_late_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with track(WANDB, tmp_path, None, True) as trackers:
        for step in (1, 2, 3, 2):
            trackers.record({"step": step, "loss": float(step)})
        trackers.record_evaluation({"step": 2, "name": "held", "nll": 9.0})
    with track(WANDB, tmp_path, 3, True) as trackers:
        trackers.record({"step": 4, "loss": 4.0})
    first, second = wandb_files(tmp_path)
    assert first.name == second.name  # run-ID.wandb
    assert wandb_rows(first) == [
        {"_step": 1, "loss": 1.0}, {"_step": 2, "loss": 2.0},
        {"_step": 3, "loss": 3.0, "eval/held/step": 2, "eval/held/nll": 9.0},
    ]  # fmt: skip
    assert wandb_rows(second) == [{"_step": 4, "loss": 4.0}]
    assert "Tried to log to step" not in capsys.readouterr().err  # W&B's complaint, once a line


def test_an_error_of_the_run_goes_on_and_wandb_says_so(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), track(WANDB, tmp_path, None, True):
        raise KeyboardInterrupt
    (file,) = wandb_files(tmp_path)
    assert [record.exit.exit_code for record in wandb_records(file) if record.HasField("exit")] == [1]


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    written = SummaryWriter.add_scalar

    def add_scalar(writer: SummaryWriter, name: str, value: float, step: int) -> None:
        if step == 2:
            raise RuntimeError("the disk\nis full")
        written(writer, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add_scalar)
    with track(BOTH, tmp_path, None, True) as trackers:
        for step in (1, 2, 3):
            trackers.record({"step": step, "loss": float(step)})
            trackers.record_evaluation({"step": step, "name": "held", "nll": 1.0})
    output = capsys.readouterr().out
    assert output.count("WARNING") == 1
    assert "tracker tensorboard failed and is dropped; training goes on (RuntimeError: the disk)" in output
    assert tensorboard_scalars(tmp_path) == {"loss": [(1, 1.0)], "eval/held/nll": [(1, 1.0)]}
    assert [row["loss"] for row in wandb_rows(wandb_files(tmp_path)[0])] == [1.0, 2.0, 3.0]


def test_without_an_account_wandb_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with track(WANDB, tmp_path, None, True) as trackers:
        trackers.record({"step": 1, "loss": 0.5})
    assert capsys.readouterr().out.count("WARNING: tracker wandb failed and is dropped") == 1


@pytest.mark.parametrize("leaves_folder", [False, True], ids=["absent", "only a folder of its name"])
def test_a_missing_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leaves_folder: bool):
    if leaves_folder:
        (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"package no_such_tracker.*pip install 'prift\[tracking\]'"):
        refuse_missing_trackers(["no_such_tracker"])
    refuse_missing_trackers(["tensorboard", "wandb"])


def test_a_missing_package_is_refused_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TrainConfig(scores=str(tmp_path / "absent"), output=str(tmp_path / "run"), trackers=("wandb",))
    with pytest.raises(UserError, match="expected the package wandb"):
        prepare(Config(train=config))

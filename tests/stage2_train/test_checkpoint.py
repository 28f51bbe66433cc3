"""Checkpoints on disk: which counts as whole, and that loading runs no code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.errors import UserError
from shared.files import sha256_of_json
from stage2_train import checkpoint_files
from stage2_train.checkpoint import _SafeCheckpointEngine, load_newest, save_checkpoint
from stage2_train.checkpoint_files import (
    TrainerState,
    checkpoint_folder,
    entry_of,
    prune_checkpoints,
    read_state,
    whole_checkpoints,
)
from stage2_train.distributed import World

WORLD = World(0, 1, torch.device("cpu"))


class Engine:
    """As much of DeepSpeed's engine as saving and loading need: two tensors in two files, and its script."""

    def __init__(self, value: float = 0.0):
        self.checkpoint_engine = _SafeCheckpointEngine()
        self.value = value

    def save_checkpoint(self, folder: str, tag: str, **_: Any) -> None:
        place = Path(folder) / tag
        place.mkdir()
        for name in ("model.pt", "optimizer.pt"):
            self.checkpoint_engine.save({"value": torch.tensor(self.value)}, str(place / name))
        (Path(folder) / "zero_to_fp32.py").write_text("print('hello')")

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> tuple[str, dict]:
        loaded = [self.checkpoint_engine.load(str(Path(folder) / tag / name)) for name in ("model.pt", "optimizer.pt")]
        self.value = float(loaded[0]["value"])
        return folder, {}


def state_after(step: int) -> TrainerState:
    return TrainerState(step, world_size=1, zero_stage=1, settings={}, probe_nll=1.0, num_nonfinite_steps=0)


def saved(run: Path, *steps: int) -> list[Path]:
    """Checkpoints whose value is their step, the newest first."""
    for step in steps:
        save_checkpoint(Engine(step), run, state_after(step), WORLD)
    return [checkpoint_folder(run, step) for step in sorted(steps, reverse=True)]


def test_the_newest_whole_checkpoint_is_loaded_and_old_ones_go(tmp_path: Path):
    assert whole_checkpoints(tmp_path) == ([], [])
    folders = saved(tmp_path, 5, 100, 20)
    (tmp_path / "checkpoints" / ".saving-step-0000200").mkdir()
    assert whole_checkpoints(tmp_path) == (folders, [])
    engine = Engine()
    assert load_newest(engine, folders, WORLD) == folders[0]
    assert engine.value == 100
    assert read_state(folders[0]).step == 100
    prune_checkpoints(tmp_path, 2)
    assert whole_checkpoints(tmp_path)[0] == folders[:2]


def test_latest_moves_last_and_no_code_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (folder,) = saved(tmp_path, 7)
    latest = tmp_path / "checkpoints" / "LATEST"
    assert latest.read_text() == "step-0000007\n"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "deepspeed/model.pt", "deepspeed/optimizer.pt", "trainer.json",
    ]  # fmt: skip

    def fail(path: Path):
        raise OSError("killed here")

    monkeypatch.setattr(checkpoint_files, "replacing", fail)
    with pytest.raises(UserError, match="killed here"):
        save_checkpoint(Engine(8), tmp_path, state_after(8), WORLD)
    assert latest.read_text() == "step-0000007\n"
    assert whole_checkpoints(tmp_path)[0][0] == checkpoint_folder(tmp_path, 8)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def plant(path: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(path.parent / "ran")))


class Planted:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, plant])
@pytest.mark.parametrize("name", ["deepspeed/model.pt", "deepspeed/optimizer.pt", "trainer.json"])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    tmp_path: Path, damage: Any, name: str, capsys: pytest.CaptureFixture[str]
):
    newest, older = saved(tmp_path, 1, 2)
    damage(newest / name)
    folders, problems = whole_checkpoints(tmp_path)
    engine = Engine()
    assert load_newest(engine, folders, WORLD) == older
    assert engine.value == 1
    assert str(newest) in (problems[0] if problems else capsys.readouterr().out)
    assert not (newest / "deepspeed" / "ran").exists()
    assert not (newest / "ran").exists()


def test_a_file_that_was_added_makes_a_checkpoint_damaged(tmp_path: Path):
    """DeepSpeed finds some of its files by pattern."""
    newest, _ = saved(tmp_path, 1, 2)
    (newest / "deepspeed" / "more_optim_states.pt").write_bytes(b"")
    assert "missing, added or of another size: deepspeed/more_optim_states.pt" in whole_checkpoints(tmp_path)[1][0]


def test_none_whole_is_the_users_to_decide(tmp_path: Path):
    (only,) = saved(tmp_path, 1)
    flip(only / "deepspeed" / "model.pt")
    with pytest.raises(UserError, match="but step-0000001 is damaged, and no other was to be tried"):
        load_newest(Engine(), [only], WORLD)


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="expected a checkpoint"):
        read_state(tmp_path)


def test_no_checkpoint_is_begun_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (folder,) = saved(tmp_path, 1)
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"a checkpoint needs .* MiB are free; none was begun"):
        save_checkpoint(Engine(2), tmp_path, state_after(2), WORLD)
    assert whole_checkpoints(tmp_path) == ([folder], [])


def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path):
    """Also where whoever planted it made the manifest agree."""
    (folder,) = saved(tmp_path, 1)
    path, marker = folder / "deepspeed" / "model.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Planted(marker)))
    state = json.loads((folder / "trainer.json").read_text())
    del state["digest"]
    state["files"]["deepspeed/model.pt"] = entry_of(path)
    (folder / "trainer.json").write_text(json.dumps({**state, "digest": sha256_of_json(state)}))
    with pytest.raises(UserError, match="refused, it holds more than tensors"):
        load_newest(Engine(), [folder], WORLD)
    assert not marker.exists()

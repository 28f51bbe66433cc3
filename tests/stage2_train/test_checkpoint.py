"""Checkpoints on disk: which counts as whole, and that loading runs no code."""

import os
import pickle
from pathlib import Path

import pytest

from shared.errors import UserError
from stage2_train.checkpoint import (
    _SafeCheckpointEngine,
    checkpoint_folder,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
)


def test_the_newest_whole_checkpoint_is_found_and_old_ones_go(tmp_path: Path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 100, 20):
        checkpoint_folder(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints" / ".saving-step-0000200").mkdir()
    assert newest_checkpoint(tmp_path) == checkpoint_folder(tmp_path, 100)
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-0000020", "step-0000100"]


def test_a_folder_without_state_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(UserError, match="expected a checkpoint"):
        read_state(tmp_path)


class Planted:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_planted_pickle_is_refused_and_does_not_run(tmp_path: Path):
    path, marker = tmp_path / "states.pt", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(pickle.UnpicklingError):
        _SafeCheckpointEngine().load(str(path))
    assert not marker.exists()

"""Nothing but tensors is unpickled where DeepSpeed asks for anything."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from stage2_train.universal import refused, tensors_only


class Planted:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_what_asks_for_any_pickle_gets_tensors_only(tmp_path: Path):
    torch.save({"value": torch.ones(2)}, tmp_path / "good.pt")
    torch.save({"value": Planted(tmp_path / "ran")}, tmp_path / "bad.pt")
    with tensors_only():
        assert torch.load(tmp_path / "good.pt", weights_only=False)["value"].tolist() == [1, 1]
        with pytest.raises(pickle.UnpicklingError) as error:
            torch.load(tmp_path / "bad.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    message = str(refused(tmp_path / "bad.pt", error.value))
    assert "refused, it holds more than tensors" in message
    assert "weights_only" not in message, "torch's advice to load it all the same is no help"
    # The test can fail: outside the block the same file runs.
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert (tmp_path / "ran").exists()

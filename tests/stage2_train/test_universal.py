"""Nothing but tensors is unpickled where DeepSpeed asks for anything, and no conversion outlives its rank."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


CONVERT = """
import sys
from pathlib import Path
from stage2_train.universal import convert
if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def is_being_read(pipe: Path) -> bool:
    try:
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)  # left open: the reader goes on waiting
    except OSError:
        return False
    return True


def test_a_conversion_ends_with_the_rank_that_began_it(tmp_path: Path):
    """The same command is started again, and converts into the same folder."""
    (tmp_path / "source").mkdir()
    pipes = [tmp_path / "source" / f"{name}.pt" for name in
             ("mp_rank_00_model_states", "zero_pp_rank_0_mp_rank_00_optim_states")]  # fmt: skip
    for pipe in pipes:
        os.mkfifo(pipe)
    (tmp_path / "script.py").write_text(CONVERT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "source"), str(tmp_path / "target")]
    paths = {"PYTHONPATH": str(Path(__file__).parents[2]), "DS_ACCELERATOR": "cpu"}
    rank = subprocess.Popen(command, env={**os.environ, **paths}, start_new_session=True)
    for _ in range(600):
        if any(map(is_being_read, pipes)):
            break
        assert rank.poll() is None
        time.sleep(0.1)
    started = psutil.Process(rank.pid).children()
    assert len(started) > 0
    rank.kill()
    rank.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    for process in alive:
        process.kill()
    assert not alive

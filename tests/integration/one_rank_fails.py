"""Train, but let the last rank's part of every checkpoint fail, as on a host with a full disk of its own."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402

if os.environ["RANK"] == "1":

    def fail(self, state_dict, path):
        raise OSError(28, "No space left on device", path)

    TorchCheckpointEngine.save = fail

from shared.cli import exit_code_of  # noqa: E402
from stage2_train.train import train  # noqa: E402

arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
os._exit(exit_code_of(lambda: train(arguments[0], arguments[1:]), "train.py"))

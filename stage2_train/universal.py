"""Checkpoints for another number of ranks, by DeepSpeed's universal checkpoint.

Optimizer state is spread over the ranks that saved it. Converted, it lies in one file per parameter, from which any
number of ranks take their parts; the same ZeRO stage is needed.
"""

import io
import multiprocessing
import os
import pickle
import re
import threading
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from shared.errors import UserError

_SAVED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed itself saves besides tensors."""

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """No `torch.load` in the block runs pickled code, whatever it is asked for: DeepSpeed asks for anything."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    torch.serialization.add_safe_globals(_SAVED_CLASSES)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def refused(path: Path | str, error: pickle.UnpicklingError) -> UserError:
    """What to say of a file that is not loaded. torch advises to load it all the same; that is left out."""
    reason = re.search(r"Unsupported \w+: .*? was not", str(error))
    what = f" ({reason[0].removesuffix(' was not')})" if reason else ""
    return UserError(f"{path}: refused, it holds more than tensors{what}; nothing of it was run")


def convert(source: Path, target: Path) -> None:
    """Convert a DeepSpeed checkpoint folder; by one rank, in a process of its own, since it fills memory and stdout.

    Raises:
        UserError: a file holds more than tensors, and nothing of it was run; or the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        try:
            executor.submit(_convert, str(source), str(target)).result()
        except pickle.UnpicklingError as error:
            raise refused(source, error) from None
        except BrokenProcessPool:
            raise UserError(f"{source}: the process that converts it was killed; it may be short of memory") from None


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: the next start converts into the same folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _convert(source: str, target: str) -> None:
    _end_with_parent()
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = Namespace(
        input_folder=source, output_folder=target, num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False,
        strict=True, inject_missing_state=True,
    )  # fmt: skip
    with tensors_only(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        main(arguments)


def load_universal(engine: Any, folder: Path, tag: str) -> None:
    """Load a converted checkpoint; called by all ranks."""
    config = engine._config
    # For the load only: left on, DeepSpeed's next save would leave out parts of the model
    # (https://github.com/deepspeedai/DeepSpeed/issues/7546).
    config.load_universal_checkpoint = True
    try:
        with tensors_only():
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        config.load_universal_checkpoint = False
    assert path is not None, f"DeepSpeed found nothing to load in {folder}"

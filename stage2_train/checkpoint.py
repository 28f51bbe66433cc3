"""Checkpoints that are whole or not there, loaded without running pickled code, and the exported model.

A checkpoint is written into a temporary folder beside its place, flushed, and renamed: a folder named
`step-0000123` is whole.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError

from shared.errors import UserError
from shared.files import remove, replacing, sync_entry, sync_tree
from stage2_train.distributed import World

_STATE_NAME = "trainer.json"
_TAG = "deepspeed"
_NAME = re.compile(r"step-(\d{7})")


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads tensors and the three classes that DeepSpeed itself saves; anything else is refused, not run.

    A file that cannot be written is kept in `error`: raised by one rank inside DeepSpeed's save, it would leave the
    others waiting in a collective.
    """

    error: UserError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            # A full disk reaches torch's writer as a RuntimeError, without an errno.
            if isinstance(error, RuntimeError) and "write" not in str(error).lower():
                raise
            self.error = UserError(f"{path}: the checkpoint cannot be written ({error}); older ones are as they were")

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)


def use_safe_loading(engine: Any) -> None:
    """Make a DeepSpeed engine save and load through the safe checkpoint engine."""
    engine.checkpoint_engine = _SafeCheckpointEngine()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run / "checkpoints" / f"step-{step:07d}"


def save_checkpoint(engine: Any, run: Path, step: int, state: dict[str, Any], world: World) -> None:
    """Write the checkpoint after a step; called by all ranks.

    Args:
        state: what `read_state` gives back: world size, ZeRO stage and settings of the run.

    Raises:
        UserError: on all ranks, where any of them could not write its part.
    """
    folder = checkpoint_folder(run, step)
    # One name for all ranks, whichever host they are on; what a killed run left behind is removed first.
    temporary = folder.with_name(f".saving-{folder.name}")
    if engine.global_rank == 0:
        for unfinished in folder.parent.glob(".saving-*"):
            remove(unfinished)
        remove(folder)
        temporary.mkdir(parents=True)
    world.barrier()
    engine.save_checkpoint(str(temporary), tag=_TAG, client_state={}, save_latest=False)
    error = engine.checkpoint_engine.error
    if world.all_reduce(torch.tensor(float(error is not None), device=world.device)) > 0:
        raise error or UserError(f"{temporary}: another rank could not write its part of the checkpoint")
    if engine.global_rank == 0:
        # DeepSpeed copies conversion scripts into each checkpoint; a folder of data holds no code.
        for script in temporary.rglob("*.py"):
            script.unlink()
        (temporary / _STATE_NAME).write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        sync_tree(temporary)
        temporary.replace(folder)
        sync_entry(folder.parent)
    world.barrier()


def load_checkpoint(engine: Any, folder: Path) -> None:
    """Load model and optimizer state; called by all ranks."""
    path, _ = engine.load_checkpoint(str(folder), tag=_TAG)
    assert path is not None, f"DeepSpeed found nothing to load in {folder}"


def newest_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint of the highest step."""
    found = _checkpoints(run)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer's own state of a checkpoint.

    Raises:
        UserError: not a checkpoint.
    """
    try:
        return json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder}: expected a checkpoint with {_STATE_NAME}, found none") from None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for folder in _checkpoints(run)[:-keep]:
        remove(folder)


def remove_checkpoints_after(run: Path, step: int) -> None:
    """Remove the checkpoints of later steps."""
    for folder in _checkpoints(run):
        if folder.name > checkpoint_folder(run, step).name:
            remove(folder)


def export_model(engine: Any, model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as safetensors with its tokenizer, for `AutoModelForCausalLM`; called by all ranks."""
    if engine.zero_optimization_partition_weights():
        state_dict = engine._zero3_consolidated_16bit_state_dict()
    else:
        state_dict = engine.module.state_dict()
    if engine.global_rank != 0:
        return
    prefix = "model."
    state_dict = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    try:
        with replacing(folder) as temporary:
            model.save_pretrained(temporary, state_dict=state_dict)
            tokenizer.save_pretrained(temporary)
            remove(folder)
    except SafetensorError as error:
        raise UserError(f"{folder}: the model cannot be written ({error}); a rerun writes it again") from None


def _checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if _NAME.fullmatch(entry.name))

"""Checkpoints of a DeepSpeed engine, saved by all ranks and loaded without running pickled code.

Loading takes the newest checkpoint that is whole (`stage2_train.checkpoint_files`); what was torn, flipped, cut or
planted makes it an older one.
"""

import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from shared.errors import UserError
from shared.files import remove
from stage2_train.checkpoint_files import (
    TrainerState,
    checkpoint_folder,
    commit,
    entry_of,
    lack_of_room,
    read_state,
    write_manifest,
)
from stage2_train.distributed import World
from stage2_train.universal import convert, load_universal, refused, tensors_only

_TAG = "deepspeed"
_SAVING, _CONVERTED = ".saving-", ".converted-"


class _SafeCheckpointEngine(TorchCheckpointEngine):
    """Loads tensors and the three classes that DeepSpeed itself saves; anything else is refused, not run.

    A file that cannot be written is kept in `error`: raised by one rank inside DeepSpeed's save, it would leave the
    others waiting in a collective.
    """

    def __init__(self, frozen: Collection[str] = ()) -> None:
        """
        Args:
            frozen: names of the module's parameters that are not saved. DeepSpeed leaves out one name of each.
        """
        super().__init__()
        self._frozen = frozen
        self.error: UserError | None = None
        self.written: list[Path] = []
        """By this rank, since `written` was last cleared."""

    def save(self, state_dict: Any, path: str) -> None:
        for name in self._frozen:
            state_dict.get("module", {}).pop(name, None)
        try:
            super().save(state_dict, path)
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:
            self.error = _cannot_be_written(path, error)

    def load(self, path: str, map_location: Any = None) -> Any:
        with tensors_only():
            try:
                return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                raise refused(path, error) from None


def use_safe_loading(engine: Any) -> None:
    """Make a DeepSpeed engine save and load through the safe checkpoint engine."""
    engine.checkpoint_engine = _SafeCheckpointEngine(_frozen(engine.module))


def save_checkpoint(engine: Any, run: Path, state: TrainerState, world: World) -> None:
    """Write the checkpoint after a step; called by all ranks.

    Args:
        state: without its files.

    Raises:
        UserError: on all ranks, where there is not enough room, or any of them could not write its part.
    """
    folder = checkpoint_folder(run, state.step)
    # One name for all ranks, whichever host they are on.
    temporary = folder.with_name(_SAVING + folder.name)
    _agree(world, _begun(run, folder, temporary) if world.rank == 0 else None)
    try:
        _agree(world, _written(engine, temporary, world.rank))
        _agree(world, commit(temporary, folder, state) if world.rank == 0 else None)
    except UserError:
        if world.rank == 0:
            remove(temporary)
        raise


def _begun(run: Path, folder: Path, temporary: Path) -> UserError | None:
    """Make the temporary folder, if there is room; what a killed run left behind goes first."""
    try:
        _remove_unfinished(folder.parent)
        remove(folder)
        temporary.mkdir(parents=True)
        return lack_of_room(run)
    except OSError as error:
        return _cannot_be_written(temporary, error)


def _remove_unfinished(checkpoints: Path) -> None:
    """Remove what a killed run was saving or converting."""
    for prefix in (_SAVING, _CONVERTED):
        for unfinished in checkpoints.glob(f"{prefix}*"):
            remove(unfinished)


def _written(engine: Any, temporary: Path, rank: int) -> UserError | None:
    """Write what this rank has of a checkpoint."""
    safe: _SafeCheckpointEngine = engine.checkpoint_engine
    safe.written.clear()
    # Frozen weights are those of the model's own files; the settings of the run name their content.
    engine.save_checkpoint(str(temporary), tag=_TAG, client_state={}, save_latest=False, exclude_frozen_parameters=True)
    if safe.error is not None:
        return safe.error
    try:
        write_manifest(temporary, rank, safe.written)
    except OSError as error:
        return _cannot_be_written(temporary, error)
    return None


def _cannot_be_written(path: Path | str, error: OSError | RuntimeError) -> UserError:
    # A full disk reaches torch's writer as a RuntimeError, without an errno.
    if isinstance(error, RuntimeError) and "write" not in str(error).lower():
        raise error
    return UserError(f"{path}: the checkpoint cannot be written ({error}); older ones are as they were")


def _agree(world: World, error: UserError | None) -> None:
    """Raise on all ranks where one of them met an error; also where all wait for each other."""
    if world.any_in_its_time(error is not None):
        raise error or UserError("another rank could not read or write its part of the checkpoint")


def load_newest(engine: Any, folders: list[Path], world: World) -> Path:
    """Load the first whole checkpoint of a list; called by all ranks. Others are passed over with a message.

    One that another number of ranks saved is converted on the way.

    Raises:
        UserError: none is whole, or one holds more than tensors although its manifest agrees.
    """
    for folder in folders:
        if _damaged_files(folder, world):
            if world.rank == 0:
                print(f"WARNING: {folder} is damaged and is passed over", flush=True)
        elif read_state(folder).world_size == world.size:
            path, _ = engine.load_checkpoint(str(folder), tag=_TAG, custom_load_fn=_load_trained)
            assert path is not None, f"DeepSpeed found nothing to load in {folder}"
            return folder
        else:
            _load_converted(engine, folder, world)
            return folder
    raise UserError(
        f"{folders[0].parent}: expected a whole checkpoint, but {', '.join(folder.name for folder in folders)} "
        "is damaged, and no other was to be tried: give train.resume=auto, or, where none is whole, remove the folder "
        "to start over"
    )


def _load_converted(engine: Any, folder: Path, world: World) -> None:
    """Load a checkpoint that another number of ranks saved."""
    converted = folder.with_name(_CONVERTED + folder.name)
    if world.rank == 0:
        print(f"{folder} is converted for {world.size} ranks", flush=True)
    try:
        _agree(world, _converted(folder, converted) if world.rank == 0 else None)
        load_universal(engine, converted, _TAG)
        world.wait_for_all()
    finally:
        if world.rank == 0:
            remove(converted)


def _converted(folder: Path, converted: Path) -> UserError | None:
    """Convert; fragments and merged files lie side by side for a while."""
    try:
        _remove_unfinished(folder.parent)
        if lack := lack_of_room(folder.parent.parent, 3.0):
            return lack
        converted.mkdir()
        convert(folder / _TAG, converted / _TAG)
    except UserError as error:
        return error
    except (OSError, RuntimeError) as error:
        return _cannot_be_written(converted, error)
    return None


def _load_trained(src: dict[str, Any], dst: torch.nn.Module) -> None:
    """Load a module from a checkpoint that holds all but its frozen parameters."""
    missing, unexpected = dst.load_state_dict(src, strict=False)
    differing = sorted({*missing} - _frozen(dst) | {*unexpected})
    assert not differing, f"parameters of the checkpoint and of the model differ: {', '.join(differing)}"


def _frozen(module: torch.nn.Module) -> set[str]:
    """Names of the parameters that are not trained; a tied one has two."""
    named = module.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _damaged_files(folder: Path, world: World) -> int:
    """How many files are not what the manifest says, each hashed by one of the ranks."""
    try:
        files = read_state(folder).files
        mine = sorted(files)[world.rank :: world.size]
        damaged = sum(_entry_or_none(folder / name) != files[name] for name in mine)
    except UserError:
        damaged = 1  # it was whole when this rank looked at it alone
    return int(world.all_reduce(torch.tensor(float(damaged), device=world.device)))


def _entry_or_none(path: Path) -> list | None:
    try:
        return entry_of(path)
    except OSError:
        return None

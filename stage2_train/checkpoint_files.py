"""Checkpoint folders on disk: which are whole, and how one becomes so. Imports no torch.

A checkpoint is written into a temporary folder beside its place, every file of it hashed, flushed, and renamed; then
`LATEST` is. A folder named `step-0000123` whose files are those of its manifest, byte for byte, is whole.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import remove, replacing, sha256_of_file, sha256_of_json, sync_entry, sync_tree

_STATE_NAME = "trainer.json"
_LATEST_NAME = "LATEST"
_MANIFEST_PREFIX = ".manifest-"
_NAME = re.compile(r"step-(\d{7})")


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint says of the run beside DeepSpeed's files."""

    step: int
    """Optimizer steps made."""
    world_size: int
    zero_stage: int
    settings: dict[str, Any]
    """What a run that goes on from it must share."""
    probe_nll: float
    """Mean nll of a batch that a function of the step chooses, nats per target, to be recomputed after loading."""
    num_nonfinite_steps: int
    """Of the run so far."""
    files: dict[str, list] = field(default_factory=dict)
    """Size in bytes and sha256 of each file, by its path in the folder."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after a step lies."""
    return run / "checkpoints" / f"step-{step:07d}"


def whole_checkpoints(run: Path) -> tuple[list[Path], list[str]]:
    """Checkpoints whose folder is as it was left, the newest first, without a look at what their files hold.

    Returns:
        The folders, and a sentence for each that is damaged.
    """
    folders, problems = [], []
    for folder in reversed(_checkpoints(run)):
        try:
            read_state(folder)
            folders.append(folder)
        except UserError as error:
            problems.append(str(error))
    return folders, problems


def read_state(folder: Path) -> TrainerState:
    """The trainer's own state of a checkpoint.

    Raises:
        UserError: not a checkpoint, or one with files missing, added or cut.
    """
    try:
        record = json.loads((folder / _STATE_NAME).read_text(encoding="utf-8"))
        digest = record.pop("digest")
        files = {name: size for name, (size, _) in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder}: expected a checkpoint with {_STATE_NAME}, found none") from None
    if digest != sha256_of_json(record):
        raise UserError(f"{folder}: its {_STATE_NAME} was changed")
    if record.keys() != {part.name for part in fields(TrainerState)}:
        raise UserError(f"{folder}: its {_STATE_NAME} is of another version of this software")
    found = {str(path.relative_to(folder)): path.stat().st_size for path in _files_of(folder)}
    if differing := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        raise UserError(f"{folder}: missing, added or of another size: {', '.join(differing)}")
    return TrainerState(**record)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints."""
    for folder in _checkpoints(run)[:-keep]:
        remove(folder)


def remove_checkpoints_after(run: Path, step: int) -> list[str]:
    """Remove the checkpoints of later steps, damaged ones too; `LATEST` names that step's.

    Returns:
        The names of those removed.
    """
    newest = checkpoint_folder(run, step)
    _write_latest(newest)
    later = [folder for folder in _checkpoints(run) if folder.name > newest.name]
    for folder in later:
        remove(folder)
    return [folder.name for folder in later]


def lack_of_room(run: Path, times: float = 1.2) -> UserError | None:
    """What is wrong where so many times the newest checkpoint would not fit beside those that are there."""
    newest = next(iter(_checkpoints(run)[-1:]), None)
    if newest is None:
        return None
    needed = times * sum(path.stat().st_size for path in newest.rglob("*"))
    free = shutil.disk_usage(run).free
    if free >= needed:
        return None
    return UserError(
        f"{run}: a checkpoint needs {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; none was begun, and "
        "older ones are as they were. Make room, and start again"
    )


def write_manifest(folder: Path, rank: int, written: list[Path]) -> None:
    """Flush and hash what one rank wrote into an unfinished checkpoint.

    Raises:
        OSError: as the system gives it; a full disk may show here only.
    """
    for path in written:
        sync_entry(path)
    entries = {str(path.relative_to(folder)): entry_of(path) for path in written}
    (folder / f"{_MANIFEST_PREFIX}{rank}").write_text(json.dumps(entries), encoding="utf-8")


def commit(temporary: Path, folder: Path, state: TrainerState) -> UserError | None:
    """Complete a checkpoint and give it its name; by one rank, when all have written.

    Args:
        state: without its files, which are listed here.
    """
    # DeepSpeed copies conversion scripts into each checkpoint; a folder of data holds no code.
    for script in temporary.rglob("*.py"):
        script.unlink()
    try:
        files: dict[str, list] = {}
        for part in sorted(temporary.glob(f"{_MANIFEST_PREFIX}*")):
            files |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        content = {**asdict(state), "files": files}
        record = {**content, "digest": sha256_of_json(content)}
        (temporary / _STATE_NAME).write_text(json.dumps(record, indent=2), encoding="utf-8")
        sync_tree(temporary)
        temporary.replace(folder)
        sync_entry(folder.parent)
        _write_latest(folder)
    except OSError as error:
        return UserError(f"{folder}: the checkpoint cannot be written ({error}); older ones are as they were")
    return None


def _write_latest(folder: Path) -> None:
    """For people and other programs; resuming looks at the folders themselves."""
    with replacing(folder.parent / _LATEST_NAME) as latest:
        latest.write_text(folder.name + "\n", encoding="utf-8")


def entry_of(path: Path) -> list:
    """Size in bytes and sha256 of a file, as a manifest has them."""
    return [path.stat().st_size, sha256_of_file(path)]


def _files_of(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.name != _STATE_NAME and (path.is_symlink() or not path.is_dir()):
            yield path


def _checkpoints(run: Path) -> list[Path]:
    folder = run / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if _NAME.fullmatch(entry.name))

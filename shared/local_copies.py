"""Local copies of what lies in an object store, under TMPDIR: to read once, or kept till the run ends."""

import fcntl
import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shared.files import remove, scratch_folder

if TYPE_CHECKING:
    from shared.places import Place, RemotePath


@contextmanager
def local_copy(path: "Place") -> Iterator[Path]:
    """A local file with the content, removed after the block; a local path itself."""
    if isinstance(path, Path) or _kept_file(path).exists():
        yield kept_copy(path)
        return
    # Not shared: what reads a store twice at once would wait for itself.
    file = scratch_folder() / f"{uuid.uuid4().hex}-{path.name}"
    try:
        path.download(file)
        yield file
    finally:
        remove(file)


def kept_copy(path: "Place") -> Path:
    """A local file with the content as it was when the run first asked for it, kept till the run ends; a local path
    itself. Processes that this one starts share it."""
    if isinstance(path, Path):
        return path
    file = _kept_file(path)
    if not file.exists():
        with _locked(path):
            if not file.exists():
                partial = file.with_suffix(".partial")
                stat = path.download(partial)
                file.with_suffix(".json").write_text(json.dumps(vars(stat)))
                partial.replace(file)
    return file


def kept_record(path: "RemotePath") -> dict[str, int] | None:
    """What `kept_copy` noted of the object that it copied; None where there is no copy."""
    file = _kept_file(path)
    return json.loads(file.with_suffix(".json").read_text()) if file.exists() else None


def _kept_file(path: "RemotePath") -> Path:
    return scratch_folder() / f"{_digest(path)}.kept"


def _digest(path: "RemotePath") -> str:
    return hashlib.sha256(path.url.encode()).hexdigest()[:32]


@contextmanager
def _locked(path: "RemotePath") -> Iterator[None]:
    with (scratch_folder() / f"{_digest(path)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Durable files: nothing under its final name is ever half-written.

A file or folder is written under a temporary name beside its place, flushed to the disk, and renamed.
A temporary name carries the host and the process that made it, so that what a killed process left behind
can be told from what a living one is writing.

Where a path lies in an object store (`shared/places.py`), there is no rename and none is needed: an object appears
whole or not at all.
"""

import atexit
import hashlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.places import Place

_SCRATCH_VARIABLE = "PRIFT_SCRATCH"
_PREFIX = ".tmp-"


def sha256_of_file(path: "Place") -> str:
    """Hex sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(text: str | bytes) -> Any:
    """A JSON value; one that is nested too deeply to be read is as malformed as any.

    Raises:
        ValueError: malformed.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_of_json(value: Any) -> str:
    """Hex sha256 of a JSON value in canonical form: sorted keys, no blanks, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sync_tree(path: Path) -> None:
    """Flush a file, or every file and folder below a folder, to the disk."""
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        sync_entry(entry)


@contextmanager
def replacing(path: "Place") -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, what lies there becomes `path`, all at once.

    What is written may be a file or a folder. A folder replaces only an absent or empty folder.
    When the block raises, the temporary is removed and `path` is as it was. To an object store a file is uploaded.
    """
    if not isinstance(path, Path):
        temporary = scratch_folder() / f"{uuid.uuid4().hex}-{path.name}"
        try:
            yield temporary
            path.upload(temporary)
        finally:
            remove(temporary)
        return
    temporary = temporary_path(path)
    try:
        yield temporary
        sync_tree(temporary)
        temporary.replace(path)
        sync_entry(path.parent)
    except BaseException:
        remove(temporary)
        raise


def temporary_path(path: Path) -> Path:
    """The name beside `path` under which this process prepares it."""
    return path.with_name(f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{path.name}")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_stale_temporaries(folder: "Place") -> None:
    """Remove what processes of this host, now dead, left half-written in the folder; in an object store none can."""
    if not isinstance(folder, Path):
        return
    mine = f"{_PREFIX}{socket.gethostname()}-"
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith(mine):
            pid = entry.name[len(mine) :].split("-", 1)[0]
            if pid.isdigit() and not _is_alive(int(pid)):
                remove(entry)


def json_text(value: Any) -> str:
    """JSON as our files hold it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def create_json(path: "Place", value: Any) -> bool:
    """Write a JSON file unless one is there; of several processes exactly one gets True.

    The file appears with its whole content: it is linked to its name from a finished temporary.
    """
    if not isinstance(path, Path):
        return path.create(json_text(value).encode())
    temporary = temporary_path(path)
    temporary.write_text(json_text(value), encoding="utf-8")
    try:
        sync_tree(temporary)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_entry(path.parent)
    return True


def probe_writable(folder: "Place") -> None:
    """Make the folder and write a file in it, so that a read-only or full disk shows at once.

    Raises:
        OSError: as the system gives it.
        UserError: what an object store refuses.
    """
    if not isinstance(folder, Path):
        folder.probe_writable()
        return
    folder.mkdir(parents=True, exist_ok=True)
    probe = temporary_path(folder / "probe")
    try:
        probe.write_bytes(b"\0" * 4096)
        sync_tree(probe)
    finally:
        probe.unlink(missing_ok=True)


def sync_entry(path: Path) -> None:
    """Flush one file, or a folder's own entries after a rename in it, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def scratch_folder() -> Path:
    """A folder under TMPDIR for copies of remote files, removed when the process ends; its children share it.

    What a killed process left there is removed when the next one makes its own.
    """
    given = os.environ.get(_SCRATCH_VARIABLE)
    if given and Path(given).is_dir():
        return Path(given)
    above = Path(tempfile.gettempdir())
    for entry in above.glob(f"{_PREFIX}{socket.gethostname()}-*-prift-*"):
        pid = entry.name.removeprefix(f"{_PREFIX}{socket.gethostname()}-").split("-", 1)[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(entry, ignore_errors=True)  # another user's stays
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-prift-", dir=above))
    os.environ[_SCRATCH_VARIABLE] = str(folder)
    atexit.register(_remove_scratch, folder, os.getpid())
    return folder


def remove_scratch() -> None:
    """Remove this process's scratch folder now, where the interpreter's own ending is left out."""
    given = Path(os.environ.get(_SCRATCH_VARIABLE, ""))
    if given.name.startswith(f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-"):
        _remove_scratch(given, os.getpid())


def _remove_scratch(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

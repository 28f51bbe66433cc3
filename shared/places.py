"""Where something lies: a local path, or an object under s3://, gs:// or hf://. Imports no client library at the top.

`RemotePath` has the few verbs of `pathlib.Path` that the code needs, so most of it does not know which of the two it
has. Every verb waits out an outage (`shared/retrying.py`). What is read as a file is copied to the local disk first.
"""

import glob
import hashlib
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import UserError
from shared.local_copies import kept_copy, kept_record
from shared.retrying import retrying

_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_WRITABLE = ("s3", "gs")
"""Where an object can be created only if it is not there, which `store.json` needs."""
_CHUNK = 32 << 20
_THREADS = 4
_FOOTER_BYTES = 64 << 10

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Stat:
    """What an object store says of an object, named as `os.stat` names it."""

    st_size: int
    st_mtime_ns: int
    """No time: 56 bits of a sha256 of the object's ETag (generation, blob id), which changes with its content."""


@dataclass(frozen=True)
class RemotePath:
    """An object, or the beginning that the names of several share."""

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def scheme(self) -> str:
        """s3, gs or hf."""
        return self.url.split(":", 1)[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rsplit("/", 1)[1]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "RemotePath":
        """All but the last part."""
        return RemotePath(self.url.rsplit("/", 1)[0])

    def absolute(self) -> "RemotePath":
        """Itself."""
        return self

    def resolve(self) -> "RemotePath":
        """Itself."""
        return self

    def exists(self) -> bool:
        """Whether there is such an object."""
        return self.is_file()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        try:
            return self._info()["type"] == "file"
        except FileNotFoundError:
            return False

    def stat(self) -> Stat:
        """Size and version; of what was copied by `kept_copy`, those of the copy.

        Raises:
            FileNotFoundError: there is no such object.
        """
        recorded = kept_record(self)
        return Stat(**recorded) if recorded is not None else _stat_of(self._info())

    def names(self) -> set[str]:
        """Names of the objects right under this one."""
        try:
            entries = self._do(lambda files: files.ls(self.url, detail=False))
        except FileNotFoundError:
            return set()
        return {entry.rstrip("/").rsplit("/", 1)[1] for entry in entries if "/" in entry.rstrip("/")}

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: there is no such object.
        """
        return self._do(lambda files: files.cat_file(self.url))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def read_footer(self) -> bytes:
        """The last bytes of a Parquet file, its whole footer among them."""
        size = _stat_of(self._info()).st_size
        tail = self._read_range(max(size - _FOOTER_BYTES, 0), size)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        return tail if len(tail) < 8 or needed <= len(tail) else self._read_range(max(size - needed, 0), size)

    def open(self, mode: str = "r", encoding: str | None = None) -> Any:
        """Open a local copy, which is kept till the run ends."""
        return kept_copy(self).open(mode, encoding=encoding)

    def create(self, content: bytes) -> bool:
        """Write an object unless one is there; of several processes one gets True.

        One that had to try again may get False for what it wrote itself.
        """
        try:
            self._do(lambda files: files.pipe_file(self.url, content, mode="create"))
        except FileExistsError:
            return False
        return True

    def write_bytes(self, content: bytes) -> None:
        """Write an object, all at once."""
        self._do(lambda files: files.pipe_file(self.url, content))

    def replace(self, expected: bytes, content: bytes) -> bool:
        """Replace an object that holds what is expected; False where it does not.

        On S3 nothing can come in between (If-Match); elsewhere it could between the look and the write.
        """
        etag = self._info().get("ETag")
        if self.read_bytes() != expected:
            return False
        condition = {"IfMatch": etag} if self.scheme == "s3" and etag else {}
        try:
            retrying(lambda: _on_condition(self, content, condition), self.url)
        except FileExistsError:
            return False
        return True

    def upload(self, file: Path) -> None:
        """Write an object from a local file: by one request, or in parts that become an object with the last one."""
        self._do(lambda files: files.put_file(str(file), self.url))

    def refuse_read_only(self) -> None:
        """Refuse to write a store where it could not be begun exclusively.

        Raises:
            UserError: such a place.
        """
        if self.scheme not in _WRITABLE:
            raise UserError(
                f"{self.url}: a store cannot be written under {self.scheme}://, which has no way to create an object "
                "only once; write it locally or under s3:// or gs://, and copy it when it is finished"
            )

    def probe_writable(self) -> None:
        """Write a small object there and remove it again.

        Raises:
            UserError: no rights, no bucket, or a place that is only read.
        """
        self.refuse_read_only()
        probe = self / ".tmp-probe"
        probe.write_bytes(b"\0")
        # Without the right to delete one small object stays; another start may have removed it.
        with suppress(UserError, FileNotFoundError):
            probe._do(lambda files: files.rm_file(probe.url))

    def download(self, file: Path) -> Stat:
        """Copy the object to a local file, piece by piece.

        Raises:
            FileNotFoundError: there is no such object.
            UserError: no room for it, or it was changed meanwhile.
        """
        stat = _stat_of(self._info())
        free = shutil.disk_usage(file.parent).free
        if stat.st_size > free:
            raise UserError(
                f"{self.url}: {stat.st_size / 1e6:,.0f} MB are copied to {file.parent.parent} to be read, which has "
                f"{free / 1e6:,.0f} MB free; TMPDIR names another folder"
            )
        # A few chunks at once, which are all that is in memory.
        with file.open("wb") as target, ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, stat.st_size, _CHUNK * _THREADS):
                starts = range(first, min(first + _CHUNK * _THREADS, stat.st_size), _CHUNK)
                for chunk in pool.map(lambda at: self._read_range(at, min(at + _CHUNK, stat.st_size)), starts):
                    target.write(chunk)
        if _stat_of(self._info()) != stat:
            raise UserError(f"{self.url}: changed while it was read; run the command again")
        return stat

    def _read_range(self, start: int, stop: int) -> bytes:
        def read(files: Any) -> bytes:
            content = files.cat_file(self.url, start=start, end=stop)
            if len(content) != stop - start:
                raise ConnectionError(f"{len(content)} bytes came of {stop - start}")
            return content

        return self._do(read) if stop > start else b""

    def _info(self) -> dict[str, Any]:
        return self._do(lambda files: files.info(self.url))

    def _do(self, action: Callable[[Any], _Result]) -> _Result:
        files = _filesystem(self.scheme)
        return retrying(lambda: action(files), self.url)


Place = Path | RemotePath
"""Where something lies."""


def place(text: str | Place) -> Place:
    """A path or URL as the user gives it.

    Raises:
        UserError: another scheme, or credentials in the URL.
    """
    if not isinstance(text, str):
        return text
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)", text)
    if not found:
        return Path(text)
    scheme, holder = found.groups()
    if "@" in holder or re.search(r"\?[^/]*=", text):
        raise UserError(
            f"{scheme}://***: a URL must not hold a user, a password or a ?query=: credentials come from the "
            "environment"
        )
    if scheme not in _EXTRAS or not holder:
        raise UserError(f"{text}: expected a path, or a URL such as {', '.join(f'{it}://...' for it in _EXTRAS)}")
    return RemotePath(text.rstrip("/"))


def local_place(text: str | Path, key: str) -> Path:
    """A path that must be a local one.

    Args:
        key: what gives it, for the message.

    Raises:
        UserError: it is an URL.
    """
    found = place(text)
    if isinstance(found, RemotePath):
        raise UserError(f"{key}={found}: expected a local folder: it cannot lie in an object store")
    return found


def matching_files(pattern: str) -> list[Place]:
    """The files that a path, URL or glob means, sorted; none where nothing is there."""
    where = place(pattern)
    if isinstance(where, RemotePath):
        if not glob.has_magic(pattern):
            return [where] if where.is_file() else []
        found = where._do(lambda files: files.glob(pattern, detail=True))
        names = sorted(name for name, entry in found.items() if entry["type"] == "file")
        return [RemotePath(f"{where.scheme}://{name.removeprefix(f'{where.scheme}://')}") for name in names]
    matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    return [Path(match) for match in matches if Path(match).is_file()]


def _stat_of(info: dict[str, Any]) -> Stat:
    names = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "updated", "last_commit")
    version = next((str(info[name]) for name in names if info.get(name)), "")
    return Stat(int(info["size"] or 0), int.from_bytes(hashlib.sha256(version.encode()).digest()[:7]))


def _on_condition(path: RemotePath, content: bytes, condition: dict[str, str]) -> None:
    try:
        _filesystem(path.scheme).pipe_file(path.url, content, **condition)
    except OSError as error:
        response = getattr(error.__cause__, "response", {})
        if condition and response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 412:
            raise FileExistsError(path.url) from None
        raise


@cache
def _filesystem(scheme: str) -> Any:
    """The client of a scheme, with credentials and endpoint from the environment, as its library reads them."""
    import fsspec

    # Nothing is remembered of listings: others write there. One try each, and an end to waiting: we try again.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        retries = {"total_max_attempts": 1, "mode": "standard"}
        options["max_concurrency"] = _THREADS  # parts of 50 MB that an upload holds in memory
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60, "retries": retries}
    try:
        files = fsspec.filesystem(scheme, **options)
        files.retries = 1
        return files
    except ImportError:
        raise UserError(
            f"{scheme}:// needs {_EXTRAS[scheme]}, which is not installed: pip install 'prift[remote]'"
        ) from None

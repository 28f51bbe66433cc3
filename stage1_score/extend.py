"""A data set that gained rows: what of it a store holds already, and what is to be scored."""

import gzip
import hashlib
import io
from collections.abc import Sequence
from typing import Any, BinaryIO

from shared.errors import UserError
from shared.places import Place, place
from shared.score_store import DataFile, Manifest, Source

_CHUNK = 1 << 20


def grown_manifest(found: Manifest, now: Source) -> Manifest | None:
    """The manifest of the store once it holds the new rows too; None where there are none.

    The store's rows must be the first of the data as it is now: new files stand at the end of the list, or the last
    file, JSON lines, got new lines at its end, or the limit was raised.

    Args:
        now: the source as it is now; its format, columns and shard size are the store's.

    Raises:
        UserError: the data changed in another way.
    """
    old = found.source
    if _contents(old) == _contents(now):
        return None
    if old.hub or now.hub:
        raise UserError(
            f"score.extend: the store holds {old.hub or 'files'}, the data is now {now.hub or 'files'}: which rows of "
            "a data set of the hub are new is not known; score into another store"
        )
    if len(now.files) < len(old.files):
        raise UserError(
            f"score.extend: the store holds rows of {len(old.files)} files, data.path names {len(now.files)}"
        )
    for number, (before, after) in enumerate(zip(old.files, now.files, strict=False)):
        is_last = number == len(old.files) - 1
        if before.sha256 != after.sha256:
            _refuse_file_before(before, now.files[number:])
            _refuse_other_beginning(before, after, is_last)
        elif before.num_rows != after.num_rows and not is_last:
            raise UserError(
                f"score.extend: the store was merged and holds {before.num_rows} of the {after.num_rows} rows of "
                f"{after.path}, and rows of other files after them: score the rest into another store"
            )
    if now.num_rows < old.num_rows:
        raise UserError(f"score.extend: the store holds {old.num_rows} rows, data.limit={now.limit} asks for fewer")
    if now.weighted and not old.weighted:
        raise UserError(
            "score.extend: the new rows give some targets weights of their own, and the store has no column for them: "
            "score the new rows, or all, into another store (train.scores takes several)"
        )
    grew = now.num_rows > old.num_rows and old.num_rows > 0
    extended_at = (*old.extended_at, old.num_rows) if grew else old.extended_at
    source = now.model_copy(update={"extended_at": extended_at, "weighted": old.weighted})
    return found.model_copy(update={"source": source})


def _refuse_file_before(scored: DataFile, files: Sequence[DataFile]) -> None:
    """Refuse a new file that stands before one whose rows were scored, as a glob may put it."""
    places = [place for place, file in enumerate(files) if file.sha256 == scored.sha256]
    if places:
        raise UserError(
            f"score.extend: {files[0].path} stands before {files[places[0]].path}, whose rows are scored: name the "
            "files of data.path one by one, new ones at the end"
        )


def _refuse_other_beginning(before: DataFile, after: DataFile, is_last: bool) -> None:
    """Refuse a file whose first bytes are not the whole of the recorded one."""
    path = place(after.path)
    advice = "put new rows into a file of their own, at the end of data.path"
    if not is_last:
        raise UserError(f"{path}: changed since it was scored, and other files follow it: {advice}")
    if path.suffix == ".parquet":
        raise UserError(f"{path}: changed since it was scored, and a Parquet file cannot grow at its end: {advice}")
    if after.size < before.size or _sha256_of_first(path, before.size) != before.sha256:
        raise UserError(
            f"{path}: its first {before.size:,} bytes are not those that were scored: rows were changed, removed or "
            f"put before others; {advice}, or score again"
        )
    if not _ends_a_line(path, before.size):
        raise UserError(f"{path}: its last scored line had no line break and was written on: score it again")


def _sha256_of_first(path: Place, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(size, _CHUNK))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _ends_a_line(path: Place, size: int) -> bool:
    """Whether a line ends with the first bytes of a file, or right after them, whatever its compression."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            before = gzip.GzipFile(fileobj=io.BufferedReader(_FirstBytes(raw, size)))
            last = b"\n"
            while chunk := before.read(_CHUNK):
                last = chunk[-1:]
            raw.seek(size)
            following = gzip.GzipFile(fileobj=raw).read(1)
        else:
            raw.seek(max(size - 1, 0))
            last = raw.read(1) if size else b"\n"
            following = raw.read(1)
    return last == b"\n" or following in (b"\n", b"\r", b"")


class _FirstBytes(io.RawIOBase):
    """A file that ends after so many bytes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(min(self._left, len(buffer)))
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)


def _contents(source: Source) -> tuple[list[tuple[str, int]], int | None]:
    return [(file.sha256, file.num_rows) for file in source.files], source.limit

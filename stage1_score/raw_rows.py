"""From files to raw rows: JSONL, gzipped JSONL and Parquet."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import DataConfig
from shared.errors import UserError
from shared.local_copies import kept_copy
from shared.places import Place, matching_files


def expand_paths(config: DataConfig) -> list[Place]:
    """The data files in order: as listed, and each glob sorted.

    Raises:
        UserError: data.path is not given, or nothing is there.
    """
    if config.path is None:
        raise UserError("expected data.path or data.hub.id, the data to score; got none")
    found: list[Place] = []
    for pattern in [config.path] if isinstance(config.path, str) else config.path:
        files = matching_files(pattern)
        if not files:
            raise UserError(f"data.path: {pattern}: no such file")
        found += files
    for path in found:
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise UserError(f"data.path: {path}: expected .jsonl, .jsonl.gz or .parquet")
    return found


def raw_rows(path: Place, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, row) of a file, from its row `start` on."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, start)
        return
    with _open_lines(path) as lines:
        numbered = ((number, line) for number, line in enumerate(_whole(lines, path), 1) if line.strip())
        for number, line in islice(numbered, start, None):
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"{path}:{number}: malformed JSON: {reason}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {shown(row)}")
            yield number, row


def count_rows(path: Place) -> int:
    """Rows of a file, blank lines not counted."""
    if path.suffix == ".parquet":
        return pq.read_metadata(kept_copy(path)).num_rows
    with _open_lines(path) as lines:
        return sum(1 for line in _whole(lines, path) if line.strip())


def _parquet_rows(path: Place, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(kept_copy(path)) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size > start:
                    skipped = max(start - number, 0)
                    rows = file.read_row_group(group).slice(skipped).to_pylist()
                    yield from enumerate(rows, number + skipped + 1)
                number += size
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _open_lines(path: Place) -> AbstractContextManager[IO[bytes]]:
    return gzip.open(kept_copy(path), "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def _whole(lines: Iterable[bytes], path: Place) -> Iterator[bytes]:
    """The lines of a file; a gzip file that is torn or damaged is the user's to mend."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

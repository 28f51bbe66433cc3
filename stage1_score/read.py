"""From files to `Example`: JSONL, gzipped JSONL and Parquet in, one typed row out.

Every row is parsed once before anything is written, so that a malformed one costs no scoring.
"""

import glob
import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.config import ColumnsConfig, DataConfig
from shared.errors import UserError
from shared.files import sha256_of_file, sha256_of_json
from shared.score_store import DataFile, Source


@dataclass(frozen=True)
class Conversation:
    """Chat messages as the template takes them, with the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and the text that is trained on."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class TokenIds:
    """Tokens given as such."""

    input_ids: list[int]
    target_mask: list[bool]


@dataclass(frozen=True)
class Example:
    """One row of the source."""

    source_index: int
    place: str
    """file:line, for messages."""
    row_id: str
    """The user's own, else a hash of the content."""
    content: Conversation | PromptCompletion | TokenIds


@dataclass(frozen=True)
class RowFormat:
    """How a row of this source is read, settled by its first row."""

    name: str
    """messages, prompt_completion or tokens."""
    columns: ColumnsConfig
    id_column: str | None

    def columns_read(self) -> dict[str, str | None]:
        """Names of the columns that are read, as recorded in the store."""
        names = {"messages": ["messages", "tools"], "prompt_completion": ["prompt", "completion"]}
        read = names.get(self.name, ["input_ids", "target_mask"])
        return {"id": self.id_column, **{name: getattr(self.columns, name) for name in read}}


def expand_paths(config: DataConfig) -> list[Path]:
    """The data files in order: as listed, and each glob sorted.

    Raises:
        UserError: data.path is not given, or nothing is there.
    """
    if config.path is None:
        raise UserError("expected data.path, the data to score; got none")
    found: list[Path] = []
    for pattern in [config.path] if isinstance(config.path, str) else config.path:
        matches = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise UserError(f"data.path: {pattern}: no such file")
        found += files
    for path in found:
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")):
            raise UserError(f"data.path: {path}: expected .jsonl, .jsonl.gz or .parquet")
    return found


def detect_format(paths: Sequence[Path], config: DataConfig) -> RowFormat:
    """Settle the format from the first row.

    Raises:
        UserError: there is no row, or its columns are none of the known ones.
    """
    first = next((row for path in paths for _, row in _raw_rows(path, 0)), None)
    if first is None:
        raise UserError(f"data.path: {', '.join(map(str, paths))}: no row in it")
    columns = config.columns
    needs = {
        "tokens": (columns.input_ids, columns.target_mask),
        "messages": (columns.messages,),
        "prompt_completion": (columns.prompt, columns.completion),
    }
    fitting = [name for name, names in needs.items() if set(names) <= first.keys()]
    name = config.format if config.format != "auto" else (fitting or [None])[0]
    if name is None or not set(needs[name]) <= first.keys():
        expected = " or ".join("+".join(names) for names in ([needs[name]] if name else needs.values()))
        raise UserError(
            f"{paths[0]}: expected the columns {expected}, found {', '.join(map(repr, first))}; "
            "name yours with data.columns.*"
        )
    id_column = columns.id or next((name for name in ("row_id", "id") if name in first), None)
    return RowFormat(name, columns, id_column)


def scan_source(paths: Sequence[Path], row_format: RowFormat, limit: int | None, shard_rows: int) -> Source:
    """Hash and parse all files once: what is recorded of the source in the store.

    Raises:
        UserError: a row is malformed (names file:line), or row ids given by the user repeat.
    """
    hashes = array("Q")
    files: list[DataFile] = []
    for path in paths:
        first = sum(file.num_rows for file in files)
        parsed = None if limit is None else max(0, limit - first)
        for example in islice(read_file(path, row_format, 0, first), parsed):
            if row_format.id_column:
                hashes.append(_hash64(example.row_id))
        stat = path.stat()
        num_rows = _count_rows(path)
        files.append(DataFile(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns,
                              sha256=sha256_of_file(path), num_rows=num_rows))  # fmt: skip
    source = Source(format=row_format.name, columns=row_format.columns_read(), limit=limit, files=tuple(files),
                    shard_rows=shard_rows)  # fmt: skip
    _refuse_repeated_ids(source, row_format, hashes)
    return source


def read_rows(source: Source, row_format: RowFormat, rows: range) -> Iterator[Example]:
    """The examples of a contiguous range of source rows."""
    first = 0
    for file in source.files:
        start, stop = max(rows.start - first, 0), min(rows.stop - first, file.num_rows)
        if start < stop:
            yield from islice(read_file(Path(file.path), row_format, start, first), stop - start)
        first += file.num_rows


def read_file(path: Path, row_format: RowFormat, start: int, first_index: int) -> Iterator[Example]:
    """Examples of one file from its row `start` on; `first_index` is the source index of its row 0.

    Raises:
        UserError: a row is malformed; names file:line.
    """
    for offset, (line, row) in enumerate(_raw_rows(path, start)):
        place = f"{path}:{line}"
        content = _parse_content(row, row_format, place)
        row_id = None if row_format.id_column is None else row.get(row_format.id_column)
        if row_format.id_column is not None and (isinstance(row_id, bool) or not isinstance(row_id, str | int)):
            raise UserError(f"{place}: expected a string or number as {row_format.id_column!r}, got {_shown(row_id)}")
        if isinstance(row_id, str) and not row_id.isascii() and not _is_encodable(row_id):
            raise UserError(f"{place}: row id {_shown(row_id)} has half a surrogate pair")
        content_hash = sha256_of_json(vars(content))[:32] if row_id is None else ""
        yield Example(first_index + start + offset, place, content_hash if row_id is None else str(row_id), content)


def _parse_content(
    row: dict[str, Any], row_format: RowFormat, place: str
) -> Conversation | PromptCompletion | TokenIds:
    columns = row_format.columns
    if row_format.name == "messages":
        messages = _field(row, columns.messages, list, place)
        # Parquet gives every message every key; a template takes a null for a value.
        messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
        if not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise UserError(f"{place}: expected messages with a role each, got {_shown(messages)}")
        tools = row.get(columns.tools) or None
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise UserError(f"{place}: expected a list of objects as {columns.tools!r}, got {_shown(tools)}")
        return Conversation(messages, tools)
    if row_format.name == "prompt_completion":
        return PromptCompletion(*(_field(row, name, str, place) for name in (columns.prompt, columns.completion)))
    ids, mask = (_field(row, name, list, place) for name in (columns.input_ids, columns.target_mask))
    if len(ids) != len(mask):
        raise UserError(f"{place}: {columns.input_ids} has {len(ids)} tokens, {columns.target_mask} has {len(mask)}")
    if not all(type(token) is int for token in ids) or not all(flag in (0, 1) for flag in mask):
        raise UserError(f"{place}: expected integers as {columns.input_ids} and 0 or 1 as {columns.target_mask}")
    return TokenIds(ids, [bool(flag) for flag in mask])


def _field(row: dict[str, Any], name: str, kind: type, place: str) -> Any:
    value = row.get(name)
    if not isinstance(value, kind):
        raise UserError(f"{place}: expected {kind.__name__} as {name!r}, got {_shown(value)}")
    return value


def _raw_rows(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
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
                raise UserError(f"{path}:{number}: malformed JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {_shown(row)}")
            yield number, row


def _parquet_rows(path: Path, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size > start:
                    skipped = max(start - number, 0)
                    rows = file.read_row_group(group).slice(skipped).to_pylist()
                    yield from enumerate(rows, number + skipped + 1)
                number += size
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None


def _open_lines(path: Path) -> AbstractContextManager[IO[bytes]]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # pyright: ignore[reportReturnType]


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return pq.read_metadata(path).num_rows
    with _open_lines(path) as lines:
        return sum(1 for line in _whole(lines, path) if line.strip())


def _whole(lines: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a file; a gzip file that is torn or damaged is the user's to mend."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None


def _refuse_repeated_ids(source: Source, row_format: RowFormat, hashes: array) -> None:
    values, counts = np.unique(np.frombuffer(hashes, dtype=np.uint64), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    places: dict[str, str] = {}
    for example in read_rows(source, row_format, range(source.num_rows)) if suspects else ():
        if _hash64(example.row_id) in suspects:
            if example.row_id in places:
                raise UserError(
                    f"{example.place}: row id {example.row_id!r} is already at {places[example.row_id]}; row ids in "
                    f"{row_format.id_column!r} must be unique (data.columns.id names another column)"
                )
            places[example.row_id] = example.place


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

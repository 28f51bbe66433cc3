"""The source: all data files as one numbered sequence of examples.

Every row is parsed once before anything is written, so that a malformed one costs no scoring.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from shared.config import DataConfig
from shared.errors import UserError
from shared.files import sha256_of_file
from shared.places import Place, place
from shared.score_store import DataFile, HubSource, Source
from stage1_score.examples import Example
from stage1_score.formats import RowFormat, parse_row, settle_format
from stage1_score.hub import content_of
from stage1_score.raw_rows import count_rows, raw_rows


def detect_format(paths: Sequence[Place], config: DataConfig, vocab_size: int | None = None) -> RowFormat:
    """Settle the format from the first row.

    Args:
        vocab_size: ids of tokenised rows must be below it.

    Raises:
        UserError: there is no row, or its columns are none of the known ones.
    """
    first = next((row for path in paths for _, row in raw_rows(path, 0)), None)
    if first is None:
        raise UserError(f"data.path: {', '.join(map(str, paths))}: no row in it")
    return settle_format(first, config, str(paths[0]), vocab_size)


def scan_source(
    paths: Sequence[Place], row_format: RowFormat, limit: int | None, shard_rows: int, hub: HubSource | None = None
) -> Source:
    """Hash and parse all files once: what is recorded of the source in the store.

    Args:
        hub: the data set that the only file was made from.

    Raises:
        UserError: a row is malformed (names file:line), or row ids given by the user repeat.
    """
    hashes = array("Q")
    files: list[DataFile] = []
    is_weighted = False
    for path in paths:
        first = sum(file.num_rows for file in files)
        parsed = None if limit is None else max(0, limit - first)
        for example in islice(read_file(path, row_format, 0, first), parsed):
            is_weighted |= example.is_weighted
            if row_format.id_column:
                hashes.append(_hash64(example.row_id))
        stat = path.stat()
        num_rows = count_rows(path)
        files.append(DataFile(path=str(path), size=stat.st_size, mtime_ns=stat.st_mtime_ns,
                              sha256=content_of(hub) if hub else sha256_of_file(path), num_rows=num_rows))  # fmt: skip
    source = Source(format=row_format.name, columns=row_format.columns_read(), limit=limit, files=tuple(files),
                    shard_rows=shard_rows, weighted=is_weighted, hub=hub)  # fmt: skip
    _refuse_repeated_ids(source, row_format, hashes)
    return source


def read_rows(source: Source, row_format: RowFormat, rows: range) -> Iterator[Example]:
    """The examples of a contiguous range of source rows."""
    first = 0
    for file in source.files:
        start, stop = max(rows.start - first, 0), min(rows.stop - first, file.num_rows)
        if start < stop:
            yield from islice(read_file(place(file.path), row_format, start, first), stop - start)
        first += file.num_rows


def read_file(path: Place, row_format: RowFormat, start: int, first_index: int) -> Iterator[Example]:
    """Examples of one file from its row `start` on; `first_index` is the source index of its row 0.

    Raises:
        UserError: a row is malformed; names file:line.
    """
    for index, (line, row) in enumerate(raw_rows(path, start), first_index + start):
        yield parse_row(row, row_format, index, f"{path}:{line}")


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


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())

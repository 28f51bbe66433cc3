"""Shards of a score store: Parquet files written all at once, read with every page checksum verified.

Imports no torch. Value i of a statistic is about token i given the tokens before it, and null where token i is
not a target. A digest over every value of the shard stands in its footer: columns that were shifted, swapped
or edited after scoring no longer fit it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import UserError, first_line
from shared.files import parse_json, replacing
from shared.local_copies import local_copy
from shared.places import Place, RemotePath
from shared.score_store import MOST_ROWS, TARGET_WEIGHT, Manifest, read_manifest

_FOOTER_KEY = b"prift"
_FOOTERS_AT_ONCE = 8
_ROW_GROUP_ROWS = 512
_SHARD_NAME = re.compile(r"shard-([0-9]{5,13})\.parquet")
_TYPES = {"row_id": "string", "source_index": "int64", "turn": "int32", "input_ids": "list<int32>"}
"""Of the columns of a shard; all others are lists of float."""


@dataclass(frozen=True)
class ScoredRow:
    """A tokenised example with the prior's statistics of its targets."""

    row_id: str
    source_index: int
    input_ids: np.ndarray
    """int32 (T,)."""
    target_positions: np.ndarray
    """int32 (N,), ascending, each in [1, T)."""
    statistics: dict[str, np.ndarray]
    """Statistic name to float32 (N,); with the data's own weights, if any, as `target_weight`."""
    turn: int | None = None
    """Index of the message that alone is trained on here; None where the row holds all that its conversation trains."""


@dataclass(frozen=True)
class Shard:
    """A finished shard: its file and what its footer says."""

    path: Place
    index: int
    num_rows: int
    num_tokens: int
    num_targets: int
    digest: str
    """sha256 over all values."""


def shard_path(store: Place, index: int) -> Place:
    """Where a shard lies once it is done."""
    return store / f"shard-{index:05d}.parquet"


def dropped_path(store: Place, index: int) -> Place:
    """Where the rows of a shard that could not be scored are listed."""
    return store / f"shard-{index:05d}.dropped.jsonl"


def write_shard(
    store: Place, index: int, manifest: Manifest, rows: Sequence[ScoredRow], dropped: Sequence[dict[str, Any]],
    software: dict[str, str],
) -> Shard:  # fmt: skip
    """Write a shard and the list of its dropped rows; the shard is done when its file appears.

    Args:
        manifest: of the store; its fingerprint is repeated in the footer.
        rows: scored rows in source order.
        dropped: {row_id, source_index, reason} of the rest.
        software: engine, versions, device and attention backend; recorded.
    """
    table = _to_table(rows, manifest)
    digest = _Digest(table.schema.names)
    digest.update(table)
    footer = {
        "fingerprint": manifest.fingerprint,
        "shard": index,
        "num_rows": len(rows),
        "num_tokens": sum(len(row.input_ids) for row in rows),
        "num_targets": sum(len(row.target_positions) for row in rows),
        "digest": digest.hexdigest(),
        **software,
    }
    with replacing(dropped_path(store, index)) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in dropped), encoding="utf-8")
    with replacing(shard_path(store, index)) as temporary:
        pq.write_table(
            table.replace_schema_metadata({_FOOTER_KEY: json.dumps(footer).encode()}),
            temporary,
            row_group_size=_ROW_GROUP_ROWS,
            compression="zstd",
            use_dictionary=False,
            # The leaf must be named: for the column's name pyarrow ignores the encoding without a word.
            column_encoding={
                f"{name}.list.element": "BYTE_STREAM_SPLIT"
                for name in manifest.float_columns
                if name != "mass_rank"  # mostly exact zeros: plain is smaller
            },
            write_page_checksum=True,
        )
    return read_footer(shard_path(store, index), manifest, index)


def read_footer(path: Place, manifest: Manifest, index: int) -> Shard:
    """What a shard's footer says, checked against the store.

    Raises:
        UserError: the file is torn, or belongs to another store or place.
    """
    try:
        with pq.ParquetFile(footer_source(path)) as file:
            content, num_rows = (file.schema_arrow.metadata or {}).get(_FOOTER_KEY), file.metadata.num_rows
            fields = [(field.name, _shown_type(field.type)) for field in file.schema_arrow]
        footer = parse_json(content or b"{}")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({first_line(error)}); remove it and score again") from None
    said = footer if isinstance(footer, dict) else {}
    expected = {"fingerprint": manifest.fingerprint, "shard": index, "num_rows": num_rows}
    for name, value in expected.items():
        if said.get(name) != value:
            raise UserError(f"{path}: its footer says {name}={said.get(name)!r:.80}, expected {value!r}")
    for name, kind in (("num_tokens", int), ("num_targets", int), ("digest", str)):
        if type(said.get(name)) is not kind or (kind is int and not 0 <= said[name] <= MOST_ROWS):
            raise UserError(f"{path}: its footer says {name}={said.get(name)!r:.80}; remove it and score again")
    planned = [(name, _TYPES.get(name, "list<float>")) for name in manifest.columns]
    if fields != planned:
        raise UserError(f"{path}: expected the columns {planned}, found {fields}; remove it and score again")
    return Shard(path, index, num_rows, said["num_tokens"], said["num_targets"], said["digest"])


def _shown_type(kind: pa.DataType) -> str:
    """An Arrow type by its name, whatever the elements of a list are called."""
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def footer_source(path: Place) -> Any:
    """What pyarrow reads a footer from: the file, or the last bytes of an object."""
    return pa.BufferReader(path.read_footer()) if isinstance(path, RemotePath) else path


def shards_there(store: Place, indices: Sequence[int]) -> list[int]:
    """Those of the shards whose file is there."""
    if not isinstance(store, RemotePath):
        # By what is there, not by what is planned: a manifest may plan more than could be looked for.
        names = {path.name for path in store.glob("shard-*.parquet") if path.is_file()}
    else:
        names = store.names()
    found = (_SHARD_NAME.fullmatch(name) for name in names)
    there = {int(match[1]) for match in found if match and shard_path(store, int(match[1])).name in names}
    return sorted(index for index in there if index in indices)


def read_footers(store: Place, manifest: Manifest, indices: Sequence[int]) -> list[Shard]:
    """`read_footer` of several shards; of an object store, some at once."""
    if not isinstance(store, RemotePath):
        return [read_footer(shard_path(store, index), manifest, index) for index in indices]
    with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
        return list(pool.map(lambda index: read_footer(shard_path(store, index), manifest, index), indices))


def open_store(store: Place, num_shards: int | None = None) -> tuple[Manifest, list[Shard]]:
    """A finished store: its manifest and all its shards.

    Args:
        num_shards: read so many only, as the store was before it grew; the others may be unfinished.

    Raises:
        UserError: not a store, another schema version, or unfinished.
    """
    manifest = read_manifest(store)
    planned = range(manifest.source.num_shards if num_shards is None else num_shards)
    there = set(shards_there(store, planned))
    if len(there) < len(planned):
        first = next(index for index in planned if index not in there)
        raise UserError(
            f"{store} is unfinished: {len(planned) - len(there)} of {len(planned)} shards are missing, the first is "
            f"shard {first}; run prift-score again to finish it"
        )
    return manifest, read_footers(store, manifest, planned)


def read_dropped(shard: Shard) -> list[dict[str, Any]]:
    """The rows of a shard's source that could not be scored: {row_id, source_index, reason}, in order of the source.

    Raises:
        UserError: the list is missing or damaged.
    """
    path = dropped_path(shard.path.parent, shard.index)
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        listed = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in listed:
            if type(row["source_index"]) is not int or not 0 <= row["source_index"] < MOST_ROWS:
                raise TypeError(f"source_index={row['source_index']!r:.80}")
            if not isinstance(row["row_id"], str) or not isinstance(row["reason"], str):
                raise TypeError("row_id and reason are no texts")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the list of dropped rows: {first_line(error)}") from None
    return sorted(listed, key=lambda row: row["source_index"])


def read_batches(shard: Shard, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Stream a shard row group by row group; where all columns are read, its digest is verified at the end.

    Args:
        columns: names to read; None reads all.

    Raises:
        UserError: a page's checksum, or the digest, does not hold.
    """
    try:
        with local_copy(shard.path) as path, pq.ParquetFile(path, page_checksum_verification=True) as file:
            digest = _Digest(file.schema_arrow.names) if columns is None else None
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=columns)
                if "row_id" in table.column_names:
                    table.column("row_id").validate(full=True)  # text that is no Unicode
                if digest is not None:
                    digest.update(table)
                yield table
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{shard.path}: a page is corrupted ({first_line(error)}); remove it and score again") from None
    if digest is not None and digest.hexdigest() != shard.digest:
        raise UserError(
            f"{shard.path}: its values are not those that were scored (the digest differs): ids or columns were "
            "shifted, swapped or edited; remove it and score again"
        )


MOST_TURNS = 1 << 20
"""Every `turn` is below it."""


def row_keys(table: pa.Table) -> np.ndarray:
    """What tells the rows of a store apart, int64, ascending in a sound one.

    `source_index * MOST_TURNS`, plus 1 and the turn where a conversation was split into its turns.

    Args:
        table: with `source_index`, and `turn` where the shards have it.
    """
    indices = table.column("source_index").to_numpy()
    if "turn" not in table.column_names:
        return indices * MOST_TURNS
    return indices * MOST_TURNS + table.column("turn").fill_null(-1).to_numpy() + 1


@dataclass(frozen=True)
class FlatColumn:
    """A list column laid flat."""

    lengths: np.ndarray
    """int64 (rows,)."""
    values: np.ndarray
    """All values one after the other; 0 where null."""
    valid: np.ndarray
    """bool, as long as `values`."""


def flatten(column: pa.ChunkedArray) -> FlatColumn:
    """Lay a list column flat; a null list counts as an empty one."""
    lengths = column.combine_chunks().value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    parts = [chunk.flatten() for chunk in column.chunks]
    values = pa.concat_arrays(parts) if parts else pa.array([], column.type.value_type)
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return FlatColumn(lengths, values.fill_null(0).to_numpy(zero_copy_only=False), valid)


class _Digest:
    """sha256 over the values of a shard, independent of how they are cut into row groups."""

    def __init__(self, names: Sequence[str]):
        parts = ("lengths", "valid", "values")
        self._hashers = {(name, part): hashlib.sha256() for name in sorted(names) for part in parts}

    def update(self, table: pa.Table) -> None:
        for name in table.schema.names:
            column = table.column(name)
            if pa.types.is_list(column.type):
                flat = flatten(column)
                for part in ("lengths", "valid", "values"):
                    self._hashers[name, part].update(np.ascontiguousarray(getattr(flat, part)).tobytes())
            else:
                text = "".join(f"{value!r}\n" for value in column.to_pylist())
                self._hashers[name, "values"].update(text.encode("utf-8", "surrogatepass"))

    def hexdigest(self) -> str:
        parts = [f"{name}/{part}:{hasher.hexdigest()}" for (name, part), hasher in self._hashers.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _values(row: ScoredRow, name: str) -> np.ndarray:
    if name == TARGET_WEIGHT and name not in row.statistics:
        return np.ones(len(row.target_positions), np.float32)
    return row.statistics[name]


def _to_table(rows: Sequence[ScoredRow], manifest: Manifest) -> pa.Table:
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([row.input_ids for row in rows]) if rows else np.zeros(0, np.int32)
    starts = offsets[:-1]
    targets = [row.target_positions + start for row, start in zip(rows, starts, strict=True)]
    positions = np.concatenate(targets) if rows else np.zeros(0, np.int64)
    no_target = np.ones(len(ids), dtype=bool)
    no_target[positions] = False
    arrays: dict[str, pa.Array] = {
        "row_id": pa.array([row.row_id for row in rows], pa.string()),
        "source_index": pa.array([row.source_index for row in rows], pa.int64()),
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
    }
    if manifest.identity.split_turns:
        arrays["turn"] = pa.array([row.turn for row in rows], pa.int32())
    for name in manifest.float_columns:
        values = np.zeros(len(ids), dtype=np.float32)
        if rows:
            values[positions] = np.concatenate([_values(row, name) for row in rows])
        arrays[name] = pa.ListArray.from_arrays(offsets, pa.array(values, pa.float32(), mask=no_target))
    return pa.table(arrays).select(list(manifest.columns))

"""Stores as somebody who means harm, or a bad disk, might leave them.

`HostileStore` is a good store with a few things done to it, some of them signed anew: whoever makes a store can compute
its fingerprint and digests too.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

import shared.shards as shards_module
from shared.files import sha256_of_json

VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**53, 2**60, 10**30, -(2**63), 0.5, 1e308, float("nan"),
    float("inf"), "", "x", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "<script>", "\x1b[2J",
    [], {}, [[]], [None], [0], [-1], [2**60], list(range(1000)), {"x": 1}, [{"path": "../x"}], "0" * 64,
]  # fmt: skip
"""What a field of store.json or a footer may become."""

NUMBERS = [float("nan"), float("inf"), float("-inf"), -1e30, 1e30, -0.0, 1e-45, 2.0, -1.0]
INTEGERS = [-1, 0, 99, 100, 2**31 - 1, -(2**31)]
FOOTER = b"prift"


@dataclass(frozen=True)
class HostileStore:
    """What is done to a good store, in order."""

    base: str
    """Name of the good store."""
    changes: tuple["Change", ...]

    def make(self, bases: dict[str, Path], folder: Path) -> Path:
        """Write it."""
        shutil.copytree(bases[self.base], folder, symlinks=True)
        for change in self.changes:
            change.apply(folder)
        return folder


@dataclass(frozen=True)
class Change:
    """One thing that is done, with the numbers that choose where."""

    what: str
    numbers: tuple[int, ...]
    value: Any = field(default=None)

    def apply(self, store: Path) -> None:
        """Do it to a store; a change that finds nothing to change does nothing."""
        if any(not path.is_file() or path.is_symlink() for path in store.iterdir()):
            return  # reading what lies there may never end
        try:
            _CHANGES[self.what](store, self.numbers, self.value)
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
            pa.ArrowException,
        ):
            # What came before has left nothing that this could be done to.
            return


def stores(bases: list[str]) -> st.SearchStrategy[HostileStore]:
    """Good stores with one to three changes."""
    numbers = st.tuples(*[st.integers(0, 2**20)] * 4)
    values = st.one_of(st.sampled_from(VALUES), st.integers(), st.text(max_size=20))
    changes = st.builds(Change, st.sampled_from(sorted(_CHANGES)), numbers, values)
    several = st.lists(changes, min_size=0, max_size=3).map(tuple)
    return st.builds(HostileStore, st.sampled_from(bases), several)


def _places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(place for key, value in inner for place in _places(value, (*at, key)))]


def _changed(tree: Any, number: int, value: Any, removes: bool) -> Any:
    place = (places := _places(tree))[number % len(places)]
    if not place:
        return value
    node = tree
    for key in place[:-1]:
        node = node[key]
    if removes:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return tree


def _store_json(store: Path, numbers: tuple[int, ...], value: Any, signs: bool, removes: bool = False) -> None:
    path = store / "store.json"
    content = _changed(json.loads(path.read_text()), numbers[0], value, removes)
    if signs and isinstance(content, dict):
        content["fingerprint"] = sha256_of_json(
            {k: v for k, v in content["identity"].items() if v is not None or k != "split_turns"}
        )
        for shard in sorted(store.glob("shard-*.parquet")):
            _sign(shard, lambda table: table, {"fingerprint": content["fingerprint"]})
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def _twice(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    path = store / "store.json"
    text = path.read_text()
    path.write_text("{" + f'"schema_version": {json.dumps(value)}, ' + text[text.index("{") + 1 :])


def _bytes(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    path = _file(store, numbers[0])
    content = bytearray(path.read_bytes())
    kind, place = numbers[1] % 5, numbers[2] % max(len(content), 1)
    if kind == 0 and content:
        content[place] ^= 1 << numbers[3] % 8
    elif kind == 1:
        content = content[:place]
    elif kind == 2:
        content += os.urandom(0) + bytes(range(256))
    elif kind == 3:
        content = content[-8:]
    else:
        content[place : place + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(bytes(content))


def _entry(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    path = _file(store, numbers[0])
    path.unlink()
    kind = numbers[1] % 6
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("/etc/passwd")
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        path.symlink_to("/dev/zero")


def _file(store: Path, number: int) -> Path:
    paths = sorted(store.iterdir())
    return paths[number % len(paths)]


def _sign(path: Path, change: Callable[[pa.Table], pa.Table], footer_changes: dict[str, Any]) -> None:
    """Write a shard anew with a footer that fits it, but for the changes asked for."""
    with pq.ParquetFile(path) as file:
        metadata, table = file.schema_arrow.metadata, change(file.read())
    footer = json.loads(metadata[FOOTER])
    try:
        digest = shards_module._Digest(table.schema.names)
        digest.update(table)
        footer["digest"] = digest.hexdigest()
    except (pa.ArrowException, TypeError, ValueError, AttributeError):
        pass  # a type that no digest is defined for
    footer |= {"num_rows": table.num_rows, **footer_changes}
    content = json.dumps(footer).encode("utf-8", "surrogatepass")
    pq.write_table(table.replace_schema_metadata({FOOTER: content}), path, write_page_checksum=True)


def _shard(store: Path, number: int) -> Path:
    paths = sorted(store.glob("shard-*.parquet"))
    return paths[number % len(paths)]


def _footer(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    names = ["fingerprint", "shard", "num_rows", "num_tokens", "num_targets", "digest", "engine", "other"]
    _sign(_shard(store, numbers[0]), lambda table: table, {names[numbers[1] % len(names)]: value})


def _raw_footer(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    path = _shard(store, numbers[0])
    table = pq.read_table(path)
    content = [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, json.dumps(value).encode("utf-8", "surrogatepass")]
    pq.write_table(table.replace_schema_metadata({FOOTER: content[numbers[1] % len(content)]}), path)


def _number_in_column(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        names = [name for name in table.schema.names if pa.types.is_list(table.schema.field(name).type)]
        name = names[numbers[1] % len(names)]
        lists = table.column(name).to_pylist()
        row = lists[numbers[2] % len(lists)]
        pool: list[Any] = INTEGERS if name == "input_ids" else NUMBERS
        row[numbers[3] % len(row)] = [*pool, None][numbers[2] % (len(pool) + 1)]
        return _with(table, name, pa.array(lists, table.schema.field(name).type))

    _sign(_shard(store, numbers[0]), change, {})


def _lengths(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        names = [name for name in table.schema.names if pa.types.is_list(table.schema.field(name).type)]
        name = names[numbers[1] % len(names)]
        lists = table.column(name).to_pylist()
        place = numbers[2] % len(lists)
        filler = lists[place][-1]
        forms = [None, [], lists[place][:-1], [*lists[place], filler], [filler] * 20_000]
        lists[place] = forms[numbers[3] % len(forms)]
        return _with(table, name, pa.array(lists, table.schema.field(name).type))

    _sign(_shard(store, numbers[0]), change, {})


def _plain_column(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        name = [name for name in ("row_id", "source_index", "turn") if name in table.schema.names][numbers[1] % 2]
        values = table.column(name).to_pylist()
        text = [None, "", "\x00", "../../x", "<b>", "x" * 100_000, values[0]]
        whole = [None, -1, 2**62, -(2**63), values[0], 1, 2**20]
        pool: list[Any] = text if name == "row_id" else whole
        values[numbers[2] % len(values)] = pool[numbers[3] % len(pool)]
        return _with(table, name, pa.array(values, table.schema.field(name).type))

    _sign(_shard(store, numbers[0]), change, {})


def _types(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        names = table.schema.names
        name = names[numbers[1] % len(names)]
        column = table.column(name)
        if not pa.types.is_list(column.type):
            kinds = [pa.large_string(), pa.float64(), pa.int8(), pa.binary(), pa.list_(pa.int64())]
            kind = kinds[numbers[2] % len(kinds)]
            made = pa.array([None] * len(column), kind) if pa.types.is_list(kind) else column.cast(kind, safe=False)
            return _with(table, name, made)
        kinds = [
            pa.large_list(column.type.value_type), pa.list_(pa.float64()), pa.list_(pa.int64()), pa.list_(pa.string()),
            pa.list_(pa.list_(pa.int32())), pa.string(), pa.list_(pa.bool_()),
        ]  # fmt: skip
        kind = kinds[numbers[2] % len(kinds)]
        try:
            return _with(table, name, column.cast(kind, safe=False))
        except pa.ArrowException:
            return _with(table, name, pa.array([None] * len(column), kind))

    _sign(_shard(store, numbers[0]), change, {})


def _columns(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        names = list(table.schema.names)
        place = numbers[1] % len(names)
        kind = numbers[2] % 4
        if kind == 0:
            return table.drop_columns([names[place]])
        if kind == 1:
            return table.append_column("another", table.column(place))
        if kind == 2:
            return table.append_column(names[place], table.column(place))
        return table.select([*names[1:], names[0]])

    _sign(_shard(store, numbers[0]), change, {})


def _rows(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    def change(table: pa.Table) -> pa.Table:
        kind = numbers[1] % 4
        if kind == 0:
            return table.slice(0, 0)
        if kind == 1:
            return table.slice(1)
        if kind == 2:
            return pa.concat_tables([table, table])
        return table.take(pa.array(np.arange(table.num_rows)[::-1]))

    _sign(_shard(store, numbers[0]), change, {})


def _bomb(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    """A row of sixteen million zeros, some kilobytes on the disk."""

    def change(table: pa.Table) -> pa.Table:
        ids = table.column("input_ids").to_pylist()
        ids[0] = np.zeros(2**24, np.int32)
        return _with(table, "input_ids", pa.array(ids, pa.list_(pa.int32())))

    if numbers[3] % 8 == 0:
        _sign(_shard(store, numbers[0]), change, {})


def _dropped(store: Path, numbers: tuple[int, ...], value: Any) -> None:
    paths = sorted(store.glob("*.dropped.jsonl"))
    path = paths[numbers[0] % len(paths)]
    line = {"row_id": value, "source_index": 0, "reason": "x"}
    forms = [
        b"{", b"null\n", b"[1]\n", b"\xff\xfe\n", b"\n\n", json.dumps(value).encode("utf-8", "surrogatepass"),
        json.dumps(line).encode("utf-8", "surrogatepass") * 2, b'{"source_index": "0"}', b'{"source_index": 1e400}',
        b'{"row_id": "a", "source_index": 99999999999999999999999, "reason": ""}\n', b"[" * 100_000,
        json.dumps({"row_id": "a", "source_index": value, "reason": None}).encode("utf-8", "surrogatepass"),
        b'{"row_id": "a", "source_index": -1, "reason": ""}\n', b"x" * 1_000_000,
    ]  # fmt: skip
    path.write_bytes(forms[numbers[1] % len(forms)])


def _with(table: pa.Table, name: str, column: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


_CHANGES: dict[str, Callable[[Path, tuple[int, ...], Any], None]] = {
    "a field of store.json": lambda store, numbers, value: _store_json(store, numbers, value, signs=False),
    "a field of store.json, signed": lambda store, numbers, value: _store_json(store, numbers, value, signs=True),
    "a field of store.json removed, signed": lambda s, n, v: _store_json(s, n, v, signs=True, removes=True),
    "a key twice": _twice,
    "bytes": _bytes,
    "another kind of entry": _entry,
    "a field of a footer": _footer,
    "another footer": _raw_footer,
    "a number in a column": _number_in_column,
    "the length of a list": _lengths,
    "an id or index": _plain_column,
    "the type of a column": _types,
    "columns": _columns,
    "rows": _rows,
    "a row that unpacks to much": _bomb,
    "a list of dropped rows": _dropped,
}

"""The score store: a folder of Parquet shards and `store.json`, its identity. Imports no torch.

`docs/store.md` describes the format for others who read or write it. This module holds what the folder says
of itself: identity, source, plan of shards. `shared/shards.py` writes and reads the shards.
"""

import fcntl
import json
import os
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from shared.errors import UserError
from shared.files import create_json, json_text, parse_json, replacing, sha256_of_json
from shared.places import Place, RemotePath
from shared.pretrained import TokenizerContent
from shared.rules import Column

SCHEMA_VERSION = 3
"""Of stores that are made now. Versions 1 and 2 are read as they are, and lifted by `prift-inspect migrate`."""
MANIFEST_NAME = "store.json"
TARGET_WEIGHT = "target_weight"
"""Column of the data's own weights of targets, which multiply the rule's."""
MOST_ROWS = 1 << 40
MOST_SHARD_ROWS = 1 << 24
MOST_TOKEN_IDS = 1 << 22
"""What a store may say that it holds: beyond all that exists, and small enough to make room for."""
TARGET_WEIGHT_BOUNDS = (1e-6, 1e6)
"""The smallest and the largest of them; 0 makes a token no target."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Record):
    """Everything that turns a row's content into its numbers, and nothing else."""

    prior_weights: str
    """sha256 over the prior's weight files."""
    prior_config: str
    """sha256 of its config.json."""
    quantization: str | None
    """sha256 of the quantisation config, if any."""
    tokenizer_files: str
    """sha256 over the tokenizer's files."""
    chat_template: str | None
    """sha256 of the chat template's source, where one is used."""
    template_arguments: str | None
    """sha256 of the arguments given to the chat template, its date among them."""
    template: str
    """chat, chat_prompt, plain, or tokens for data that came tokenised."""
    targets: str
    split_turns: bool | None = None
    """Whether a conversation may have become a row for each trained turn, and so shards have the column turn; None in
    versions 1 and 2, which did not know it, and left out of their fingerprint."""
    max_length: int
    overlong: str
    special_tokens: str
    """BOS and EOS policy, in words."""
    weight_dtype: str
    compute_dtype: str
    """Dtype of the forward pass."""
    head_dtype: str
    engine: str
    statistics_version: int
    columns: tuple[Column, ...]

    @field_validator("columns")
    @classmethod
    def _has_logprob(cls, columns: tuple[Column, ...]) -> tuple[Column, ...]:
        if "logprob" not in columns or len(set(columns)) != len(columns):
            raise ValueError(f"{list(columns)}: expected logprob, and each name once")
        return columns

    @model_serializer(mode="wrap")
    def _as_in_its_version(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = serialize(self)
        return {name: it for name, it in fields.items() if name != "split_turns" or it is not None}

    def fingerprint(self) -> str:
        """Hex sha256 of the identity."""
        return sha256_of_json(self.model_dump(mode="json"))


class DataFile(_Record):
    """A file of the source."""

    path: str
    size: int = Field(ge=0, le=1 << 60)
    mtime_ns: int
    """Of an object: `shared.places.Stat`."""
    sha256: str
    num_rows: int = Field(ge=0, le=MOST_ROWS)


class HubSource(_Record):
    """A data set of the hub at a commit."""

    id: str
    config: str | None
    split: str
    revision: str
    """The commit."""

    def __str__(self) -> str:
        config = "" if self.config is None else f" {self.config}"
        return f"{self.id}{config} {self.split} at {self.revision[:12]}"


class Source(_Record):
    """Where the rows came from, and the shards planned from them."""

    format: str
    columns: dict[str, str | None]
    limit: int | None = Field(ge=1)
    files: tuple[DataFile, ...] = Field(min_length=1)
    shard_rows: int = Field(ge=1, le=MOST_SHARD_ROWS)
    extended_at: tuple[int, ...] = ()
    """Numbers of rows at which the store grew: there a shard ends, however few rows it holds, and another begins."""
    weighted: bool = False
    """Whether the data gives some of its targets weights of its own, and so shards have the column target_weight."""
    hub: HubSource | None = None
    """The data set of the hub that the file was made from; its `sha256` is then a hash of this, not of the bytes."""

    @model_validator(mode="after")
    def _grew_in_order(self) -> Self:
        bounds = (0, *self.extended_at, self.num_rows)
        if self.extended_at and any(start >= stop for start, stop in pairwise(bounds)):
            raise ValueError(f"extended_at={list(self.extended_at)}: expected ascending, below the {bounds[-1]} rows")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        absent = {name for name in ("extended_at", "weighted", "hub") if not getattr(self, name)}
        return {name: it for name, it in serialize(self).items() if name not in absent}

    @property
    def num_rows(self) -> int:
        """Rows that are scored or dropped, all files together."""
        total = sum(file.num_rows for file in self.files)
        return total if self.limit is None else min(total, self.limit)

    @property
    def num_shards(self) -> int:
        """Shards planned from the rows."""
        return self.shard_counts[-1]

    @property
    def shard_counts(self) -> tuple[int, ...]:
        """Shards of the store before each growth, and of the whole."""
        bounds = pairwise((0, *self.extended_at, self.num_rows))
        return tuple(accumulate(-(-(stop - start) // self.shard_rows) for start, stop in bounds))

    def rows_of_shard(self, index: int) -> range:
        """Source rows of a shard, before dropping."""
        assert 0 <= index < self.num_shards, index
        growth = bisect_right(self.shard_counts, index)
        first_row, end = (0, *self.extended_at, self.num_rows)[growth : growth + 2]
        first_shard = (0, *self.shard_counts)[growth]
        start = first_row + (index - first_shard) * self.shard_rows
        return range(start, min(start + self.shard_rows, end))


class Manifest(_Record):
    """Content of store.json."""

    schema_version: int
    fingerprint: str
    identity: Identity
    source: Source
    prior_name: str
    prior_revision: str | None
    vocab_size: int = Field(ge=1, le=MOST_TOKEN_IDS)
    """Rows of the prior's softmax; every token id is below it."""
    tokenizer: TokenizerContent
    stop_token_ids: tuple[Annotated[int, Field(ge=0, lt=MOST_TOKEN_IDS)], ...]
    user_row_ids: bool
    """Whether row ids are the user's own, and so unique."""
    software: dict[str, str]
    """Versions of what made the store; recorded, not compared."""

    @model_validator(mode="after")
    def _is_of_its_version(self) -> Self:
        if (self.schema_version >= 3) != (self.identity.split_turns is not None):
            raise ValueError(
                f"schema_version={self.schema_version}, but identity.split_turns={self.identity.split_turns}"
            )
        for name in ("weighted", "hub") if self.schema_version < 3 else ():
            if value := getattr(self.source, name):
                raise ValueError(f"schema_version={self.schema_version}, but source.{name}={value}")
        if self.schema_version < 2 and self.source.extended_at:
            raise ValueError(f"schema_version={self.schema_version}, but the store grew at {self.source.extended_at}")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns of the shards, in order."""
        turn = ("turn",) if self.identity.split_turns else ()
        return ("row_id", "source_index", *turn, "input_ids", *self.float_columns)

    @property
    def float_columns(self) -> tuple[str, ...]:
        """Columns of the shards with one float32 per target: the statistics, and the data's own weights if any."""
        return (*self.identity.columns, *((TARGET_WEIGHT,) if self.source.weighted else ()))


def read_manifest(store: Place) -> Manifest:
    """Read store.json.

    Raises:
        UserError: no store, another schema version, or a file that is not what it should be.
    """
    path = store / MANIFEST_NAME
    try:
        # What is no file might be a pipe that nobody writes to.
        content = parse_json(path.read_text(encoding="utf-8")) if path.is_file() else None
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except FileNotFoundError:
        content = None
    except UserError:  # an object store's own words
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if content is None:
        raise UserError(f"{store}: expected a score store, found no {MANIFEST_NAME}; prift-score makes it")
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"{path}: expected a schema version from 1 to {SCHEMA_VERSION}, found {version!r}: the store was made by "
            "another version of prift; score again, or use that version"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if manifest.fingerprint != manifest.identity.fingerprint():
        raise UserError(f"{path}: the fingerprint is not that of the identity beside it: the file was edited")
    return manifest


def create_or_match(store: Place, wanted: Manifest, command: Sequence[str]) -> Manifest:
    """Create store.json, or check that the one there means the same store.

    Args:
        store: folder of the store; it exists.
        wanted: what this run would make.
        command: the words of the command line, for the ways out in the message.

    Returns:
        The store's manifest: its columns may be more than were asked for.

    Raises:
        UserError: the store there was made with another identity or source; lists the fields that differ.
    """
    if not (store / MANIFEST_NAME).exists() and create_json(store / MANIFEST_NAME, wanted.model_dump(mode="json")):
        return wanted
    found = read_manifest(store)
    if found.schema_version != wanted.schema_version:
        raise UserError(
            f"{store} is of schema version {found.schema_version}, this prift writes {wanted.schema_version}: lift it "
            f"without scoring again by `prift-inspect migrate {shlex.quote(str(store))} -o NEW`, and go on with that"
        )
    differences = differing_fields(found, wanted)
    if differences:
        raise UserError(_refusal(store, differences, command))
    return found


def replace_manifest(store: Place, found: Manifest, grown: Manifest) -> None:
    """Put a grown store's manifest into the place of the one found before; of several starters one does it.

    Raises:
        UserError: another start changed the store meanwhile, and not into the same.
    """
    if isinstance(store, RemotePath):
        _replace_remote(store, found, grown)
        return
    descriptor = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        now = read_manifest(store)
        if now.source == grown.source:
            return
        if now != found:
            raise UserError(f"{store}: another start extended it meanwhile; run the command again")
        with replacing(store / MANIFEST_NAME) as temporary:
            temporary.write_text(json_text(grown.model_dump(mode="json")), encoding="utf-8")
    finally:
        os.close(descriptor)


def _replace_remote(store: RemotePath, found: Manifest, grown: Manifest) -> None:
    path = store / MANIFEST_NAME
    before, now = path.read_bytes(), read_manifest(store)
    if now == found and path.replace(before, json_text(grown.model_dump(mode="json")).encode()):
        return
    if read_manifest(store).source != grown.source:
        raise UserError(f"{store}: another start extended it meanwhile; run the command again")


def differing_fields(found: Manifest, wanted: Manifest) -> list[tuple[str, Any, Any]]:
    """Fields (name, stored, wanted) in which a store does not serve a request. A surplus of columns does."""
    old, new = dict(found.identity), dict(wanted.identity)
    if set(new["columns"]) <= set(old["columns"]):
        old["columns"] = new["columns"]
    pairs = [(f"identity.{name}", old[name], new[name]) for name in old]
    for name in ("format", "columns", "limit", "shard_rows", "weighted", "hub"):
        pairs.append((f"source.{name}", getattr(found.source, name), getattr(wanted.source, name)))
    pairs.append(("source.files", _contents(found.source), _contents(wanted.source)))
    return [pair for pair in pairs if pair[1] != pair[2]]


def _contents(source: Source) -> list[tuple[str, int]]:
    return [(file.sha256, file.num_rows) for file in source.files]


def _refusal(store: Place, differences: list[tuple[str, Any, Any]], command: Sequence[str]) -> str:
    rows = [
        ("field", "in the store", "asked for"),
        *[(name, _short(old), _short(new)) for name, old, new in differences],
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )
    kept = [word for word in command if not word.startswith("score.output=")]
    if ("identity.split_turns", False, True) in differences:
        table += "\nA lifted store goes on with:  " + shlex.join([*command, "data.split_turns=false"])
    grew = {name for name, _, _ in differences} <= {"source.files", "source.limit"}
    extend = f"\nOr, where rows were only added:  {shlex.join([*command, 'score.extend=true'])}" if grew else ""
    again = shlex.join(command)
    remove = (
        f"remove all under {store}/, then" if isinstance(store, RemotePath) else f"rm -r {shlex.quote(str(store))} &&"
    )
    return (
        f"{store} holds scores of another identity or source:\n{table}\n"
        f"Keep it and score elsewhere:  {shlex.join(kept)} score.output={shlex.quote(f'{store}-2')}\n"
        f"Or replace it:  {remove} {again}{extend}"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."

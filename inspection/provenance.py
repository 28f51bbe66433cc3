"""Where the rows of a store came from, and in which fields two stores differ. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.score_store import DataFile, Manifest, Source, differing_fields


@dataclass(frozen=True)
class Span:
    """The rows that a store took of one data file: the first `num_rows` of it."""

    file: DataFile
    first: int
    """`source_index` of the file's row 0."""
    num_rows: int

    @property
    def stop(self) -> int:
        """`source_index` after the last of its rows."""
        return self.first + self.num_rows


def spans(source: Source) -> list[Span]:
    """Where the rows of each data file stand in the source; files that `data.limit` leaves out are left out."""
    found, first = [], 0
    for file in source.files:
        span = Span(file, first, min(file.num_rows, source.num_rows - first))
        if span.num_rows:
            found.append(span)
        first = span.stop
    return found


def place_of(source: Source, source_index: int) -> tuple[Span, int]:
    """The file of a row, and the row's place in it, from 0."""
    span = next(span for span in spans(source) if source_index < span.stop)
    return span, source_index - span.first


def differing_meanings(left: Manifest, right: Manifest) -> list[tuple[str, Any, Any]]:
    """Fields (name, left, right), the source aside, without whose agreement two stores do not mean the same."""
    old, new = dict(left.identity), dict(right.identity)
    # A version that does not know it never split a conversation.
    old["split_turns"], new["split_turns"] = bool(old["split_turns"]), bool(new["split_turns"])
    pairs = [(f"identity.{name}", old[name], new[name]) for name in old]
    names = ("vocab_size", "tokenizer", "stop_token_ids", "user_row_ids")
    pairs += [(name, *(getattr(manifest, name) for manifest in (left, right))) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2]]


def differing_sources(left: Manifest, right: Manifest) -> list[tuple[str, Any, Any]]:
    """Fields (name, left, right) of the source in which two stores differ."""
    return [pair for pair in differing_fields(left, right) if pair[0].startswith("source.")]


def field_table(rows: Sequence[tuple[str, Any, Any]], left: str, right: str) -> str:
    """A table of fields and their two values, indented by two."""
    lines = [("field", left, right), *((name, _short(old), _short(new)) for name, old, new in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"  {line}".rstrip() for line in padded)


def _short(value: Any) -> str:
    """A value in at most 40 characters; data files by their number, and how the hash of the first one begins."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        count = f"{len(value)} file{'s' * (len(value) > 1)}"
        return f"{count}, {sum(rows for _, rows in value):,} rows, {value[0][0][:8]}..."
    text = json.dumps(value, default=lambda it: it.model_dump())
    return text if len(text) <= 40 else text[:37] + "..."

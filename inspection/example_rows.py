"""The rows that a report shows as text: the best, middle and worst supported ones, and those asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from inspection.decoded import token_texts
from inspection.harmless import harmless
from inspection.row_table import row_table, scan_rows
from shared.errors import UserError
from shared.shards import Shard
from shared.verify import collected

_ROWS_OF_A_KIND = 5
_MOST_TOKENS_OF_A_ROW = 1500
_MOST_TOKENS = 30_000
_CONTEXT_TOKENS = 200
"""Shown before the first target where a row is cut."""
_LONGEST_TEXT, _LONGEST_ID = 60, 120


@dataclass(frozen=True)
class ExampleRow:
    """A row, cut to what a page can hold."""

    row_id: str
    """With nothing invisible in it; cut where it is very long."""
    source_index: int
    kind: str
    """Why it is shown: best, median, worst, asked."""
    num_tokens: int
    num_targets: int
    mean_logprob: float
    first: int
    """Position of the first token that is shown."""
    ids: list[int]
    texts: list[str]
    scores: dict[str, list[float | None]]
    """By column, as long as `ids`; None where the token is no target."""


def choose_rows(shards: Sequence[Shard], asked: Sequence[str]) -> dict[int, str]:
    """source_index to kind, by the mean logprob of the rows' targets; ties go to the row that comes first.

    Args:
        asked: row ids; all rows that bear one of them are shown.

    Raises:
        UserError: no row bears an id that was asked for.
    """
    table = row_table(shards).sort("mean_logprob", "source_index", descending=[True, False])
    order, count = table["source_index"].to_list(), _ROWS_OF_A_KIND
    middle = max(0, (len(order) - count) // 2)
    chosen = dict.fromkeys(order[middle : middle + count], "median")
    chosen |= dict.fromkeys(order[-count:], "worst") | dict.fromkeys(order[:count], "best")
    if asked:
        found = scan_rows(shards).filter(pl.col("row_id").is_in(asked)).select("row_id", "source_index")
        rows = collected(found, shards[0].path.parent)
        missing = sorted(set(asked) - set(rows["row_id"]))
        if missing:
            raise UserError(f"no row has the id {harmless(missing[0])!r}")
        chosen |= dict.fromkeys(rows["source_index"], "asked")
    return chosen


def load_rows(shards: Sequence[Shard], chosen: dict[int, str], tokenizer: Any | None) -> list[ExampleRow]:
    """Read and decode the chosen rows: those asked for first, then best, median and worst, as many as a page holds."""
    wanted = scan_rows(shards).filter(pl.col("source_index").is_in(list(chosen)))
    frame = collected(wanted, shards[0].path.parent)
    kinds = ("asked", "best", "median", "worst")
    rows = [_example(row, chosen[row["source_index"]], tokenizer) for row in frame.iter_rows(named=True)]
    rows.sort(key=lambda row: (kinds.index(row.kind), -row.mean_logprob, row.source_index))
    room, kept = _MOST_TOKENS, []
    for row in rows:
        if len(row.ids) <= room:
            kept.append(row)
            room -= len(row.ids)
    return kept


def _example(row: dict[str, Any], kind: str, tokenizer: Any | None) -> ExampleRow:
    scores = {name: values for name, values in row.items() if isinstance(values, list) and name != "input_ids"}
    targets = [place for place, score in enumerate(scores["logprob"]) if score is not None]
    num_tokens = len(row["input_ids"])
    first = max(0, targets[0] - _CONTEXT_TOKENS) if num_tokens > _MOST_TOKENS_OF_A_ROW else 0
    shown = slice(first, first + _MOST_TOKENS_OF_A_ROW)
    ids = row["input_ids"][shown]
    logprobs = [score for score in scores["logprob"] if score is not None]
    return ExampleRow(
        shortened(harmless(row["row_id"]), _LONGEST_ID), row["source_index"], kind, num_tokens, len(targets),
        float(np.mean(logprobs, dtype=np.float64)), first, ids,
        [_marked(text) for text in token_texts(tokenizer, ids)],
        {name: values[shown] for name, values in scores.items()},
    )  # fmt: skip


def _marked(text: str) -> str:
    """A token's text that can be pointed at: line breaks marked, `‥` for the first bytes of a character."""
    return shortened(text, _LONGEST_TEXT).replace("\n", "⏎\n") or "‥"


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and how many characters it has."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"

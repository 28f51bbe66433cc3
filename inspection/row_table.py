"""Rows of a store, one line each, by polars' streaming engine."""

from collections.abc import Sequence

import polars as pl

from shared.errors import UserError
from shared.local_copies import kept_copy
from shared.shards import Shard
from shared.verify import collected


def scan_rows(shards: Sequence[Shard]) -> pl.LazyFrame:
    """All shards that hold rows, lazily.

    Raises:
        UserError: none does.
    """
    paths = [kept_copy(shard.path) for shard in shards if shard.num_rows]
    if not paths:
        raise UserError(f"{shards[0].path.parent if shards else 'the store'}: no row in it")
    return pl.scan_parquet(paths)


def row_table(shards: Sequence[Shard]) -> pl.DataFrame:
    """source_index, num_tokens, num_targets and mean_logprob (nats, float64) of each row, in order: 24 bytes a row."""
    scores = pl.col("logprob").list
    rows = scan_rows(shards).select(
        "source_index",
        pl.col("input_ids").list.len().alias("num_tokens"),
        scores.drop_nulls().list.len().alias("num_targets"),
        scores.eval(pl.element().cast(pl.Float64)).list.mean().alias("mean_logprob"),
    )
    return collected(rows, shards[0].path.parent)

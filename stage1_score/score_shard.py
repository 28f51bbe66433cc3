"""One shard, whoever asks for it: read, tokenise, score, write. A process, a worker and a Ray actor run the same."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shared.shards import write_shard
from stage1_score.engine import Engine
from stage1_score.plan import Plan
from stage1_score.read import read_rows
from stage1_score.tokenization import DroppedRow, TokenizedExample, tokenize_rows


@dataclass(frozen=True)
class TokenizedShard:
    """The rows of a shard, ready for the engine."""

    index: int
    examples: list[TokenizedExample]
    dropped: list[DroppedRow]


@dataclass(frozen=True)
class ShardReport:
    """What scoring a shard was like: a line of score.metrics.jsonl."""

    shard: int
    worker: str
    num_rows: int
    num_dropped: int
    num_misfits: int
    """Rows of the data that do not fit the chat template, in one of their turns or in several."""
    first_misfit: str | None
    num_tokens: int
    """Of the scored rows, padding not counted."""
    num_targets: int
    seconds: float
    """Scoring and writing; tokenising runs beside it."""
    peak_memory_mebibytes: float
    """Of the device on CUDA, else of the process, up to now."""
    device: str

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second."""
        return self.num_tokens / max(self.seconds, 1e-9)


def tokenize_shard(plan: Plan, index: int) -> TokenizedShard:
    """Read and tokenise the source rows of one shard."""
    source = plan.manifest.source
    rows = read_rows(source, plan.row_format, source.rows_of_shard(index))
    return TokenizedShard(index, *tokenize_rows(rows, plan.row_tokenizer))


def score_shard(
    plan: Plan, engine: Engine, shard: TokenizedShard, on_batch: Callable[[int, int], None], worker: str
) -> ShardReport:
    """Score and write a tokenised shard.

    Args:
        on_batch: as for `Engine.score`; what it raises ends the shard, and nothing of it is left.
        worker: name of who scores, for the report.
    """
    started = time.perf_counter()
    rows = engine.score(shard.examples, on_batch)
    listed = [{"row_id": r.row_id, "source_index": r.source_index, "reason": r.reason} for r in shard.dropped]
    written = write_shard(plan.store, shard.index, plan.manifest, rows, listed, engine.describe())
    misfits = [row for row in shard.dropped if row.breaks_template]
    return ShardReport(
        shard=shard.index,
        worker=worker,
        num_rows=written.num_rows,
        num_dropped=len(shard.dropped),
        num_misfits=len({row.source_index for row in misfits}),
        first_misfit=str(misfits[0]) if misfits else None,
        num_tokens=written.num_tokens,
        num_targets=written.num_targets,
        seconds=time.perf_counter() - started,
        peak_memory_mebibytes=_peak_memory_mebibytes(),
        device=engine.describe()["device"],
    )


def prefetched(function: Callable[[int], TokenizedShard], indices: Sequence[int]) -> Iterator[TokenizedShard]:
    """Results in order, the next one made in a thread while the engine works on this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(function, index) for index in indices[:1]]
        for following in [*indices[1:], None]:
            current = pending.pop()
            result = current.result()
            if following is not None:
                pending.append(pool.submit(function, following))
            yield result


def _peak_memory_mebibytes() -> float:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

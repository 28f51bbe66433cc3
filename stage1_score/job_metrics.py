"""`score.metrics.jsonl` in the store's folder: one line per scored shard, and a summary of each run.

Recorded for people; nothing reads it back, and it is not part of the store's identity.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.places import Place
from stage1_score.score_shard import ShardReport


def metrics_path(store: Place, part: str | None) -> Place:
    """Where a run writes; each part of a job array has a file of its own."""
    return store / ("score.metrics.jsonl" if part is None else f"score.metrics.{part.replace('/', '-of-')}.jsonl")


class JobMetrics:
    """Appends to a metrics file; what an earlier run wrote stays."""

    def __init__(self, path: Place):
        self._path = path
        self._started = time.perf_counter()
        self._reports: list[ShardReport] = []
        self._earlier: bytes | None = None
        """What the file holds; of an object store only."""

    def start_clock(self) -> None:
        """Count the time of the summary from now on."""
        self._started = time.perf_counter()

    def add(self, report: ShardReport) -> None:
        """Write the line of a shard."""
        self._reports.append(report)
        self._write({"kind": "shard", **asdict(report), "tokens_per_second": round(report.tokens_per_second, 1)})

    def summarise(self) -> dict[str, Any]:
        """Write and return the summary of the shards of this run."""
        seconds = time.perf_counter() - self._started
        tokens = sum(report.num_tokens for report in self._reports)
        summary = {
            "kind": "summary",
            "num_shards": len(self._reports),
            "num_rows": sum(report.num_rows for report in self._reports),
            "num_dropped": sum(report.num_dropped for report in self._reports),
            "num_tokens": tokens,
            "num_targets": sum(report.num_targets for report in self._reports),
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "peak_memory_mebibytes": max((report.peak_memory_mebibytes for report in self._reports), default=0.0),
            "shards_of_worker": dict(Counter(report.worker for report in self._reports)),
        }
        self._write(summary)
        return summary

    def _write(self, record: dict[str, Any]) -> None:
        if not isinstance(self._path, Path):
            # Nothing can be added to an object: it is written again, a few hundred bytes for each shard.
            if self._earlier is None:
                self._earlier = self._path.read_bytes() if self._path.is_file() else b""
            self._earlier += json.dumps(record).encode() + b"\n"
            self._path.write_bytes(self._earlier)
            return
        with self._path.open("ab+", buffering=0) as file:
            # A line that a killed run left torn is closed first.
            is_torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(record).encode() + b"\n")

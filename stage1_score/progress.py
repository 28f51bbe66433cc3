"""Progress of a scoring run: a bar on a terminal, plain log lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ScoringProgress:
    """Counts rows and tokens; `tokens_per_second` is over the whole run so far."""

    def __init__(self, num_rows: int, bar: Progress | None):
        self._num_rows, self._bar = num_rows, bar
        self._task = bar.add_task("scoring", total=num_rows, rate=0.0) if bar else None
        self._rows = self._tokens = 0
        self._start = self._last_line = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second, padding not counted."""
        return self._tokens / max(time.perf_counter() - self._start, 1e-9)

    def start_clock(self) -> None:
        """Count time from now on: the prior is loaded."""
        self._start = self._last_line = time.perf_counter()

    def add(self, num_rows: int, num_tokens: int) -> None:
        """Count rows that were scored or dropped, and their tokens."""
        self._rows += num_rows
        self._tokens += num_tokens
        self._show()

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._rows, rate=self.tokens_per_second)
            return
        now = time.perf_counter()
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = (now - self._start) / max(self._rows, 1) * (self._num_rows - self._rows)
        print(
            f"{self._rows:,}/{self._num_rows:,} rows, {self._tokens:,} tokens, {self.tokens_per_second:,.0f} tokens/s, "
            f"about {left:.0f} s left",
            flush=True,
        )


@contextmanager
def scoring_progress(num_rows: int) -> Iterator[ScoringProgress]:
    """A progress over `num_rows` rows, drawn as a bar where standard output is a terminal."""
    if not sys.stdout.isatty():
        yield ScoringProgress(num_rows, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} rows"),
               TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console()) as bar:
        yield ScoringProgress(num_rows, bar)

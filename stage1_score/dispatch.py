"""Shards handed out from one queue to many workers, which may die. Knows nothing of processes or Ray."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.errors import UserError
from stage1_score.score_shard import ShardReport

MOST_DEATHS = 3
"""A shard at which so many workers died ends the run; so do as many deaths before any shard was begun."""


@dataclass(frozen=True)
class Ready:
    """The worker has loaded the prior."""


@dataclass(frozen=True)
class Batch:
    """The worker handed a batch to its device."""

    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class Done:
    """The worker has written a shard."""

    report: ShardReport


@dataclass(frozen=True)
class Refused:
    """The worker met a mistake of the user; another worker would too."""

    message: str


@dataclass(frozen=True)
class Died:
    """The worker is no more."""

    reason: str


Event = Ready | Batch | Done | Refused | Died


class Pool(Protocol):
    """Workers, wherever they run."""

    def start(self) -> str:
        """Start a worker; returns its name."""
        ...

    def give(self, worker: str, shard: int) -> None:
        """Queue a shard at a worker; it scores its shards one after the other, and may tokenise the next beside."""
        ...

    def wait(self) -> list[tuple[str, Event]]:
        """What happened since; returns after about a second though nothing did."""
        ...


class Dispatcher:
    """Hands shards to the workers of a pool until all are done."""

    def __init__(self, pool: Pool, missing: Sequence[int], num_workers: int):
        self._pool, self._waiting = pool, deque(missing)
        self._num_workers = min(num_workers, len(missing))
        self._given: dict[str, list[int]] = {}
        self._ready: set[str] = set()
        self._deaths: Counter[int | None] = Counter()

    def run(
        self,
        on_ready: Callable[[], None],
        on_batch: Callable[[int, int], None],
        on_done: Callable[[ShardReport], None],
        check: Callable[[], None],
    ) -> None:
        """Work until every shard is done.

        Args:
            on_ready: called once, when a first worker has loaded the prior and before it gets a shard.
            check: called about once a second; may raise.

        Raises:
            UserError: a worker met a mistake of the user, or workers died again and again; names the shard.
        """
        for _ in range(self._num_workers):
            self._given[self._pool.start()] = []
        while self._waiting or any(self._given.values()):
            check()
            for worker, event in self._pool.wait():
                match event:
                    case Ready():
                        if not self._ready:
                            on_ready()
                        self._ready.add(worker)
                        self._fill(worker)
                    case Batch():
                        on_batch(event.num_rows, event.num_tokens)
                    case Done():
                        self._given[worker].remove(event.report.shard)
                        self._deaths.pop(None, None)
                        on_done(event.report)
                        self._fill(worker)
                    case Refused():
                        raise UserError(event.message)
                    case Died():
                        self._replace(worker, event.reason)

    def _fill(self, worker: str) -> None:
        """A shard to score, and one more to tokenise meanwhile where others do not wait for it."""
        shards = self._given[worker]
        if self._waiting and not shards:
            self._give(worker)
        if len(self._waiting) > self._num_workers and len(shards) == 1:
            self._give(worker)

    def _give(self, worker: str) -> None:
        shard = self._waiting.popleft()
        self._given[worker].append(shard)
        self._pool.give(worker, shard)

    def _replace(self, worker: str, reason: str) -> None:
        lost = self._given.pop(worker)
        current = lost[0] if lost else None
        self._deaths[current] += 1
        where = "before they had a shard" if current is None else f"at shard {current}"
        if self._deaths[current] >= MOST_DEATHS:
            raise UserError(
                f"{MOST_DEATHS} workers died {where}, the last of: {reason}; finished shards are kept, and the same "
                "command goes on from there"
            )
        self._waiting.extendleft(reversed(lost))
        if not self._waiting:
            return
        print(f"worker {worker} died {where}: {reason}; another takes over", flush=True)
        self._given[self._pool.start()] = []
        for idle in [name for name in self._ready & self._given.keys() if not self._given[name]]:
            self._fill(idle)

"""Shards handed out to workers that finish, fail and die, by a pool that is a script."""

from collections import deque
from typing import Any

import pytest

from shared.errors import UserError
from stage1_score.dispatch import MOST_DEATHS, Batch, Died, Dispatcher, Done, Event, Ready, Refused
from stage1_score.score_shard import ShardReport


def report(shard: int, worker: str = "0") -> ShardReport:
    return ShardReport(shard, worker, 2, 0, 0, None, 10, 5, 0.5, 100.0, "cpu")


class ScriptedPool:
    """Workers that load at once and finish the shard they hold at each wait; some die at their n-th wait."""

    def __init__(self, deaths: dict[str, int] | None = None, deadly: set[int] | None = None, refuses: bool = False):
        self.given: dict[str, deque[int]] = {}
        self.log: list[tuple[Any, ...]] = []
        self._deaths, self._deadly, self._refuses = deaths or {}, deadly or set(), refuses
        self._waits: dict[str, int] = {}

    def start(self) -> str:
        name = f"w{len(self._waits)}"
        self._waits[name] = 0
        self.given[name] = deque()
        self.log.append(("start", name))
        return name

    def give(self, worker: str, shard: int) -> None:
        self.given[worker].append(shard)
        self.log.append(("give", worker, shard))

    def wait(self) -> list[tuple[str, Event]]:
        events: list[tuple[str, Event]] = []
        for name in list(self.given):
            self._waits[name] += 1
            if self._refuses:
                return [(name, Refused("the row is not finite"))]
            if self._waits[name] == self._deaths.get(name) or (
                self.given[name] and self.given[name][0] in self._deadly
            ):
                del self.given[name]
                events.append((name, Died("signal SIGKILL")))
            elif self._waits[name] == 1:
                events.append((name, Ready()))
            elif self.given[name]:
                events += [(name, Batch(2, 10)), (name, Done(report(self.given[name].popleft(), name)))]
        return events


def run(pool: ScriptedPool, num_shards: int, num_workers: int) -> list[int]:
    done: list[int] = []
    Dispatcher(pool, range(num_shards), num_workers).run(
        lambda: pool.log.append(("begin",)),
        lambda rows, tokens: pool.log.append(("batch", rows, tokens)),
        lambda found: done.append(found.shard),
        lambda: None,
    )
    return done


@pytest.mark.parametrize("num_workers", [1, 2, 3, 20])
def test_every_shard_is_scored_once(num_workers: int):
    pool = ScriptedPool()
    assert sorted(run(pool, 10, num_workers)) == list(range(10))
    assert sum(entry[0] == "give" for entry in pool.log) == 10
    assert sum(entry[0] == "start" for entry in pool.log) == min(10, num_workers)


def test_the_store_is_begun_once_and_before_any_shard():
    pool = ScriptedPool()
    run(pool, 6, 3)
    names = [entry[0] for entry in pool.log]
    assert names.count("begin") == 1
    assert names.index("begin") < names.index("give")


def test_a_second_shard_is_queued_only_while_others_have_enough():
    pool = ScriptedPool()
    most = {}
    give = pool.give

    def counted(worker: str, shard: int) -> None:
        give(worker, shard)
        most[shard] = len(pool.given[worker])

    pool.give = counted
    run(pool, 12, 2)
    assert max(most.values()) == 2
    # The last two shards go to whoever is free, not behind another shard.
    assert most[10] == most[11] == 1


@pytest.mark.parametrize("deaths", [{"w0": 2}, {"w1": 3}, {"w0": 1}, {"w0": 2, "w1": 2}, {"w0": 3, "w2": 2}])
def test_what_a_dead_worker_held_is_taken_over(deaths: dict[str, int], capsys: pytest.CaptureFixture[str]):
    pool = ScriptedPool(deaths)
    assert sorted(run(pool, 9, 2)) == list(range(9))
    assert "died" in capsys.readouterr().out


def test_a_worker_that_dies_with_nothing_left_to_do_is_not_replaced():
    pool = ScriptedPool({"w1": 3})
    assert sorted(run(pool, 3, 2)) == [0, 1, 2]


def test_a_shard_that_kills_three_workers_ends_the_run_by_name():
    pool = ScriptedPool(deadly={4})
    with pytest.raises(UserError, match=rf"{MOST_DEATHS} workers died at shard 4, the last of: signal SIGKILL"):
        run(pool, 9, 2)


def test_workers_that_never_load_end_the_run():
    pool = ScriptedPool({f"w{n}": 1 for n in range(10)})
    with pytest.raises(UserError, match="3 workers died before they had a shard"):
        run(pool, 9, 2)
    assert ("begin",) not in pool.log


def test_a_mistake_of_the_user_is_not_tried_again():
    pool = ScriptedPool(refuses=True)
    with pytest.raises(UserError, match="the row is not finite"):
        run(pool, 9, 2)


def test_what_check_raises_ends_the_run():
    class Stop(Exception):
        pass

    def check() -> None:
        raise Stop

    with pytest.raises(Stop):
        Dispatcher(ScriptedPool(), range(3), 1).run(lambda: None, lambda *_: None, lambda _: None, check)

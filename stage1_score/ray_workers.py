"""Workers as Ray actors: on this machine or on a cluster, which does placement and sees nodes die.

Every node needs this package and the paths of the run: the prior, the data and the store on a shared file system.
"""

import os
from typing import Any

from shared.errors import UserError, first_line
from stage1_score.dispatch import Batch, Died, Done, Event, Ready, Refused
from stage1_score.score_shard import ShardReport
from stage1_score.stopping import Stopped, StopSwitch
from stage1_score.worker import ShardWorker, Task

_SECONDS_BETWEEN_CHECKS = 1.0
_SECONDS_TO_STOP = 60.0


class RayPool:
    """Ray actors; see `stage1_score.dispatch.Pool`. A context manager: at its end no actor is left."""

    def __init__(self, task: Task, num_workers: int | str, address: str | None):
        """Connect to a cluster, or start Ray on this machine.

        Args:
            num_workers: a number, or `auto` for as many as the cluster has GPUs for.

        Raises:
            UserError: Ray is not installed, or the cluster has too few GPUs.
        """
        try:
            import ray
        except ImportError:
            raise UserError("score.launcher=ray: Ray is not installed: pip install 'prift[ray]'") from None
        self._ray: Any = ray
        self._task = task.with_absolute_paths()
        self._address, self._asked = address, num_workers
        self._actors: dict[str, Any] = {}
        self._pending: dict[Any, tuple[str, str]] = {}
        """Reference of a call to the worker's name and the method."""
        self._num_started = 0

    def __enter__(self) -> "RayPool":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"log_to_driver": True, "logging_level": "warning"}
        if self._address is None:
            workers = self._asked if isinstance(self._asked, int) else 1
            options |= {"include_dashboard": False, "num_cpus": max(workers, os.cpu_count() or 1)}
        try:
            self._ray.init(address=self._address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"score.ray_address={self._address}: {first_line(error)}") from error
        return self

    def __exit__(self, *_: Any) -> None:
        # An actor ends its batch first, as a process does.
        stopping = [actor.stop.options(concurrency_group="beside").remote() for actor in self._actors.values()]
        scoring = [reference for reference, (_, method) in self._pending.items() if method == "score"]
        if stopping:
            self._ray.wait([*stopping, *scoring], num_returns=len(stopping) + len(scoring), timeout=_SECONDS_TO_STOP)
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    @property
    def num_workers(self) -> int:
        """Workers that the cluster has room for, or that were asked for."""
        if isinstance(self._asked, int):
            return self._asked
        num_gpus = int(self._ray.cluster_resources().get("GPU", 0))
        return max(1, num_gpus // self._task.config.score.tensor_parallel)

    def start(self) -> str:
        """See `Pool.start`."""
        name = f"{self._num_started}"
        self._num_started += 1
        on_gpus = self._ray.cluster_resources().get("GPU", 0) > 0 and self._task.config.score.device != "cpu"
        # Tokenising and stopping must not wait for the shard that is being scored.
        remote = self._ray.remote(concurrency_groups={"beside": 2})(_Actor).options(
            num_cpus=1,
            num_gpus=self._task.config.score.tensor_parallel if on_gpus else 0,
            # A dead actor is replaced by the dispatcher, which counts the deaths of a shard.
            max_restarts=0,
            max_task_retries=0,
        )
        self._actors[name] = remote.remote(self._task, name)
        self._pending[self._actors[name].load.remote()] = (name, "load")
        return name

    def give(self, worker: str, shard: int) -> None:
        """See `Pool.give`."""
        actor = self._actors[worker]
        actor.prepare.options(concurrency_group="beside").remote(shard)
        self._pending[actor.score.remote(shard)] = (worker, "score")

    def wait(self) -> list[tuple[str, Event]]:
        """See `Pool.wait`."""
        finished, _ = self._ray.wait(list(self._pending), timeout=_SECONDS_BETWEEN_CHECKS)
        events: list[tuple[str, Event]] = []
        for reference in finished:
            worker, _ = self._pending.pop(reference)
            if worker in self._actors:  # else it was buried, and this is another call that it left behind
                events += [(worker, event) for event in self._outcome(worker, reference)]
        return events

    def _outcome(self, worker: str, reference: Any) -> list[Event]:
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            self._actors.pop(worker)
            return [Died(first_line(error))]
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                return [Refused(str(error.cause))]
            self._ray.kill(self._actors.pop(worker))
            return [Died(first_line(error.cause))]
        if not isinstance(result, ShardReport):
            return [Ready()]
        return [Batch(result.num_rows, result.num_tokens), Done(result)]


class _Actor:
    """A worker in a Ray process."""

    def __init__(self, task: Task, name: str):
        self._task, self._name, self._switch = task, name, StopSwitch()

    def load(self) -> int:
        self._worker = ShardWorker(self._task, self._name)
        return os.getpid()

    def prepare(self, shard: int) -> None:
        self._worker.prepare(shard)

    def score(self, shard: int) -> Any:
        try:
            return self._worker.score(shard, lambda rows, tokens: self._switch.check())
        except Stopped:
            return None

    def stop(self) -> None:
        self._switch.press()

"""Workers as Ray actors: on this machine or on a cluster, which does placement and sees nodes die.

Every node needs this package and the paths of the run: the prior, the data and the store on a shared file system.
"""

import os
import signal
from typing import Any

from shared.cli import mistake_in_words
from shared.errors import UserError, first_line
from shared.stopping import Stopped, StopSwitch
from stage1_score.dispatch import Batch, Died, Done, Event, Ready, Refused
from stage1_score.engine import DeviceLost
from stage1_score.score_shard import ShardReport
from stage1_score.worker import ShardWorker, Task

_SECONDS_BETWEEN_CHECKS = 1.0
_SECONDS_TO_STOP = 60.0


class RayPool:
    """Ray actors; see `stage1_score.dispatch.Pool`. A context manager: at its end no actor is left."""

    def __init__(self, task: Task, was_auto: bool):
        """
        Args:
            task: its device is settled, cpu or cuda.
            was_auto: whether the device was settled by what this machine has.

        Raises:
            UserError: Ray is not installed; on entering, the cluster cannot be reached or has too few GPUs.
        """
        try:
            import ray
        except ImportError:
            raise UserError("score.launcher=ray: Ray is not installed: pip install 'prift[ray]'") from None
        self._ray: Any = ray
        self._task, self._was_auto = task.with_absolute_paths(), was_auto
        self._address, self._asked = task.config.score.ray_address, task.config.score.workers
        self._ready: set[str] = set()
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
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._ray.init(address=self._address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"score.ray_address={self._address}: {first_line(error)}") from error
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray puts its own in their place, and exits with another code
        try:
            self._refuse_too_few_gpus()
        except UserError:
            self._ray.shutdown()
            raise
        return self

    def _refuse_too_few_gpus(self) -> None:
        each = self._task.config.score.tensor_parallel
        gpus = [int(node["Resources"].get("GPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        if self._task.config.score.device == "cuda":
            possible = sum(count // each for count in gpus)
            if possible < (self._asked if isinstance(self._asked, int) else 1):
                raise UserError(
                    f"score.workers={self._asked}, score.tensor_parallel={each}: the cluster's nodes have {gpus} GPUs"
                )
        elif self._was_auto and any(gpus):
            raise UserError(
                "this machine has no GPU, the cluster has: give score.device (cuda or cpu), score.engine and "
                "prior.dtype, which are otherwise chosen by what is here"
            )

    def __exit__(self, *_: Any) -> None:
        # An actor ends its batch first, as a process does.
        stopping = [actor.stop.options(concurrency_group="beside").remote() for actor in self._loaded()]
        scoring = [reference for reference, (_, method) in self._pending.items() if method == "score"]
        if stopping:
            self._ray.wait([*stopping, *scoring], num_returns=len(stopping) + len(scoring), timeout=_SECONDS_TO_STOP)
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    def _loaded(self) -> list[Any]:
        # One that was never placed would not answer.
        return [actor for name, actor in self._actors.items() if name in self._ready]

    @property
    def num_workers(self) -> int:
        """Workers that the cluster has room for, or that were asked for."""
        if isinstance(self._asked, int):
            return self._asked
        if self._task.config.score.device != "cuda":
            return 1
        each = self._task.config.score.tensor_parallel
        return sum(int(node["Resources"].get("GPU", 0)) // each for node in self._ray.nodes() if node["Alive"])

    def start(self) -> str:
        """See `Pool.start`."""
        name = f"{self._num_started}"
        self._num_started += 1
        # Tokenising and stopping must not wait for the shard that is being scored.
        remote = self._ray.remote(concurrency_groups={"beside": 2})(_Actor).options(
            num_cpus=1,
            num_gpus=self._task.config.score.tensor_parallel if self._task.config.score.device == "cuda" else 0,
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
        except self._ray.exceptions.RayError as error:
            # The error of the actor's own code stands in `cause`; all others are of Ray: a lost node, memory, a kill.
            cause = getattr(error, "cause", None) or error
            message = mistake_in_words(cause)
            if message is not None and not isinstance(cause, DeviceLost):
                return [Refused(message)]
            self._ray.kill(self._actors.pop(worker))  # it may live on, out of reach
            return [Died(first_line(cause))]
        self._ready.add(worker)
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

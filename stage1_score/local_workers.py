"""Workers as processes of this machine, one for each GPU (or group of them)."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from shared.cli import mistake_in_words
from shared.errors import UserError
from shared.stopping import Stopped, StopSwitch, children_ignore_ctrl_c, stop_switch
from stage1_score.dispatch import Batch, Died, Done, Event, Ready, Refused
from stage1_score.engine import DeviceLost
from stage1_score.worker import ShardWorker, Task

_SECONDS_BETWEEN_CHECKS = 1.0
_SECONDS_TO_STOP = 60.0
"""A batch may take so long; then a worker that was asked to stop is ended."""


@dataclass(frozen=True)
class _Process:
    process: BaseProcess
    connection: Any
    """Our end of its pipe."""
    environment: dict[str, str]
    """Of its device; the worker that replaces it gets the same."""

    def is_silent(self) -> bool:
        """Whether it is dead and has nothing more to say."""
        return not self.process.is_alive() and not self.connection.poll()

    def end(self) -> None:
        """End it and all that it started: what vLLM leaves behind would keep the GPU's memory."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


class LocalPool:
    """Worker processes; see `stage1_score.dispatch.Pool`. A context manager: at its end no process is left."""

    def __init__(self, task: Task, devices: Sequence[dict[str, str]]):
        """
        Args:
            devices: environment variables of each worker, such as the GPUs that it sees.
        """
        self._task, self._free = task, list(devices)
        self._context = get_context("spawn")
        self._workers: dict[str, _Process] = {}
        self._num_started = 0

    def __enter__(self) -> "LocalPool":
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self._workers.values():
            worker.process.terminate()
        deadline = time.monotonic() + _SECONDS_TO_STOP
        for worker in self._workers.values():
            _drain(worker, deadline)
            worker.end()

    def start(self) -> str:
        """See `Pool.start`."""
        environment = self._free.pop(0)
        ours, theirs = self._context.Pipe()
        name = f"{self._num_started}"
        self._num_started += 1
        process = self._context.Process(
            target=_serve, args=(self._task, name, environment, theirs), name=f"prift-{name}"
        )
        with children_ignore_ctrl_c():
            process.start()
        theirs.close()  # else its end would not be seen when the worker dies
        self._workers[name] = _Process(process, ours, environment)
        return name

    def give(self, worker: str, shard: int) -> None:
        """See `Pool.give`."""
        with suppress(OSError):  # it is dead; `wait` says so
            self._workers[worker].connection.send(shard)

    def wait(self) -> list[tuple[str, Event]]:
        """See `Pool.wait`."""
        by_connection = {worker.connection: name for name, worker in self._workers.items()}
        events: list[tuple[str, Event]] = []
        for connection in wait(list(by_connection), _SECONDS_BETWEEN_CHECKS):
            name = by_connection[connection]
            try:
                events.append((name, self._workers[name].connection.recv()))
            except (EOFError, OSError):
                events.append((name, self._bury(name)))
        # A process that the worker has left behind may hold its end of the pipe open.
        silent = [name for name, worker in self._workers.items() if worker.is_silent()]
        return events + [(name, self._bury(name)) for name in silent]

    def _bury(self, name: str) -> Died:
        worker = self._workers.pop(name)
        worker.end()
        self._free.append(worker.environment)
        code = worker.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Died(f"process {worker.process.pid} ended by {how}")


def _drain(worker: _Process, deadline: float) -> None:
    """Wait for a worker to end; what it still has to say must not keep it from that."""
    while worker.process.is_alive() and time.monotonic() < deadline:
        try:
            if worker.connection.poll(0.1):
                worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(max(0.0, deadline - time.monotonic()))


def devices_of_workers(num_workers: int, gpus: Sequence[str], tensor_parallel: int) -> list[dict[str, str]]:
    """Environment variables that share the machine out among workers.

    Args:
        gpus: names of the visible GPUs; none on a CPU.
    """
    if gpus:
        groups = [gpus[first : first + tensor_parallel] for first in range(0, len(gpus), tensor_parallel)]
        whole = [group for group in groups if len(group) == tensor_parallel]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in whole[:num_workers]]
    if tensor_parallel > 1:
        return [{} for _ in range(num_workers)]
    # Workers that each use every core slow each other down many times over.
    cores = sorted(os.sched_getaffinity(0))
    threads = str(max(1, len(cores) // num_workers))
    shares = [cores[worker::num_workers] or [cores[worker % len(cores)]] for worker in range(num_workers)]
    return [
        {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, share))),
        }
        for share in shares
    ]


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES gives them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA stops reading at the first name that is no device of this machine.
    return [str(index) for index in range(count)] if named is None else named.replace(" ", "").split(",")[:count]


def _serve(task: Task, name: str, environment: dict[str, str], connection: Any) -> None:
    """Life of a worker process: load, then score what comes until the other end closes or a signal stops it."""
    os.setpgrp()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the variable was read when torch was imported
    with stop_switch([signal.SIGTERM]) as switch:
        try:
            with closing(ShardWorker(task, name)) as worker:
                connection.send(Ready())
                _score_all(worker, connection, switch)
        except (Stopped, EOFError, BrokenPipeError, ConnectionResetError):
            return  # asked to stop, or whoever asked is gone
        except DeviceLost as error:
            sys.exit(f"worker {name}: {error}")  # a death: another device may do the shard
        except (UserError, OSError) as error:
            message = mistake_in_words(error)
            if message is None:
                raise
            connection.send(Refused(message))


def _score_all(worker: ShardWorker, connection: Any, switch: StopSwitch) -> None:
    def on_batch(num_rows: int, num_tokens: int) -> None:
        switch.check()
        connection.send(Batch(num_rows, num_tokens))

    given: list[int] = []
    while True:
        while connection.poll(0 if given else _SECONDS_BETWEEN_CHECKS):
            given.append(connection.recv())
            worker.prepare(given[-1])
        switch.check()
        if given:
            connection.send(Done(worker.score(given.pop(0), on_batch)))

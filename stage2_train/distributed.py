"""Processes, devices and the few collectives that training needs."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from shared.errors import LostRank, UserError, first_line

_DEFAULT_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}

_LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    patient_group: Any = None
    """Of the same ranks, on their CPUs, with a timeout that no healthy wait exceeds."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return float(self.all_reduce(torch.tensor(float(flag), device=self.device))) > 0

    def any_in_its_time(self, flag: bool) -> bool:
        """The same, where one rank may work for long while the others wait; one that dies still ends the wait."""
        flags = torch.tensor(float(flag))
        if self.size > 1:
            torch.distributed.all_reduce(flags, group=self.patient_group)
        return float(flags) > 0

    def of_rank_0(self, names: list[str]) -> list[str]:
        """Rank 0's list, on all ranks."""
        listed = [names]
        if self.size > 1:
            torch.distributed.broadcast_object_list(listed, src=0, group=self.patient_group)
        return listed[0]

    def limit_waits(self, timeout_seconds: int) -> None:
        """Give every process group that there is by now the timeout, but for the patient one.

        DeepSpeed makes groups of its own, with torch's default of half an hour on gloo.
        """
        for group in list(distributed_c10d._world.pg_map):
            if group is not self.patient_group:
                distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)

    def wait_for_all(self) -> None:
        """Wait until all ranks are here, however long one of them works."""
        self.any_in_its_time(False)


def _ranks_on_this_node() -> int:
    """As the launcher says: torchrun and deepspeed name it differently."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def choose_accelerator() -> None:
    """Tell DeepSpeed where it runs; must come before anything that imports it, transformers included."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def make_deterministic() -> None:
    """Choose operations that give the same bits each time; an operation that has none is an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # On by default with the above, it fills buffers with NaN that transformers makes empty and fills afterwards.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def lost_ranks_named(timeout_seconds: int) -> Iterator[None]:
    """What a collective raises when another rank is gone, in the words of a user.

    Raises:
        LostRank: a peer closed its connection, or did not answer for so long.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no type of their own, but name the file of gloo that they come from.
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise LostRank(
            f"another process of this run died or did not answer for {timeout_seconds} s (train.timeout_seconds): see "
            f"what it printed; the same command goes on from the last checkpoint ({first_line(error)})"
        ) from None


def meet(timeout_seconds: int = 600) -> World:
    """Join the other processes of the run; alone, where no launcher set an environment.

    Args:
        timeout_seconds: the longest that a rank waits for another in a step.
    """
    for name, value in _DEFAULT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    on_cuda = torch.cuda.is_available()
    choose_accelerator()
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if not on_cuda:
        # Its shared-memory collectives would be compiled now: that takes a C++ compiler and most of a minute.
        __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 is about to drop.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Each rank would take all cores; together they would spend their time waiting for each other.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_node()))
    try:
        timeout = timedelta(seconds=timeout_seconds)
        deepspeed.init_distributed("nccl" if on_cuda else "gloo", verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"the processes cannot meet at port {port} ({first_line(error)}): if another training runs on this "
            "machine, start this one with `deepspeed --master_port` and another number"
        ) from None
    patient = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, patient)

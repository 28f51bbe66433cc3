"""The host's part of each step, done while the step before it runs."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from stage2_train.batch import Batch, BatchForm, make_batch
from stage2_train.distributed import World
from stage2_train.loss import GivenWeights
from stage2_train.setup import Job
from stage2_train.weigh import StepWeigher


@dataclass(frozen=True)
class LoadedStep:
    """A step as one rank needs it, on the CPU."""

    rows: np.ndarray
    """The step's rows, all ranks'."""
    batches: list[Batch]
    """This rank's micro-batches."""
    given: list[GivenWeights] | None
    """Their weights, where the prior's statistics make them."""
    num_groups: int
    """Micro-batches of all ranks, those without targets left out."""


class StepLoader:
    """Reads rows, lays out micro-batches and weighs them, one step ahead, in a thread of its own."""

    def __init__(self, job: Job, world: World, form: BatchForm, weigher: StepWeigher):
        self._job, self._world, self._form, self._weigher = job, world, form, weigher
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step-loader")
        self._ahead: tuple[int, Future[LoadedStep]] | None = None

    def get(self, step: int) -> tuple[LoadedStep, float]:
        """A step, and the seconds that were waited for it; the next one is begun."""
        started = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._executor.submit(self._load, step)
        loaded = self._ahead[1].result()
        waited = time.perf_counter() - started
        self._ahead = None
        if step < self._job.plan.num_steps:
            self._ahead = step + 1, self._executor.submit(self._load, step + 1)
        return loaded, waited

    def close(self) -> None:
        """End the thread."""
        self._executor.shutdown(cancel_futures=True)

    def _load(self, step: int) -> LoadedStep:
        job, form = self._job, self._form
        rows = job.plan.rows_of_step(step)
        dealt = job.deal(rows, self._world.size, form)
        stop_token_ids = job.cache.manifest.stop_token_ids
        mine = dealt[self._world.rank // form.num_parts]
        batches = [make_batch(job.cache, rows, micro_batch, stop_token_ids, form) for micro_batch in mine]
        given = self._weigher.given(step, rows, batches)
        num_groups = sum(1 for rank in dealt for micro_batch in rank if micro_batch)
        return LoadedStep(rows, batches, given, num_groups)

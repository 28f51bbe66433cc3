"""A batch that is computed when a checkpoint is saved and again when it is loaded: the loaded model must agree."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from shared.errors import UserError
from stage2_train.batch import Batch, BatchForm, make_batch
from stage2_train.distributed import World
from stage2_train.setup import Job

_MOST_ROWS = 8

_LARGEST_DIFFERENCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the mean nll, relative, by the dtype of the weights: rounding of other kernels. On the same machine it is 0."""

_SMALLEST_NLL = 0.01
"""Nats; a smaller nll may be as far off as this one: of rows learnt by heart nothing but rounding is left."""


def probe_nll(job: Job, step: int, world: World, form: BatchForm, nll: Callable[[Batch], Tensor]) -> float:
    """Mean nll, nats per target, of a micro-batch of the step's first rows; called by all ranks, which run the same.

    Args:
        nll: nll_N of a micro-batch without dropout and gradient.
    """
    rows = job.plan.rows_of_step(step)[:_MOST_ROWS]
    # Dealt as for one rank, so that it is the same at any world size.
    micro_batch = job.deal(rows, form.num_parts, form)[0][0]
    batch = make_batch(job.cache, rows, micro_batch, (), form).to(world.device)
    nll_N = nll(batch).double()
    sums = nll_N.new_tensor([float(nll_N.sum()), len(nll_N)])
    total, count = world.all_reduce(sums).tolist()
    return total / max(count, 1.0)


def refuse_other_loss(stored: float, computed: float, dtype: str, folder: Path) -> None:
    """Stop where a loaded checkpoint does not give the loss that it gave when it was saved.

    Raises:
        UserError: the two are further apart than rounding explains.
    """
    if not abs(computed - stored) <= _LARGEST_DIFFERENCE[dtype] * max(abs(stored), _SMALLEST_NLL):
        raise UserError(
            f"{folder}: expected nll {stored:.6f} of the batch recorded with it, got {computed:.6f} after loading: the "
            "weights are not those that were saved, or other software computes something else; use the versions that "
            "saved it, or an older checkpoint (train.resume=PATH)"
        )

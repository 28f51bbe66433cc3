"""The partial sums of the statistics on CUDA: each logit is read once.

Shape suffixes: N targets, V vocabulary (or a slice of it), K partial sums.

One program a row. Each of its lanes keeps the maximum and the sums of the logits that it has seen (an online softmax)
and rescales its sums when the maximum rises; the lanes are merged at the end as `shared.statistics` merges slices.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_SUMS = 5
_BLOCK = 2048
_LOGITS_PER_WARP = 256  # Eight a thread: two loads of 16 bytes; a state of five numbers for each fits in registers.

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _add_block(z, z_target, m, others, above, weighted, squares):
    """The state of the lanes after one more logit each."""
    difference = z - m
    rises = difference > 0
    # One exponential does for both: the old sums shrink by it where the maximum rises, else it is the new term.
    e = tl.exp(-tl.abs(difference))
    scale = tl.where(rises, e, 1.0)
    term = tl.where(rises, 1.0, e)
    # Where a factor is 0 the other may be infinite, and the product NaN.
    weighted = tl.where(rises, tl.where(e == 0, 0.0, e * (weighted - difference * others)), weighted)
    weighted += tl.where(rises | (e == 0), 0.0, e * difference)
    others = others * scale + term
    above = above * scale + tl.where(z > z_target, term, 0.0)
    squares = squares * scale * scale + term * term
    return tl.where(rises, z, m), others, above, weighted, squares


@triton.jit
def _row_sums(
    logits, row_stride, target_logits, local_targets, sums, vocab_size, NUM_SUMS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)  # 2^31 logits are 14,000 rows of a usual vocabulary.
    logits += row * row_stride
    z_target, target = tl.load(target_logits + row), tl.load(local_targets + row).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    # The lowest finite number in place of -inf: a difference to it is never -inf - -inf.
    m = tl.full([BLOCK], _LOWEST, tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + lanes
        # A logit of -inf adds nothing: so the end of the row and the target are left out.
        z = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf"))
        z = tl.where(columns == target, float("-inf"), z)
        m, others, above, weighted, squares = _add_block(z, z_target, m, others, above, weighted, squares)
    # Not z_target: a NaN need not have survived the reduction over the ranks.
    own = tl.load(logits + target, mask=target >= 0, other=float("-inf"))
    others_maximum = tl.max(m, axis=0)
    maximum = tl.where(own > others_maximum, own, others_maximum)
    scale = tl.exp(m - maximum)
    weighted = tl.where(scale == 0, 0.0, scale * (weighted + (m - maximum) * others))
    squares_sum = tl.sum(squares * scale * scale, axis=0)
    # At least 1 where there is a maximum; NaN for a NaN, and for +inf: there some exponent is inf - inf.
    mass = squares_sum + tl.exp(own - maximum)
    sums += row * NUM_SUMS
    no_maximum = tl.where(mass == 0, float("-inf"), float("nan"))
    tl.store(sums, tl.where(mass > 0, maximum, no_maximum))  # pyright: ignore
    tl.store(sums + 1, tl.sum(others * scale, axis=0))
    tl.store(sums + 2, tl.sum(above * scale, axis=0))
    tl.store(sums + 3, tl.sum(weighted, axis=0))
    tl.store(sums + 4, squares_sum)


def partial_sums(logits_NV: Tensor, target_logit_N: Tensor, local_target_N: Tensor) -> Tensor:
    """As `shared.statistics.partial_sums`, of float32 logits on CUDA.

    Args:
        logits_NV: rows may be any distance apart, as in a slice of a wider tensor.
        target_logit_N: float32.
        local_target_N: int64; -1 where the target is not in this slice.

    Returns:
        (N, 5) float32, the maximum NaN where the row has a NaN or +inf.
    """
    num_rows, vocab_size = logits_NV.shape
    sums_NK = logits_NV.new_empty(num_rows, _NUM_SUMS)
    if num_rows == 0:
        return sums_NK
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    constants, options = launch_parameters(vocab_size)
    kernel: Any = _row_sums[(num_rows,)]
    with torch.cuda.device_of(logits_NV):  # Triton launches on the current device.
        kernel(
            logits_NV, logits_NV.stride(0), target_logit_N.contiguous(), local_target_N.contiguous(), sums_NK,
            vocab_size, **constants, **options,
        )  # fmt: skip
    return sums_NK


def launch_parameters(vocab_size: int) -> tuple[dict[str, int], dict[str, int | bool]]:
    """The kernel's compile-time constants and the compiler's options."""
    block = min(_BLOCK, max(_LOGITS_PER_WARP, triton.next_power_of_2(vocab_size)))
    # Fusion is given, since triton's default depends on its version.
    options = {"num_warps": block // _LOGITS_PER_WARP, "enable_fp_fusion": True}
    return {"NUM_SUMS": _NUM_SUMS, "BLOCK": block}, options

"""The definition of every per-token statistic, from logits.

Shape suffixes: N targets, V vocabulary (or a slice of it), D hidden size, P slices of the vocabulary, K partial sums.

With m = max_v z_v, e_v = exp(z_v - m) and Z = sum_v e_v, for the target y:

    logprob       = (z_y - m) - ln Z; where z_y = m, -log1p of the sum of e_v over v != y
    mass_rank     = (sum of e_v over z_v > z_y) / Z
    entropy       = ln Z - (sum of e_v (z_v - m)) / Z, terms with e_v = 0 left out
    collision     = (sum of e_v^2) / Z^2
    entropy_top20 = entropy of the softmax over the 20 largest logits

All are finite for any finite logits: every exponent is at most 0. `u`, the cumulative mass of PriFT-mass
(arXiv 2606.09396), is 1 - mass_rank.

They are made of partial sums over slices of the vocabulary, which are merged by rescaling to the common maximum.
Tensor-parallel ranks thus exchange K numbers a target and never logits; a single process has one slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS_VERSION = 1
"""Goes into a store's identity; raised when a definition changes."""

_TOP = 20
_CACHE_BYTES = 4 << 20
_NO_MASS = -1e4
"""exp of it is 0 in float64."""

_MAXIMUM, _OTHERS, _ABOVE, _WEIGHTED, _SQUARES = range(5)
"""Places in the K partial sums of a slice; see `partial_sums`."""


@dataclass(frozen=True)
class VocabShard:
    """One rank's slice of the vocabulary, and the two reductions over all ranks that share the vocabulary."""

    start: int
    """The slice's first vocabulary row; the slices tile the vocabulary in any order, and one may be empty."""

    rank: int
    """In [0, size)."""

    size: int
    """P, the number of slices."""

    all_max: Callable[[Tensor], Tensor]
    """Elementwise maximum over the ranks; it may work in place. A NaN need not survive it."""

    all_sum: Callable[[Tensor], Tensor]
    """Elementwise sum over the ranks; it may work in place."""


@torch.no_grad()
def token_statistics(
    logits_NV: Tensor, targets_N: Tensor, columns: Sequence[str], shard: VocabShard | None = None
) -> dict[str, Tensor]:
    """Statistics of the next-token distributions at the targets.

    Args:
        logits_NV: float32 or float64 logits; row n predicts target n. -inf is allowed.
        targets_N: int64 token ids, each below V (with a shard: below the whole vocabulary's size).
        columns: names out of the module's docstring.
        shard: which slice of the vocabulary the logits are. Every rank passes the same targets and columns, takes
            part in one `all_max` and one `all_sum` (none where no column is asked for), and gets the same result.

    Returns:
        One tensor (N,) of the dtype of the logits for each column: logprob <= 0 in nats, mass_rank in [0, 1],
        entropy >= 0 in nats, entropy_top20 in [0, ln 20], collision in (0, 1]. NaN where the logits have no
        softmax (a NaN, a +inf, or nothing but -inf), -inf where the target's own logit is -inf.
    """
    if not columns:
        return {}
    if logits_NV.shape[-1] == 0:  # The slice of a rank that has only padding: a maximum needs a column.
        logits_NV = logits_NV.new_full((len(logits_NV), 1), -torch.inf)
    target_logit_N, local_target_N = _locate(logits_NV, targets_N, shard)
    if uses_kernel(logits_NV):
        from shared import statistics_kernel  # Here, because it imports triton.

        sums_NK = statistics_kernel.partial_sums(logits_NV, target_logit_N, local_target_N)
    else:
        sums_NK = _sums_in_blocks(logits_NV, target_logit_N, local_target_N)
    if "entropy_top20" in columns:
        top_NK = logits_NV.topk(min(_TOP, logits_NV.shape[-1]), dim=-1).values
        sums_NK = torch.cat([sums_NK, F.pad(top_NK, (0, _TOP - top_NK.shape[-1]), value=-torch.inf)], dim=-1)
    return _merge(_exchange(sums_NK, shard), target_logit_N, columns)


def statistics_in_chunks(
    hidden_ND: Tensor,
    targets_N: Tensor,
    columns: Sequence[str],
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
    max_logits_bytes: int,
    shard: VocabShard | None = None,
) -> dict[str, Tensor]:
    """Statistics from hidden states, the head run on a few rows at a time.

    Args:
        hidden_ND: hidden states that predict the targets, in the model's dtype.
        targets_N: int64 token ids.
        columns: as for `token_statistics`.
        logits_of: the head: (n, D) to logits (n, V), float32, or float64 of float64 hidden states.
        vocab_size: V. With a shard, the width of the widest slice: chunks are cut by it, and ranks that cut
            different chunks would wait for each other for ever.
        max_logits_bytes: no logits tensor is larger, unless a single row is. The statistics themselves hold up
            to four more tensors of that size at a time; none where the kernel makes the sums (`uses_kernel`).
        shard: as for `token_statistics`, whose two reductions take place once a chunk.

    Returns:
        As `token_statistics`, in the dtype of the logits.
    """
    rows = max(1, max_logits_bytes // (max(4, hidden_ND.element_size()) * vocab_size))
    starts = range(0, max(1, len(targets_N)), rows)
    parts = [
        token_statistics(logits_of(hidden_ND[start : start + rows]), targets_N[start : start + rows], columns, shard)
        for start in starts
    ]
    return {column: torch.cat([part[column] for part in parts]) for column in columns}


def rows_in_cache(logits_NV: Tensor) -> int:
    """Rows of logits on which several passes in turn find them in a CPU's cache; all of them on another device."""
    if logits_NV.device.type != "cpu":
        return max(1, len(logits_NV))
    return max(1, _CACHE_BYTES // (logits_NV.element_size() * logits_NV.shape[-1]))


def uses_kernel(logits_NV: Tensor) -> bool:
    """Whether the partial sums of these logits are made by `shared.statistics_kernel`: float32 on CUDA, with triton."""
    return logits_NV.is_cuda and logits_NV.dtype == torch.float32 and find_spec("triton") is not None


def partial_sums(logits_NV: Tensor, target_logit_N: Tensor, local_target_N: Tensor) -> Tensor:
    """What a slice of the vocabulary contributes to the statistics.

    Args:
        logits_NV: the slice's logits.
        target_logit_N: the target's logit, whichever slice has it.
        local_target_N: int64 index of the target in this slice, -1 where another slice has it.

    Returns:
        (N, 5) in the dtype of the logits: the slice's maximum m, and over its v other than the target, left out by
        index, the sums of e_v = exp(z_v - m), of e_v where z_v > the target's, of e_v (z_v - m) where e_v > 0, and
        of e_v^2. Of a slice of nothing but -inf: -inf and four zeros. Where it has a NaN or +inf, the maximum is
        NaN or +inf, and the sums mean nothing.
    """
    maximum_N = logits_NV.amax(dim=-1)
    # -inf - -inf is NaN: where the slice has no mass, nothing is subtracted.
    shifted_NV = logits_NV - maximum_N.masked_fill(maximum_N == -torch.inf, 0.0)[:, None]
    # Of no mass in any dtype, and finite: 0 * -inf is NaN.
    exps_NV = shifted_NV.clamp_(min=_NO_MASS).exp()
    rows_n = (local_target_N >= 0).nonzero()[:, 0]
    exps_NV[rows_n, local_target_N[rows_n]] = 0.0
    others_N = exps_NV.sum(dim=-1)
    weighted_N, squares_N = torch.linalg.vecdot(exps_NV, shifted_NV), torch.linalg.vecdot(exps_NV, exps_NV)
    above_N = exps_NV.mul_(logits_NV > target_logit_N[:, None]).sum(dim=-1)
    return torch.stack([maximum_N, others_N, above_N, weighted_N, squares_N], dim=-1)


def _sums_in_blocks(logits_NV: Tensor, target_logit_N: Tensor, local_target_N: Tensor) -> Tensor:
    """`partial_sums` a few rows at a time on a CPU, where its passes then find the logits in the cache."""
    num_rows = rows_in_cache(logits_NV)
    if len(logits_NV) <= num_rows:
        return partial_sums(logits_NV, target_logit_N, local_target_N)
    blocks = zip(*(whole.split(num_rows) for whole in (logits_NV, target_logit_N, local_target_N)), strict=True)
    return torch.cat([partial_sums(*block) for block in blocks])


def _locate(logits_NV: Tensor, targets_N: Tensor, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """The logit of each target, known to all ranks, and its index in this rank's slice or -1."""
    if shard is None:
        return logits_NV.gather(-1, targets_N[:, None])[:, 0], targets_N
    local_N = targets_N - shard.start
    elsewhere_N = (local_N < 0) | (local_N >= logits_NV.shape[-1])
    logit_N = logits_NV.gather(-1, local_N.masked_fill(elsewhere_N, 0)[:, None])[:, 0]
    return shard.all_max(logit_N.masked_fill(elsewhere_N, -torch.inf)), local_N.masked_fill(elsewhere_N, -1)


def _exchange(sums_NK: Tensor, shard: VocabShard | None) -> Tensor:
    """The partial sums (N, P, K) of all slices."""
    if shard is None:
        return sums_NK[:, None]
    # A sum with zeros gathers: 0 + x = x for every x, -inf and NaN included.
    slots_NPK = sums_NK.new_zeros(sums_NK.shape[0], shard.size, sums_NK.shape[1])
    slots_NPK[:, shard.rank] = sums_NK
    return shard.all_sum(slots_NPK)


def _merge(sums_NPK: Tensor, target_logit_N: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
    """The columns from the partial sums of all slices, to which the target's own terms are added."""
    maximum_N = sums_NPK[..., _MAXIMUM].amax(dim=-1)
    # NaN where the row has no softmax, and by way of it every column; -inf where a slice has no mass.
    shift_NP = sums_NPK[..., _MAXIMUM] - maximum_N[:, None]
    scale_NP = shift_NP.exp()
    scaled_NPK = scale_NP[..., None] * sums_NPK
    others_N = scaled_NPK[..., _OTHERS].sum(dim=-1)
    own_N = target_logit_N - maximum_N
    z_N = others_N + own_N.exp()
    results: dict[str, Tensor] = {}
    for column in columns:
        match column:
            case "logprob":
                results[column] = torch.where(own_N == 0, -others_N.log1p(), own_N - z_N.log())
            case "mass_rank":
                results[column] = (scaled_NPK[..., _ABOVE].sum(dim=-1) / z_N).clamp(max=1.0)
            case "entropy":
                moved_NP = _without_mass_zero(scaled_NPK[..., _OTHERS], shift_NP)
                weighted_N = (scaled_NPK[..., _WEIGHTED] + moved_NP).sum(dim=-1)
                results[column] = _entropy(weighted_N + _without_mass_zero(own_N.exp(), own_N), z_N)
            case "entropy_top20":
                top_NK = sums_NPK[..., _SQUARES + 1 :].flatten(1).topk(_TOP, dim=-1).values - maximum_N[:, None]
                exps_NK = top_NK.exp()
                results[column] = _entropy(_without_mass_zero(exps_NK, top_NK).sum(dim=-1), exps_NK.sum(dim=-1))
            case "collision":
                squares_N = (scale_NP * scaled_NPK[..., _SQUARES]).sum(dim=-1) + own_N.exp().square()
                results[column] = squares_N / z_N.square()
            case _:
                raise ValueError(f"unknown statistic {column!r}")
    return results


def _without_mass_zero(mass: Tensor, exponent: Tensor) -> Tensor:
    """mass * exponent, 0 where there is no mass: 0 * -inf is NaN."""
    return torch.where(mass == 0, 0.0, mass * exponent)


def _entropy(weighted_N: Tensor, z_N: Tensor) -> Tensor:
    return (z_N.log() - weighted_N / z_N).clamp(min=0.0)

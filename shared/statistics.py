"""The definition of every per-token statistic, from logits.

Shape suffixes: N targets, V vocabulary, D hidden size.

With m = max_v z_v, e_v = exp(z_v - m) and Z = sum_v e_v, for the target y:

    logprob       = (z_y - m) - ln Z; where z_y = m, -log1p of the sum of e_v over v != y
    mass_rank     = (sum of e_v over z_v > z_y) / Z
    entropy       = ln Z - (sum of e_v (z_v - m)) / Z, terms with e_v = 0 left out
    collision     = (sum of e_v^2) / Z^2
    entropy_top20 = entropy of the softmax over the 20 largest logits

All are finite for any finite logits: every exponent is at most 0. `u`, the cumulative mass of PriFT-mass
(arXiv 2606.09396), is 1 - mass_rank.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

STATISTICS_VERSION = 1
"""Goes into a store's identity; raised when a definition changes."""

_TOP = 20


@torch.no_grad()
def token_statistics(logits_NV: Tensor, targets_N: Tensor, columns: Sequence[str]) -> dict[str, Tensor]:
    """Statistics of the next-token distributions at the targets.

    Args:
        logits_NV: float32 or float64 logits; row n predicts target n. -inf is allowed.
        targets_N: int64 token ids, each below V.
        columns: names out of the module's docstring.

    Returns:
        One tensor (N,) of the dtype of the logits for each column: logprob <= 0 in nats, mass_rank in [0, 1],
        entropy >= 0 in nats, entropy_top20 in [0, ln 20], collision in (0, 1]. NaN where the logits have no
        softmax (a NaN, a +inf, or nothing but -inf), -inf where the target's own logit is -inf.
    """
    shifted_NV = logits_NV - logits_NV.amax(dim=-1, keepdim=True)
    exps_NV = shifted_NV.exp()
    z_N = exps_NV.sum(dim=-1)
    target_N1 = targets_N[:, None]
    shifted_target_N1 = shifted_NV.gather(-1, target_N1)
    results: dict[str, Tensor] = {}
    for column in columns:
        match column:
            case "logprob":
                others_N = exps_NV.scatter(-1, target_N1, 0.0).sum(dim=-1)
                at_maximum_N = shifted_target_N1[:, 0] == 0
                results[column] = torch.where(at_maximum_N, -others_N.log1p(), shifted_target_N1[:, 0] - z_N.log())
            case "mass_rank":
                above_N = torch.where(shifted_NV > shifted_target_N1, exps_NV, 0.0).sum(dim=-1)
                results[column] = (above_N / z_N).clamp(max=1.0)
            case "entropy":
                results[column] = _entropy(shifted_NV, exps_NV, z_N)
            case "entropy_top20":
                top_NK = shifted_NV.topk(min(_TOP, shifted_NV.shape[-1]), dim=-1).values
                results[column] = _entropy(top_NK, top_NK.exp(), top_NK.exp().sum(dim=-1))
            case "collision":
                results[column] = exps_NV.square().sum(dim=-1) / z_N.square()
            case _:
                raise ValueError(f"unknown statistic {column!r}")
    return results


def statistics_in_chunks(
    hidden_ND: Tensor,
    targets_N: Tensor,
    columns: Sequence[str],
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
    max_logits_bytes: int,
) -> dict[str, Tensor]:
    """Statistics from hidden states, the head run on a few rows at a time.

    Args:
        hidden_ND: hidden states that predict the targets, in the model's dtype.
        targets_N: int64 token ids.
        columns: as for `token_statistics`.
        logits_of: the head: (n, D) to logits (n, V), float32, or float64 of float64 hidden states.
        vocab_size: V.
        max_logits_bytes: no logits tensor is larger, unless a single row is. The statistics themselves hold up
            to four more tensors of that size at a time.

    Returns:
        As `token_statistics`, in the dtype of the logits.
    """
    rows = max(1, max_logits_bytes // (max(4, hidden_ND.element_size()) * vocab_size))
    starts = range(0, max(1, len(targets_N)), rows)
    parts = [
        token_statistics(logits_of(hidden_ND[start : start + rows]), targets_N[start : start + rows], columns)
        for start in starts
    ]
    return {column: torch.cat([part[column] for part in parts]) for column in columns}


def _entropy(shifted_NV: Tensor, exps_NV: Tensor, z_N: Tensor) -> Tensor:
    # 0 * -inf is NaN: terms of no mass are left out.
    terms_NV = torch.where(exps_NV > 0, exps_NV * shifted_NV, 0.0)
    return (z_N.log() - terms_NV.sum(dim=-1) / z_N).clamp(min=0.0)

"""Weighted cross-entropy of a head's targets: loss and gradients chunk by chunk, never the logits of all targets.

Shape suffixes: N targets, n targets of a chunk, V vocabulary, D hidden size.

The weights are inputs, known before the softmax or made of the very logits at hand, never a gradient that comes from
above. So the forward pass can work out the gradients as well, while it has a chunk's logits:

    L = sum_n w_n nll_n        dL/dz_nv = w_n (softmax(z_n)_v - [v = y_n])

and the backward pass only multiplies them by the gradient of L. That takes three matrix products, as a plain head
does, and no second look at the logits. What else the loss is scaled by is best given here too (`scale`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shared.head import Float32Head, LogitTransform, float32_product
from shared.statistics import rows_in_cache

WeighChunk = Callable[[Tensor, slice], Tensor]
"""From the logits (n, V) of a chunk and its place among the targets to weights float32 (n,). It must leave the logits
as they are."""


def weighted_cross_entropy(
    head: Float32Head,
    hidden_ND: Tensor,
    targets_N: Tensor,
    weigh: WeighChunk,
    transform: LogitTransform,
    max_logits_bytes: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of the targets' nll, with its graph to the hidden states and the head's parameters.

    Where no gradient is wanted none is worked out. The backward pass can run once: it scales the gradients in place.

    Args:
        hidden_ND: hidden states that predict the targets, in the model's dtype; N may be 0.
        targets_N: int64 token ids.
        max_logits_bytes: no logits tensor is larger, unless a single row is.
        scale: of the loss. Given here it multiplies the weights in float32; a factor outside multiplies gradients that
            were rounded to the model's dtype, and is itself rounded to it: by 0.4 % in bfloat16, all of them alike.

    Returns:
        The sum of scale * weight * nll, nll_N in nats and weights_N, the latter two detached; float32 (float64 of a
        float64 model).
    """
    operands = (hidden_ND, head.weight, head.bias)
    if not torch.is_grad_enabled():
        # Inside the function torch asks what requires a gradient, not whether one is wanted now.
        operands = tuple(None if operand is None else operand.detach() for operand in operands)
    return _WeightedCrossEntropy.apply(  # pyright: ignore[reportReturnType]
        *operands, targets_N, weigh, transform, max_logits_bytes, scale
    )


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, weigh: WeighChunk,
        transform: LogitTransform, max_logits_bytes: int, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        chunks = _chunks(len(targets_N), max_logits_bytes // (max(4, hidden_ND.element_size()) * len(weight_VD)))
        gradients = _Gradients(ctx.needs_input_grad[:3], hidden_ND, weight_VD, bias_V, len(chunks))
        operand_VD = _product_operand(weight_VD)
        nll_parts, weight_parts = [], []
        for part in chunks:
            products_nV = float32_product(hidden_ND[part].to(operand_VD.dtype), operand_VD)
            if bias_V is not None:
                products_nV += bias_V
            logits_nV = transform.apply(products_nV)
            weights_n = weigh(logits_nV, part)
            scaled_n = weights_n * scale
            nll_parts.append(_nll_and_gradient(logits_nV, targets_N[part], scaled_n, transform, gradients.wanted))
            weight_parts.append(weights_n)
            gradients.add(part, logits_nV)
        nll_N, weights_N = torch.cat(nll_parts), torch.cat(weight_parts)
        ctx.save_for_backward(gradients.hidden_ND, gradients.weight_VD, gradients.bias_V)
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(nll_N, weights_N)
        return (nll_N * (weights_N * scale)).sum(), nll_N, weights_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a copy of the weight's gradient is as large as the weight. A second backward pass finds the saved
        # tensors changed, and autograd refuses it.
        scaled = [
            None if saved is None else saved.mul_(gradients[0].to(saved.dtype)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


class _Gradients:
    """Gradients of the weighted sum, filled chunk by chunk; None where not wanted."""

    def __init__(
        self, wanted: tuple[bool, ...], hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, num_chunks: int
    ):
        self.wanted = any(wanted)
        self._operands = hidden_ND, weight_VD
        # Sums over several chunks are kept in float32, and rounded once.
        dtype = weight_VD.dtype if num_chunks == 1 else torch.promote_types(weight_VD.dtype, torch.float32)
        self.hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and wanted[2] else None

    def add(self, part: slice, gradient_nV: Tensor) -> None:
        """Add what a chunk contributes, from the gradient by its products."""
        if not self.wanted:
            return
        hidden_ND, weight_VD = self._operands
        rounded_nV = gradient_nV.to(hidden_ND.dtype)
        if self.hidden_ND is not None:
            torch.mm(rounded_nV, weight_VD, out=self.hidden_ND[part])
        if self.weight_VD is not None:
            if self.weight_VD.dtype == hidden_ND.dtype:
                self.weight_VD.addmm_(rounded_nV.t(), hidden_ND[part])
            else:
                self.weight_VD += float32_product(rounded_nV.t(), hidden_ND[part].t())
        if self.bias_V is not None:
            self.bias_V += gradient_nV.sum(dim=0)


def _chunks(num_rows: int, rows_of_chunk: int) -> list[slice]:
    """Slices that tile the rows; one of no row where there is none."""
    size = max(1, rows_of_chunk)
    return [slice(start, min(start + size, num_rows)) for start in range(0, max(1, num_rows), size)]


def _product_operand(weight_VD: Tensor) -> Tensor:
    """The weight in the dtype that `float32_product` multiplies it in, so that no chunk converts it again."""
    if weight_VD.is_cuda or weight_VD.dtype in (torch.float32, torch.float64):
        return weight_VD
    return weight_VD.float()


def _nll_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, transform: LogitTransform, wants_gradient: bool
) -> Tensor:
    """nll_N of a chunk; where a gradient is wanted, that by the head's products takes the place of the logits."""
    nll_parts = []
    for logits_nV, targets_n, weights_n in zip(
        *(whole.split(rows_in_cache(logits_NV)) for whole in (logits_NV, targets_N, weights_N)), strict=True
    ):
        slope_nV = transform.slope(logits_nV) if wants_gradient else 1.0
        logits_nV -= logits_nV.amax(dim=-1, keepdim=True)
        target_n = logits_nV.gather(-1, targets_n[:, None])[:, 0]
        sums_n = logits_nV.exp_().sum(dim=-1)
        nll_parts.append(sums_n.log() - target_n)
        if wants_gradient:
            weights_n = weights_n.to(logits_nV.dtype)
            logits_nV *= (weights_n / sums_n)[:, None]
            logits_nV.scatter_add_(-1, targets_n[:, None], -weights_n[:, None])
            if not isinstance(slope_nV, float) or slope_nV != 1.0:
                logits_nV *= slope_nV
    return torch.cat(nll_parts)

"""The output head of a causal language model: hidden states to float32 logits.

Shape suffixes: N rows, V vocabulary, D hidden size, BT tokens of a batch.

Logits leave the head in float32, accumulated in float32 from operands of the model's dtype. Rounded to
bfloat16 they would tie: on a real model 24 % of targets then tie with another token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.padding import Boundaries


def float32_product(rows_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """rows @ weight.T (N, V), accumulated and given in float32 from operands of any dtype; float64 of float64 ones."""
    if rows_ND.dtype in (torch.float32, torch.float64):
        return rows_ND @ weight_VD.t()
    if rows_ND.is_cuda:
        return torch.mm(rows_ND, weight_VD.t(), out_dtype=torch.float32)
    return rows_ND.float() @ weight_VD.float().t()


class _Float32Product(torch.autograd.Function):
    """rows @ weight.T in float32 from operands of any dtype; gradients in the operands' dtype."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_VD)
        return float32_product(rows_ND, weight_VD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        rows_ND, weight_VD = ctx.saved_tensors
        gradient_NV = gradients[0].to(rows_ND.dtype)
        return gradient_NV @ weight_VD, gradient_NV.t() @ rows_ND


class Float32Head(nn.Linear):
    """A linear head with float32 output (float64 of a float64 model).

    An `nn.Linear` becomes one by its class alone: parameter names, ties and the hooks of ZeRO stay as they are.
    """

    def forward(self, input: Tensor, task: "HeadTask | None" = None) -> Any:
        """(..., D) in the model's dtype to float32 logits (..., V).

        With a task: what the task returns. It runs inside this call, where ZeRO-3 holds the weight whole: however
        many chunks the task works in, the weight is gathered once.
        """
        if task is not None:
            return task(self, input)
        rows_ND = input.reshape(-1, input.shape[-1])
        if rows_ND.dtype in (torch.float32, torch.float64):
            logits_NV = rows_ND @ self.weight.t()
        else:
            logits_NV = _Float32Product.apply(rows_ND, self.weight)
        if self.bias is not None:
            logits_NV = logits_NV + self.bias.to(logits_NV.dtype)
        return logits_NV.reshape(*input.shape[:-1], self.weight.shape[0])  # pyright: ignore


HeadTask = Callable[[Float32Head, Tensor], Any]
"""Does something with the head's weight and hidden states (N, D), other than all their logits."""


def prepare_head(model: Any) -> None:
    """Make the head of a transformers causal model give float32 logits, in place.

    Raises:
        UserError: the head is not a plain linear layer (a quantised or otherwise unknown one).
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(f"{type(model).__name__}: expected a linear output head, found {type(head).__name__}")
    head.__class__ = Float32Head


def hidden_states(model: Any, input_ids_BT: Tensor, boundaries: Boundaries | None = None) -> Tensor:
    """Last hidden states (B, T, D) of a right-padded batch, or of a packed one with its boundaries.

    No attention mask is passed. In a causal model no token sees what stands to its right, so padding on the
    right reaches no real token, and attention keeps its fast causal path; examples of a packed batch are kept apart
    by `shared.packed_attention`, which the model must have been switched to.
    """
    arguments = {} if boundaries is None else boundaries.model_arguments()
    return model.base_model(input_ids=input_ids_BT, use_cache=False, **arguments).last_hidden_state


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the products of its head before the softmax."""

    factor: float = 1.0
    """Cohere's logit_scale, or one over Granite's logits_scaling."""
    cap: float | None = None
    """Gemma's final_logit_softcapping: logits become cap * tanh(logits / cap)."""

    def apply(self, products_NV: Tensor) -> Tensor:
        """Logits from the head's products."""
        logits_NV = products_NV if self.factor == 1.0 else products_NV * self.factor
        return logits_NV if self.cap is None else (logits_NV / self.cap).tanh() * self.cap

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Derivative of the logits by the products, from the logits."""
        return self.factor if self.cap is None else self.factor * (1.0 - (logits_NV / self.cap).square())


def logit_transform(model: Any) -> LogitTransform:
    """What a transformers causal model does to the products of its head."""
    config = model.config.get_text_config()
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(factor, getattr(config, "final_logit_softcapping", None))


def logits_of_hidden(model: Any, hidden_ND: Tensor) -> Tensor:
    """Float32 logits (N, V) as the model itself would give them: head, scaling and soft-capping."""
    return logit_transform(model).apply(model.get_output_embeddings()(hidden_ND))


@torch.no_grad()
def head_difference(model: Any, input_ids_BT: Tensor) -> Tensor:
    """Largest difference between this module's logits and the model's own, relative to the largest logit.

    An architecture that does something to its logits that `logits_of_hidden` does not know is found by this.
    """
    ours_BTV = logits_of_hidden(model, hidden_states(model, input_ids_BT))
    theirs_BTV = model(input_ids=input_ids_BT, use_cache=False).logits.to(ours_BTV.dtype)
    return (ours_BTV - theirs_BTV).abs().max() / theirs_BTV.abs().max().clamp(min=1.0)


def refuse_unknown_head(model: Any, difference: float) -> None:
    """Refuse a model whose own logits differ from `logits_of_hidden` by more than rounding."""
    if math.isnan(difference):
        raise UserError(f"{type(model).__name__}: its logits are not finite; are its weights whole? Or try float32")
    if not difference < 1e-2:
        raise UserError(
            f"{type(model).__name__}: its logits differ from head, scale and soft-cap by {difference:.3g} "
            "(relative): this architecture changes its logits in a way that is not known here"
        )


def vocab_rows(model: Any) -> int:
    """V: the rows of the softmax, padding of the vocabulary included, as in the training loss."""
    return int(model.config.get_text_config().vocab_size)

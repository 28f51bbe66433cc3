"""The weighted loss, inside the module that DeepSpeed wraps.

Shape suffixes: N targets of the micro-batch, K those of non-zero weight, M those of weight zero that are looked at,
n targets of a chunk, D hidden size, BT tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from shared.head import Float32Head, hidden_states, logit_transform
from shared.padding import TokenBatch
from shared.statistics import token_statistics
from stage2_train.weighted_head import weighted_cross_entropy


@dataclass(frozen=True)
class GivenWeights:
    """Weights that are known before the forward pass: targets of weight zero need not go through the head."""

    weights_K: Tensor
    """float32, those that are not zero."""
    kept_K: Tensor
    """int64, ascending: their targets among the N."""
    watched_M: Tensor
    """int64: targets of weight zero whose nll is wanted all the same. They cost one matrix product of three."""

    def to(self, device: torch.device) -> "GivenWeights":
        """The weights on a device."""
        parts = (self.weights_K, self.kept_K, self.watched_M)
        return GivenWeights(*(tensor.to(device, non_blocking=True) for tensor in parts))

    def of_seen(self, values_N: Tensor) -> Tensor:
        """The values of the targets that go through the head, in the order of the loss."""
        return values_N[torch.cat([self.kept_K, self.watched_M])]


@dataclass(frozen=True)
class OnlineWeights:
    """Weights from the model's own statistics, in the same chunks as the loss."""

    columns: tuple[str, ...]
    weigh: Callable[[dict[str, Tensor], slice], Tensor]
    """From the statistics of a chunk, float32 (n,) each, and its place among the N targets to weights float32 (n,)."""

    def of_seen(self, values_N: Tensor) -> Tensor:
        """The values of the targets that go through the head: all."""
        return values_N


Weights = GivenWeights | OnlineWeights


class WeightedLM(nn.Module):
    """A causal language model that returns the weighted loss of a micro-batch."""

    def __init__(self, model: Any, max_logits_bytes: int, offload_activations: bool = False):
        """
        Args:
            model: a transformers causal model whose head is prepared (`shared.head.prepare_head`).
            max_logits_bytes: no logits tensor is larger, unless a single row is.
            offload_activations: what the backward pass of the layers needs waits in host memory.
        """
        super().__init__()
        self.model = model
        self._max_logits_bytes, self._offload_activations = max_logits_bytes, offload_activations

    def forward(self, tokens: TokenBatch, weights: Weights, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of a micro-batch.

        A micro-batch without targets gives a sum of 0 that still reaches every parameter, so that a rank with
        nothing to add takes part in every collective.

        Args:
            scale: what the sum is multiplied by, such as 1 / targets of the step.

        Returns:
            The sum of scale * weight * nll with its graph; nll in nats and weight of the targets that went through the
            head, detached: with given weights the K kept, then the M watched ones, with online weights all N in order.
        """
        with save_on_cpu(tokens.input_ids_BT.is_cuda) if self._offload_activations else nullcontext():
            hidden_BTD = hidden_states(self.model, tokens.input_ids_BT, tokens.boundaries)
        hidden_rows_D = hidden_BTD.flatten(0, 1)
        head = self.model.get_output_embeddings()
        if isinstance(weights, OnlineWeights):
            task = self._online(tokens.target_ids_N, weights, scale)
            return head(hidden_rows_D[tokens.hidden_rows_N], task)
        watched_MD = hidden_rows_D.detach()[tokens.hidden_rows_N[weights.watched_M]]
        task = self._given(tokens.target_ids_N, weights, watched_MD, scale)
        return head(hidden_rows_D[tokens.hidden_rows_N[weights.kept_K]], task)

    def _given(self, target_ids_N: Tensor, weights: GivenWeights, watched_MD: Tensor, scale: float) -> Callable:
        settings = logit_transform(self.model), self._max_logits_bytes

        def task(head: Float32Head, kept_KD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            kept_ids_K, watched_ids_M = target_ids_N[weights.kept_K], target_ids_N[weights.watched_M]
            total, nll_K, weights_K = weighted_cross_entropy(
                head, kept_KD, kept_ids_K, lambda _, part: weights.weights_K[part], *settings, scale
            )
            zeros_M = weights.weights_K.new_zeros(len(watched_MD))
            with torch.no_grad():
                _, nll_M, _ = weighted_cross_entropy(
                    head, watched_MD, watched_ids_M, lambda _, part: zeros_M[part], *settings
                )
            return total, torch.cat([nll_K, nll_M]), torch.cat([weights_K, zeros_M])

        return task

    def _online(self, target_ids_N: Tensor, weights: OnlineWeights, scale: float) -> Callable:
        def weigh(logits_nV: Tensor, part: slice) -> Tensor:
            return weights.weigh(token_statistics(logits_nV, target_ids_N[part], weights.columns), part)

        def task(head: Float32Head, hidden_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            settings = logit_transform(self.model), self._max_logits_bytes
            return weighted_cross_entropy(head, hidden_ND, target_ids_N, weigh, *settings, scale)

        return task

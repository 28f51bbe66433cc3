"""The weighted loss, inside the module that DeepSpeed wraps.

Shape suffixes: N targets of the micro-batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shared.head import hidden_states, logits_of_hidden
from shared.padding import PaddedBatch
from shared.statistics import token_statistics

Weigh = Callable[[dict[str, Tensor]], Tensor]
"""From the model's own statistics (those asked for) to weights: float32 (N,), detached."""


class WeightedLM(nn.Module):
    """A causal language model that returns the weighted loss of a micro-batch."""

    def __init__(self, model: Any, columns: Sequence[str]):
        """
        Args:
            model: a transformers causal model whose head is prepared (`shared.head.prepare_head`).
            columns: the model's own statistics that are handed to `weigh`; empty where the prior's are used.
        """
        super().__init__()
        self.model, self._columns = model, tuple(columns)

    def forward(self, tokens: PaddedBatch, weigh: Weigh) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of a micro-batch, not normalised.

        A micro-batch without targets gives a sum of 0 that still reaches every parameter, so that a rank with
        nothing to add takes part in every collective.

        Returns:
            The sum of weight * nll with its graph, nll_N in nats and weights_N, the latter two detached float32.
        """
        hidden_ND = hidden_states(self.model, tokens.input_ids_BT).flatten(0, 1)[tokens.hidden_rows_N]
        logits_NV = logits_of_hidden(self.model, hidden_ND)
        nll_N = F.cross_entropy(logits_NV, tokens.target_ids_N, reduction="none")
        weights_N = weigh(token_statistics(logits_NV.detach(), tokens.target_ids_N, self._columns))
        return (weights_N * nll_N).sum(), nll_N.detach(), weights_N

"""Scoring models for vLLM: any of its causal models with a pooler that turns hidden states into statistics.

Imported by vLLM's processes only. Chunked prefill hands a request's hidden states over in several steps; what a step
brings is scored at once and kept in the request's pooling state until its last token was seen.

Shape suffixes: R rows of hidden states of a step, N targets of a step, C statistics, D hidden size, V vocabulary rows
that this rank holds.
"""

from collections.abc import Set
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from shared.head import float32_product
from shared.statistics import VocabShard, statistics_in_chunks
from stage1_score.vllm_plugin import ARCHITECTURES, SETTINGS_KEY, TARGETS_KEY


def __getattr__(name: str) -> type[nn.Module]:
    """The scoring model of an architecture, made when vLLM asks for it by name."""
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = getattr(import_module(f"vllm.model_executor.models.{ARCHITECTURES[name]}"), name)

    def initialise(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        settings = vllm_config.additional_config[SETTINGS_KEY]
        if current_platform.is_cpu():
            _widen_small_heads()
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        if settings["float64_products"]:
            _multiply_in_float64(self)
        self.pooler = StatisticsPooler(self, settings)

    model = type(name, (base,), {"is_pooling_model": True, "__init__": initialise, "__module__": __name__})
    globals()[name] = model
    return model


class StatisticsPooler(Pooler):
    """Hidden states to the statistics of each request's targets: float32 (targets of the request, C)."""

    _model: Any

    def __init__(self, model: nn.Module, settings: dict[str, Any]):
        super().__init__()
        # Past nn.Module's own bookkeeping: the pooler is a child of the model, not its parent.
        object.__setattr__(self, "_model", model)
        self._columns = tuple(settings["columns"])
        self._max_logits_bytes = settings["max_logits_bytes"]
        self._in_float64 = settings["float64_products"]

    def get_supported_tasks(self) -> Set[Any]:
        """Scores are handed out token by token."""
        return {"token_classify"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Target ids are taken from the prompt's own ids."""
        return PoolingParamsUpdate(requires_token_ids=True)

    @torch.inference_mode()
    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Score the targets whose hidden states this step brought.

        Args:
            hidden_states: (R, D), the requests of the step one after the other.

        Returns:
            For each request its statistics, or None while part of it is still to come.
        """
        rows_N, ids_N, counts = targets_of_step(pooling_metadata)
        device = hidden_states.device
        hidden_ND = hidden_states[torch.from_numpy(rows_N).to(device, non_blocking=True)]
        statistics = self._statistics(hidden_ND, torch.from_numpy(ids_N).to(device, non_blocking=True))
        cursor = pooling_metadata.get_pooling_cursor()
        starts = (cursor.seq_lens_cpu == cursor.num_scheduled_tokens_cpu).tolist()
        outputs: list[Tensor | None] = []
        for part, state, starts_anew, is_finished in zip(
            statistics.split(counts), pooling_metadata.pooling_states, starts, cursor.get_finished_mask(), strict=True
        ):
            if starts_anew:  # a request that vLLM put aside and took up again
                state.clean()
            state.hidden_states_cache.append(part)
            outputs.append(torch.cat(state.hidden_states_cache) if is_finished else None)
            if is_finished:
                state.clean()
        return outputs

    def _statistics(self, hidden_ND: Tensor, ids_N: Tensor) -> Tensor:
        """Float32 (N, C), from this rank's rows of the head and sums over the ranks."""
        head = _head_of(self._model)
        indices = head.shard_indices
        # Rows that vLLM pads the vocabulary with lie behind the model's own.
        weight_VD = head.weight[: indices.num_org_elements]
        if self._in_float64:
            weight_VD = weight_VD.double()
        bias = getattr(head, "bias", None)
        bias_V = None if bias is None else bias[: indices.num_org_elements]
        processor = self._model.logits_processor

        def logits_of(hidden: Tensor) -> Tensor:
            logits = float32_product(hidden.to(weight_VD.dtype), weight_VD)
            if bias_V is not None:
                logits = logits + bias_V
            if processor.soft_cap is not None:
                logits = (logits / processor.soft_cap).tanh() * processor.soft_cap
            return logits if processor.scale == 1.0 else logits * processor.scale

        columns = statistics_in_chunks(
            # The width of a full slice on every rank: all must cut the same chunks.
            hidden_ND, ids_N, self._columns, logits_of, head.num_embeddings_per_partition, self._max_logits_bytes,
            shard=_vocab_shard(indices.org_vocab_start_index),
        )  # fmt: skip
        return torch.stack([columns[name].float() for name in self._columns], dim=1)


def targets_of_step(metadata: Any) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The targets that a step can score.

    The hidden state of position i speaks of token i + 1; a step brings the positions [seen - scheduled, seen) of each
    request. Requests without target positions, with which vLLM measures memory at its start, count every row.

    Returns:
        Rows of the step's hidden states and the token ids that they predict, int64 (N,) each, and the number of
        targets of each request.
    """
    cursor = metadata.get_pooling_cursor()
    all_ids = metadata.get_prompt_token_ids_cpu()
    first_row = 0
    rows, ids, counts = [], [], []
    for params, seen, scheduled, prompt_ids in zip(
        metadata.pooling_params, cursor.seq_lens_cpu.tolist(), cursor.num_scheduled_tokens_cpu.tolist(), all_ids,
        strict=True,
    ):  # fmt: skip
        start = seen - scheduled
        packed = (params.extra_kwargs or {}).get(TARGETS_KEY)
        if packed is None:
            rows.append(np.arange(first_row, first_row + scheduled))
            ids.append(np.zeros(scheduled, np.int64))
        else:
            positions = np.frombuffer(packed, np.int32)
            low, high = np.searchsorted(positions, [start + 1, seen + 1])
            positions = positions[low:high].astype(np.int64)
            rows.append(first_row + positions - 1 - start)
            ids.append(prompt_ids.numpy()[positions].astype(np.int64))
        counts.append(len(rows[-1]))
        first_row += scheduled
    return np.concatenate(rows), np.concatenate(ids), counts


def _head_of(model: Any) -> Any:
    # Gemma 2 has no head of its own.
    head = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
    if not isinstance(head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        raise ValueError(f"expected an output head that is not quantised, found {type(head.quant_method).__name__}")
    return head


def _vocab_shard(start: int) -> VocabShard | None:
    size = get_tensor_model_parallel_world_size()
    if size == 1:
        return None
    group = get_tp_group().device_group

    def reduced(operation: Any) -> Any:
        def reduce(values: Tensor) -> Tensor:
            torch.distributed.all_reduce(values, op=operation, group=group)
            return values

        return reduce

    operations = torch.distributed.ReduceOp
    return VocabShard(
        start=start, rank=get_tensor_model_parallel_rank(), size=size, all_max=reduced(operations.MAX),
        all_sum=reduced(operations.SUM),
    )  # fmt: skip


class Float64Products(UnquantizedLinearMethod):
    """Matrix products accumulated and kept in float64 up to their last rounding to float32."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Widen the weights once."""
        layer.weight64 = layer.weight.double()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., D) to (..., outputs), in the dtype of `x`."""
        wide_bias = None if bias is None else bias.double()
        return functional.linear(x.double(), layer.weight64, wide_bias).to(x.dtype)


def _multiply_in_float64(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, LinearBase):
            if type(module.quant_method) is not UnquantizedLinearMethod:
                raise ValueError("prior.compute_dtype=float64_products: the model is quantised; use weights")
            module.quant_method = Float64Products()


def _widen_small_heads() -> None:
    """Let vLLM's attention on a CPU take heads of any size, zeros added up to the next size that it knows.

    Zeros add nothing to a dot product, and the scale is given by the model, so the numbers are the same.
    """
    attention: Any = Attention
    if getattr(attention, "widens_small_heads", False):
        return
    initialise, forward = attention.__init__, attention.forward

    def widened_initialise(self: Any, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        widened = min(size for size in CPUAttentionBackend.get_supported_head_sizes() if size >= head_size)
        initialise(self, num_heads, widened, *args, **kwargs)
        self.own_head_size, self.added_zeros = head_size, widened - head_size

    def widened_forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.added_zeros:
            return forward(self, query, key, value, *args, **kwargs)
        wide = [
            functional.pad(heads.unflatten(-1, (-1, self.own_head_size)), (0, self.added_zeros)).flatten(-2)
            for heads in (query, key, value)
        ]
        out = forward(self, *wide, *args, **kwargs)
        return out.unflatten(-1, (-1, self.head_size))[..., : self.own_head_size].flatten(-2)

    attention.__init__, attention.forward = widened_initialise, widened_forward
    attention.widens_small_heads = True

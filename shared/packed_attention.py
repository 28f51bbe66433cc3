"""Attention over examples laid end to end in one row, none of which sees another: no padding, no T x T mask.

Left to itself, transformers takes the boundaries from the position ids, and where a mask or a cache is given it
silently takes none: every example then sees those before it. This attention is told the boundaries and refuses to
run without them.

Shape suffixes: T tokens of all examples, H heads, K heads of keys and values, D head size, E examples.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from shared.errors import first_line
from shared.pretrained import rope_type_of

ATTENTION_NAME = "prift_packed"

PACKABLE_MODEL_TYPES = frozenset({
    "gemma", "gemma3_text", "granite", "llama", "ministral", "mistral", "mixtral", "olmo2", "olmo3", "phi3", "qwen2",
    "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
"""Models in which tokens meet in the attention alone, each with a test. Not Gemma 2 or GPT-OSS, whose attention does
more than softmax(q k) v, nor models with convolutions or linear attention, which know no boundaries."""

_LARGEST_KERNEL_ERROR = 0.05
"""Of averages of normal numbers. Rounding to bfloat16 changes them by 0.01, a token too many some of them by 2."""


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example, in the form that transformers calls; differentiable.

    Args:
        query: (1, H, T, D).
        key, value: (1, K, T, D).
        sliding_window: tokens that a token of this layer sees, itself included. None: all before it.
        cu_seq_lens_q: int32 (E + 1,), from 0 to T: where the examples begin and end.
        max_length_q: tokens of the longest.

    Returns:
        (1, T, H, D), and no attention weights.

    Raises:
        ValueError: no boundaries, or a mask, several rows or dropout.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{ATTENTION_NAME}: expected cu_seq_lens_q and max_length_q of a packed batch, got none")
    if attention_mask is not None or len(query) != 1 or dropout:
        found = f"{'no mask' if attention_mask is None else 'a mask'}, {len(query)} rows and dropout {dropout}"
        raise ValueError(f"{ATTENTION_NAME}: expected no mask, one row and no dropout, got {found}")
    if sliding_window is not None and sliding_window >= max_length_q:
        sliding_window = None
    attend = _by_kernel if _runs_kernel(query.device) else _by_example
    tensors = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output_THD = attend(*tensors, starts=cu_seq_lens_q, longest=max_length_q, scale=scaling, window=sliding_window)
    return output_THD[None], None


def use_packed_attention(model: Any) -> None:
    """Make a transformers model run on packed batches only, in place; see `packing_obstacle`."""
    from transformers import AttentionInterface

    # No mask function is registered under the name, so transformers builds no mask either.
    AttentionInterface.register(ATTENTION_NAME, packed_attention)
    model.set_attn_implementation(ATTENTION_NAME)
    assert model.config._attn_implementation == ATTENTION_NAME


def packing_obstacle(model: Any, with_gradient: bool = False) -> str | None:
    """Why a transformers model, on the device where it is, cannot run packed; None where it can.

    On CUDA the kernel is tried out once: which head sizes, dtypes and GPUs it serves differs between versions of torch.

    Args:
        with_gradient: whether it is to be trained; the kernel's backward pass is tried out too.
    """
    if not type(model).__module__.startswith("transformers.models."):
        return f"{type(model).__name__} is not one of transformers' own models"
    config = model.config
    if config.model_type not in PACKABLE_MODEL_TYPES:
        return f"models of type {config.model_type} are not known to keep packed rows apart"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if rope_type_of(config.to_dict()) in ("dynamic", "longrope"):
        return "its rotary frequencies depend on the longest row of a batch"
    return _kernel_obstacle(model, with_gradient) if _runs_kernel(model.device) else None


def _runs_kernel(device: torch.device) -> bool:
    return device.type == "cuda"


def _by_kernel(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, starts: Tensor, longest: int, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention (T, H, D) by torch's variable-length kernel: one call, no copy of anything to the host."""
    known, options = inspect.signature(varlen_attn).parameters, {}
    if "num_splits" in known:
        # One split: the numbers of an example do not depend on what else is in the row.
        options["num_splits"] = 1
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        repeats = query_THD.shape[1] // key_TKD.shape[1]
        key_TKD, value_TKD = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key_TKD, value_TKD))
    # The kernel counts the tokens to the left, without the token itself; -1 is all of them.
    left = -1 if window is None else window - 1
    return varlen_attn(
        query_THD, key_TKD, value_TKD, starts, starts, longest, longest,
        scale=scale, window_size=(left, 0), **options,
    )  # fmt: skip  # pyright: ignore[reportReturnType]


def _by_example(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, starts: Tensor, longest: int, scale: float | None = None,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention (T, H, D) by a call for each example: any device, any dtype."""
    lengths = starts.diff().tolist()
    outputs = []
    for parts in zip(*(tensor.split(lengths) for tensor in (query_THD, key_TKD, value_TKD)), strict=True):
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        mask = None if window is None else _band(len(parts[0]), window, query.device)
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


def _band(length: int, window: int, device: torch.device) -> Tensor | None:
    """bool (length, length): which tokens each sees; None where that is all before it."""
    if length <= window:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)


def _kernel_obstacle(model: Any, with_gradient: bool) -> str | None:
    """Why the kernel does not serve a model's heads, dtype and device, found by comparing it with float32."""
    missing = {"scale", "window_size"} - inspect.signature(varlen_attn).parameters.keys()
    if missing:
        return f"varlen_attn of torch {torch.__version__} takes no {' and no '.join(sorted(missing))}"
    config = model.config
    num_heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    starts = torch.tensor([0, 5, 6, 40], dtype=torch.int32, device=model.device)
    heads = (num_heads, config.num_key_value_heads, config.num_key_value_heads)
    generator = torch.Generator().manual_seed(0)
    sample = [torch.randn(40, count, head_size, generator=generator).to(model.device, model.dtype) for count in heads]
    for window in (None, 3):
        options = {"starts": starts, "longest": 34, "window": window}
        try:
            found = _with_gradients(_by_kernel, sample, options, with_gradient)
        except RuntimeError as error:
            return f"varlen_attn of torch {torch.__version__} does not run here on {model.dtype}: {first_line(error)}"
        expected = _with_gradients(_by_example, [tensor.float() for tensor in sample], options, with_gradient)
        for name, ours, theirs in zip(("output", "gradient", "gradient", "gradient"), found, expected, strict=False):
            difference = float((ours.float() - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
            if not difference < _LARGEST_KERNEL_ERROR:
                return f"varlen_attn of torch {torch.__version__} is off by {difference:.3g} here ({name}, {window=})"
    return None


def _with_gradients(
    attend: Callable[..., Tensor], sample: list[Tensor], options: dict[str, Any], wanted: bool
) -> list[Tensor]:
    """An attention's output, and where wanted the gradients by query, key and value of the sum of its squares."""
    if not wanted:
        return [attend(*sample, **options)]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in sample]
        output = attend(*leaves, **options)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)]

"""Packed attention: the numbers of padded rows, whoever stands beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import shared.packed_attention as attention_module
from shared.head import hidden_states, logits_of_hidden, prepare_head, vocab_rows
from shared.packed_attention import (
    ATTENTION_NAME,
    PACKABLE_MODEL_TYPES,
    packed_attention,
    packing_obstacle,
    use_packed_attention,
)
from shared.padding import Boundaries, TokenBatch, pack_and_shift, pad_and_shift
from shared.statistics import statistics_in_chunks

COLUMNS = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
WINDOW = 6
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma3_text": ALTERNATING,
    "granite": {},
    "llama": {},
    "ministral": ALTERNATING,
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"sliding_window": WINDOW, "num_local_experts": 4},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3_moe": {
        "use_sliding_window": True, "sliding_window": WINDOW, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "seed_oss": {},
    "smollm3": {"use_sliding_window": True, **ALTERNATING},
    "starcoder2": {"sliding_window": WINDOW},
}  # fmt: skip
"""Every allowed model type; windows are shorter than the rows."""


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    target_positions: np.ndarray


def random_rows(lengths: tuple[int, ...] = (17, 2, 9, 23)) -> list[Row]:
    generator = np.random.default_rng(0)
    return [Row(generator.integers(1, 200, n).astype(np.int32), np.arange(1, n, dtype=np.int32)) for n in lengths]


def tiny_model(model_type: str, **fields: Any) -> Any:
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
            # Large enough that attention is far from even: else a wrong mask would hardly show.
            "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **fields,
        },
    )  # fmt: skip
    config._experts_implementation = "eager"  # The default one knows no float64.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prepare_head(model)
    return model


def target_hidden(model: Any, batch: TokenBatch) -> Tensor:
    return hidden_states(model, batch.input_ids_BT, batch.boundaries).flatten(0, 1)[batch.hidden_rows_N]


def statistics_of(model: Any, hidden_ND: Tensor, batch: TokenBatch) -> Tensor:
    statistics = statistics_in_chunks(
        hidden_ND,
        batch.target_ids_N,
        COLUMNS,
        lambda hidden: logits_of_hidden(model, hidden),
        vocab_rows(model),
        1 << 20,
    )
    return torch.stack([statistics[column] for column in COLUMNS])


def kernel_stand_in(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None, window: Any
) -> Tensor:
    """What torch documents of `varlen_attn`, as one T x T mask: query i sees keys from i - left to i + right."""
    assert starts.dtype == torch.int32
    assert query.shape[1] == key.shape[1] == value.shape[1]
    place = torch.arange(len(query))
    example = torch.bucketize(place, starts, right=True)
    left, right = (len(query) if side == -1 else side for side in window)
    ahead = place[None] - place[:, None]
    seen = (example[:, None] == example) & (ahead <= right) & (ahead >= -left)
    scores = torch.einsum("ihd,jhd->hij", query, key) * (scale or query.shape[-1] ** -0.5)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, value)


def recent_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: Any = (-1, -1), enable_gqa: bool = False, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """The arguments of torch 2.13."""
    assert enable_gqa
    assert num_splits == 1
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k == int(cu_seq_q.diff().max())
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return kernel_stand_in(query, key, value, cu_seq_q, scale, window_size)


def older_kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: Any = (-1, -1),
) -> Tensor:  # fmt: skip
    """Without the arguments that came later."""
    return kernel_stand_in(query, key, value, cu_seq_q, scale, window_size)


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any] | None], None]:
    """Take the way of a GPU with a stand-in for its kernel; None keeps the way of a CPU."""

    def install(kernel: Callable[..., Any] | None) -> None:
        if kernel is not None:
            monkeypatch.setattr(attention_module, "varlen_attn", kernel)
            monkeypatch.setattr(attention_module, "_runs_kernel", lambda device: True)

    return install


def test_every_allowed_model_type_is_tested():
    assert FAMILIES.keys() == PACKABLE_MODEL_TYPES


@pytest.mark.parametrize("kernel", [None, recent_kernel, older_kernel])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_equals_padded(model_type: str, kernel: Callable[..., Any] | None, with_kernel):
    model, rows = tiny_model(model_type, **FAMILIES[model_type]).double(), random_rows()
    padded, packed = pad_and_shift(rows), pack_and_shift(rows)
    with torch.no_grad():
        expected = target_hidden(model, padded)
        with_kernel(kernel)
        assert packing_obstacle(model) is None
        use_packed_attention(model)
        found = target_hidden(model, packed)
        # RMSNorm computes in float32 even here, so a last bit may become one of float32.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if kernel is None else 2e-6)
        expected, found = statistics_of(model, expected, padded), statistics_of(model, found, packed)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        # The comparison is worth something: as a single example the same tokens give other numbers.
        num_tokens = packed.input_ids_BT.shape[1]
        joined = Boundaries(
            packed.boundaries.position_ids_BT, torch.tensor([0, num_tokens], dtype=torch.int32), num_tokens
        )
        leaking = hidden_states(model, packed.input_ids_BT, joined).flatten(0, 1)[packed.hidden_rows_N]
        assert (statistics_of(model, leaking, packed) - expected).abs().max() > 0.1


@pytest.mark.parametrize("model_type", [name for name, fields in FAMILIES.items() if "sliding_window" in fields])
def test_the_window_is_that_of_the_layer(model_type: str):
    """One layer with a window, one row: a token that is out of the window changes nothing."""
    fields = {**FAMILIES[model_type], "num_hidden_layers": 1}
    if "layer_types" in fields:
        fields["layer_types"] = ["sliding_attention"]
    if "max_window_layers" in fields:
        fields["max_window_layers"] = 0
    model = tiny_model(model_type, **fields).double()
    use_packed_attention(model)
    batch = pack_and_shift(random_rows((20,)))
    changed_ids = batch.input_ids_BT.clone()
    changed_ids[0, 3] += 1
    with torch.no_grad():
        before = hidden_states(model, batch.input_ids_BT, batch.boundaries)[0]
        after = hidden_states(model, changed_ids, batch.boundaries)[0]
    changed = (before != after).any(-1).nonzero()[:, 0].tolist()
    assert changed == list(range(3, 3 + WINDOW))


@pytest.mark.parametrize("kernel", [None, recent_kernel])
@pytest.mark.parametrize("longest", [WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2])
def test_a_window_about_as_long_as_the_longest_example(longest: int, kernel: Callable[..., Any] | None, with_kernel):
    model, rows = tiny_model("mistral", sliding_window=WINDOW).double(), random_rows((longest, 3))
    with_kernel(kernel)
    with torch.no_grad():
        expected = target_hidden(model, pad_and_shift(rows))
        use_packed_attention(model)
        torch.testing.assert_close(target_hidden(model, pack_and_shift(rows)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_bfloat16_errs_no_more_than_padded(model_type: str):
    rows = random_rows()
    padded, packed = pad_and_shift(rows), pack_and_shift(rows)
    exact_model, model = (tiny_model(model_type, **FAMILIES[model_type]) for _ in range(2))
    model = model.bfloat16()
    exact_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = statistics_of(exact_model.double(), target_hidden(exact_model, padded), padded)
        naive = statistics_of(model, target_hidden(model, padded), padded)
        use_packed_attention(model)
        found = statistics_of(model, target_hidden(model, packed), packed)
    assert (found - exact).abs().mean() <= 1.1 * (naive - exact).abs().mean() + 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_gradients_are_those_of_the_examples_alone(model_type: str, checkpointing: bool):
    rows = random_rows((9, 3, 14))
    packed_model, model = (tiny_model(model_type, **FAMILIES[model_type]).double().train() for _ in range(2))
    use_packed_attention(packed_model)
    if checkpointing:
        packed_model.gradient_checkpointing_enable()
    for row in rows:
        target_hidden(model, pad_and_shift([row])).square().sum().backward()
    target_hidden(packed_model, pack_and_shift(rows)).square().sum().backward()
    expected = dict(model.named_parameters())
    for name, parameter in packed_model.named_parameters():
        if (gradient := expected[name].grad) is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_run_without_boundaries_is_refused(use_cache: bool):
    model = tiny_model("llama")
    use_packed_attention(model)
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected cu_seq_lens_q and max_length_q of a packed batch"):
        model(input_ids=ids, use_cache=use_cache)
    with pytest.raises(ValueError, match="expected cu_seq_lens_q and max_length_q of a packed batch"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=use_cache)


def test_masks_rows_and_dropout_are_refused():
    query = torch.randn(1, 2, 5, 8)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    boundaries = {"cu_seq_lens_q": starts, "max_length_q": 3}
    output, weights = packed_attention(None, query, query, query, None, **boundaries)
    assert output.shape == (1, 5, 2, 8)
    assert weights is None
    with pytest.raises(ValueError, match="got a mask, 1 rows"):
        packed_attention(None, query, query, query, torch.ones(1, 1, 5, 5), **boundaries)
    with pytest.raises(ValueError, match="got no mask, 2 rows"):
        packed_attention(None, *[query.expand(2, -1, -1, -1)] * 3, None, **boundaries)
    with pytest.raises(ValueError, match=r"and dropout 0\.1"):
        packed_attention(None, query, query, query, None, dropout=0.1, **boundaries)


def test_the_attention_stays_out_of_saved_configs():
    model = tiny_model("llama")
    use_packed_attention(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    assert ATTENTION_NAME not in model.config.to_json_string(use_diff=False)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gemma2", {}, "models of type gemma2 are not known to keep packed rows apart"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "models of type lfm2 are not known"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "its attention is not causal"),
    ],
)
def test_other_models_are_not_packed(model_type: str, fields: dict[str, Any], reason: str):
    obstacle = packing_obstacle(tiny_model(model_type, **fields))
    assert obstacle is not None
    assert reason in obstacle


def test_code_that_comes_with_a_model_is_not_packed():
    from transformers import LlamaConfig, LlamaForCausalLM

    class Foreign(LlamaForCausalLM):
        """Calls itself a Llama, and may do anything."""

    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 9,
    }
    assert packing_obstacle(Foreign(LlamaConfig(**sizes))) == "Foreign is not one of transformers' own models"


def test_a_kernel_that_does_not_run_is_an_obstacle(with_kernel):
    def unwilling(*arguments: Any, scale: Any, window_size: Any) -> Tensor:
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore lines")

    with_kernel(unwilling)
    obstacle = packing_obstacle(tiny_model("llama"))
    assert obstacle is not None
    assert obstacle.endswith("does not run here on torch.float32: FlashAttention only supports Ampere GPUs or newer.")


def test_a_kernel_without_windows_is_an_obstacle(with_kernel):
    with_kernel(lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query)
    obstacle = packing_obstacle(tiny_model("llama"))
    assert obstacle == f"varlen_attn of torch {torch.__version__} takes no scale and no window_size"


@pytest.mark.parametrize(
    ("shift", "window"),
    [((0, 1), "None"), ((1, 0), "3"), ((-1, 0), "3")],
)
def test_a_kernel_that_sees_other_tokens_is_an_obstacle(with_kernel, shift: tuple[int, int], window: str):
    def wrong(*arguments: Any, scale: Any, window_size: Any) -> Tensor:
        left = window_size[0] if window_size[0] == -1 else window_size[0] + shift[0]
        return older_kernel(*arguments, scale=scale, window_size=(left, window_size[1] + shift[1]))

    with_kernel(wrong)
    obstacle = packing_obstacle(tiny_model("llama").bfloat16())
    assert obstacle is not None
    assert obstacle.endswith(f"here (output, window={window})")


class _WrongBackward(torch.autograd.Function):
    """A kernel that is right forward, and backward forgets the query's gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(gradients[0]), gradients[0] * 1.5


def test_a_kernel_with_wrong_gradients_is_an_obstacle_to_training(with_kernel):
    def wrong(query: Tensor, *arguments: Any, scale: Any, window_size: Any) -> Tensor:
        return _WrongBackward.apply(query, older_kernel(query, *arguments, scale=scale, window_size=window_size))

    with_kernel(wrong)
    model = tiny_model("llama").bfloat16()
    assert packing_obstacle(model) is None
    obstacle = packing_obstacle(model, with_gradient=True)
    assert obstacle is not None
    assert obstacle.endswith("here (gradient, window=None)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kernel_that_only_rounds_is_no_obstacle(with_kernel, dtype: torch.dtype):
    with_kernel(older_kernel)
    for head_dim in (8, 64, 256):
        model = tiny_model("llama", head_dim=head_dim, num_key_value_heads=1).to(dtype)
        assert packing_obstacle(model, with_gradient=True) is None

"""The head: float32 logits from operands of any dtype, as the model itself would give them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from shared.errors import UserError
from shared.head import (
    Float32Head,
    head_difference,
    hidden_states,
    logits_of_hidden,
    prepare_head,
    refuse_unknown_head,
    vocab_rows,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "plain": (LlamaConfig, LlamaForCausalLM, {}),
    "tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "bias": (PhiConfig, PhiForCausalLM, {}),
    "scale": (CohereConfig, CohereForCausalLM, {"logit_scale": 3.0}),
    "divisor": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}),
    # A low cap, so that leaving it out shows on small logits.
    "soft-cap": (Gemma2Config, Gemma2ForCausalLM, {"final_logit_softcapping": 0.5, "head_dim": 8}),
}


def model_of(kind: str) -> PreTrainedModel:
    config, architecture, extra = MODELS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = architecture(config(**SIZES, **extra)).eval()
        head = model.get_output_embeddings()
        nn.init.normal_(head.weight, std=0.5)
        if head.bias is not None:
            nn.init.normal_(head.bias)
    return model


IDS = torch.arange(24).reshape(2, 12) % 40


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_model(kind: str):
    model = model_of(kind)
    theirs = model(input_ids=IDS).logits
    prepare_head(model)
    ours = logits_of_hidden(model, hidden_states(model, IDS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    refuse_unknown_head(model, float(head_difference(model, IDS)))


def test_a_head_that_does_something_unknown_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = model_of("plain")
    prepare_head(model)
    theirs = type(model).forward

    def doubled(self: Any, **arguments: Any) -> Any:
        output = theirs(self, **arguments)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UserError, match="LlamaForCausalLM: its logits differ"):
        refuse_unknown_head(model, float(head_difference(model, IDS)))
    with pytest.raises(UserError):
        refuse_unknown_head(model, float("nan"))


def test_bfloat16_operands_give_unrounded_float32_logits():
    model = model_of("plain").to(torch.bfloat16)
    weight = model.get_output_embeddings().weight
    rows = torch.randn(50, 16).bfloat16()
    exact = rows.double() @ weight.double().t()
    naive_error = ((rows @ weight.t()).double() - exact).abs().max()
    prepare_head(model)
    ours = logits_of_hidden(model, rows)
    assert ours.dtype == torch.float32
    # The products of bfloat16 numbers are exact in float32; only the sum rounds.
    assert (ours.double() - exact).abs().max() < 1e-6 * exact.abs().max()
    assert naive_error > 1e-3  # what rounding the logits would have cost: the test can tell


def test_float64_stays_float64():
    model = model_of("bias").double()
    prepare_head(model)
    rows = torch.randn(3, 16, dtype=torch.float64)
    head = model.get_output_embeddings()
    torch.testing.assert_close(logits_of_hidden(model, rows), rows @ head.weight.t() + head.bias, rtol=0, atol=1e-15)


def test_gradients_of_a_bfloat16_head():
    head = nn.Linear(8, 30, bias=True).bfloat16()
    exact = nn.Linear(8, 30, bias=True).double()
    exact.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    rows = torch.randn(6, 8).bfloat16().requires_grad_()
    rows64 = rows.detach().double().requires_grad_()
    head.__class__ = Float32Head
    targets = torch.arange(6)
    nn.functional.cross_entropy(head(rows), targets).backward()
    nn.functional.cross_entropy(exact(rows64), targets).backward()
    for ours, theirs in [(rows, rows64), (head.weight, exact.weight), (head.bias, exact.bias)]:
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        largest = theirs.grad.abs().max()
        assert (ours.grad.double() - theirs.grad).abs().max() < 0.02 * largest


def test_leading_shapes_are_kept():
    head = nn.Linear(8, 30, bias=False)
    expected = head(torch.ones(2, 5, 8))
    head.__class__ = Float32Head
    torch.testing.assert_close(head(torch.ones(2, 5, 8)), expected)


def test_a_tied_weight_stays_tied():
    model = model_of("tied")
    prepare_head(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_head_that_is_not_a_linear_layer_is_refused():
    class Quantised(nn.Linear):
        pass

    model = model_of("plain")
    model.set_output_embeddings(Quantised(16, 40))
    with pytest.raises(UserError, match="expected a linear output head, found Quantised"):
        prepare_head(model)


@torch.no_grad()
def test_padding_on_the_right_reaches_no_real_token():
    model = model_of("plain").double()
    padded = torch.cat([IDS, torch.zeros(2, 30, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(hidden_states(model, padded)[:, :12], hidden_states(model, IDS), rtol=0, atol=1e-14)


def test_vocab_rows_counts_padded_rows():
    assert vocab_rows(model_of("plain")) == 40

"""How micro-batches are laid out for a model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.config import TrainConfig
from shared.errors import UserError
from shared.packed_attention import ATTENTION_NAME
from stage2_train.batch import BatchForm
from stage2_train.distributed import World
from stage2_train.engine import choose_form

WORLD = World(0, 1, torch.device("cpu"))


def packable() -> LlamaForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3))


def unpackable() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1))


def test_packed_where_the_model_allows_it():
    for padding_free in ("auto", True):
        model = packable()
        assert choose_form(model, TrainConfig(padding_free=padding_free), WORLD) == BatchForm(packed=True)
        assert model.config._attn_implementation == ATTENTION_NAME
    model = packable()
    assert choose_form(model, TrainConfig(padding_free=False), WORLD) == BatchForm()
    assert model.config._attn_implementation != ATTENTION_NAME
    assert choose_form(unpackable(), TrainConfig(), WORLD) == BatchForm()


def test_what_cannot_be_packed_is_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"models of type gpt2 are not known .* train.padding_free=false"):
        choose_form(unpackable(), TrainConfig(padding_free=True), WORLD)
    with pytest.raises(UserError, match=r"models of type gpt2 are not known .* train.sequence_parallel=1"):
        choose_form(unpackable(), TrainConfig(sequence_parallel=2), WORLD)


def test_heads_that_ranks_cannot_share_are_refused():
    with pytest.raises(UserError, match=r"train.sequence_parallel=2: 2 ranks cannot share 3 attention heads evenly"):
        choose_form(packable(), TrainConfig(sequence_parallel=2), WORLD)

"""The weighted loss of one micro-batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shared.head import prepare_head
from shared.padding import PaddedBatch
from stage2_train.batch import make_batch
from stage2_train.cache import open_cache
from stage2_train.loss import WeightedLM


def tiny_model(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **config
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_models_own_logits(scored_store: Path, tmp_path: Path, tied: bool):
    cache = open_cache(scored_store, (), tmp_path)
    batch = make_batch(cache, np.arange(8), (0, 3, 5), (), torch.device("cpu"))
    weights_N = torch.rand(batch.num_targets) * (torch.rand(batch.num_targets) > 0.4)
    ours, theirs = tiny_model(tie_word_embeddings=tied), tiny_model(tie_word_embeddings=tied)
    prepare_head(ours)
    loss, nll_N, returned_N = WeightedLM(ours, ())(batch.tokens, lambda online: weights_N)
    (loss * 3.0).backward()
    logits = theirs(batch.tokens.input_ids_BT).logits.flatten(0, 1)[batch.tokens.hidden_rows_N]
    expected_N = F.cross_entropy(logits, batch.tokens.target_ids_N, reduction="none")
    (3.0 * (weights_N * expected_N).sum()).backward()
    torch.testing.assert_close(nll_N, expected_N.detach())
    assert returned_N is weights_N
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_online_statistics_reach_the_weights(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    batch = make_batch(cache, np.arange(8), (1, 2), (), torch.device("cpu"))
    model = tiny_model()
    prepare_head(model)
    seen = {}

    def weigh(online: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.update(online)
        return online["logprob"].exp()

    loss, nll_N, weights_N = WeightedLM(model, ("logprob", "mass_rank"))(batch.tokens, weigh)
    torch.testing.assert_close(seen["logprob"], -nll_N)
    torch.testing.assert_close(loss.detach(), (nll_N * (-nll_N).exp()).sum())
    assert not weights_N.requires_grad


def test_no_target_gives_zero_with_a_gradient_for_every_parameter():
    model = tiny_model()
    prepare_head(model)
    empty = torch.zeros(0, dtype=torch.int64)
    tokens = PaddedBatch(torch.ones(1, 5, dtype=torch.int64), empty, empty)
    loss, _, _ = WeightedLM(model, ())(tokens, lambda online: torch.zeros(0))
    loss.backward()
    assert float(loss) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()

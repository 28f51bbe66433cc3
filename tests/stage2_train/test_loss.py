"""The weighted loss of one micro-batch."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shared.head import prepare_head
from shared.packed_attention import use_packed_attention
from shared.padding import PaddedBatch
from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import open_cache
from stage2_train.loss import GivenWeights, OnlineWeights, WeightedLM


def tiny_model(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **config
        )
    )  # fmt: skip


def given(weights_N: torch.Tensor, watched: list[int] | None = None) -> GivenWeights:
    kept_K = weights_N.nonzero()[:, 0]
    return GivenWeights(weights_N[kept_K], kept_K, torch.tensor(watched or [], dtype=torch.int64))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradients_equal_the_models_own_logits(scored_store: Path, tmp_path: Path, tied: bool, packed: bool):
    """Targets of weight zero do not go through the head, but for those that are watched."""
    cache = open_cache(scored_store, (), tmp_path)
    padded, batch = (make_batch(cache, np.arange(8), (0, 3, 5), (), BatchForm(form)) for form in (False, packed))
    random = torch.Generator().manual_seed(0)
    weights_N = torch.rand(batch.num_targets, generator=random)
    weights_N *= torch.rand(batch.num_targets, generator=random) > 0.4
    weights = given(weights_N, (weights_N == 0).nonzero()[::3, 0].tolist())
    ours, theirs = tiny_model(tie_word_embeddings=tied), tiny_model(tie_word_embeddings=tied)
    prepare_head(ours)
    if packed:
        use_packed_attention(ours)
    loss, nll, returned = WeightedLM(ours, 1 << 16)(batch.tokens, weights)
    (loss * 3.0).backward()
    logits = theirs(padded.tokens.input_ids_BT).logits.flatten(0, 1)[padded.tokens.hidden_rows_N]
    expected_N = F.cross_entropy(logits, padded.tokens.target_ids_N, reduction="none")
    (3.0 * (weights_N * expected_N).sum()).backward()
    assert 0 < len(weights.watched_M) < int((weights_N == 0).sum())
    torch.testing.assert_close(nll, weights.of_seen(expected_N.detach()))
    assert torch.equal(returned, weights.of_seen(weights_N))
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad - other.grad).norm() < 1e-5 * other.grad.norm(), name


def test_online_statistics_reach_the_weights(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    batch = make_batch(cache, np.arange(8), (1, 2), ())
    model = tiny_model()
    prepare_head(model)
    seen = []

    def weigh(online: dict[str, torch.Tensor], part: slice) -> torch.Tensor:
        seen.append((online["logprob"], part))
        return online["logprob"].exp()

    chunk_bytes = 7 * 2000 * 4
    loss, nll_N, weights_N = WeightedLM(model, chunk_bytes)(batch.tokens, OnlineWeights(("logprob",), weigh))
    torch.testing.assert_close(torch.cat([logprob for logprob, _ in seen]), -nll_N)
    assert [part.start for _, part in seen] == list(range(0, batch.num_targets, 7))
    torch.testing.assert_close(loss.detach(), (nll_N * (-nll_N).exp()).sum())
    assert not weights_N.requires_grad


@pytest.mark.parametrize("offload", [False, True])
def test_activation_checkpointing_changes_nothing(scored_store: Path, tmp_path: Path, offload: bool):
    """Packed, so that the boundaries must reach the recomputation too. Offloaded, only inputs of layers wait."""
    cache = open_cache(scored_store, (), tmp_path)
    batch = make_batch(cache, np.arange(8), (1, 2, 6), (), BatchForm(packed=True))
    weights = given(torch.rand(batch.num_targets))
    gradients, num_kept = [], []
    for checkpointing in (False, True):
        model = tiny_model()
        prepare_head(model)
        use_packed_attention(model)
        if checkpointing:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            loss, _, _ = WeightedLM(model, 1 << 20, offload and checkpointing)(batch.tokens, weights)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        num_kept.append(len(kept))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    # Of what stays on the device: without offloading the inputs of the layers, with it what the head needs.
    assert num_kept[1] < num_kept[0] / 5
    assert not offload or num_kept[1] <= 3


@pytest.mark.parametrize("online", [False, True])
def test_no_target_gives_zero_with_a_gradient_for_every_parameter(online: bool):
    model = tiny_model()
    prepare_head(model)
    empty = torch.zeros(0, dtype=torch.int64)
    tokens = PaddedBatch(torch.ones(1, 5, dtype=torch.int64), empty, empty)
    weights = OnlineWeights(("logprob",), lambda online, _: online["logprob"]) if online else given(torch.zeros(0))
    loss, _, _ = WeightedLM(model, 1 << 20)(tokens, weights)
    loss.backward()
    assert float(loss.detach()) == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any()

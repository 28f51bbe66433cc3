"""Tensors of a micro-batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stage2_train.batch import BatchForm, make_batch
from stage2_train.cache import open_cache

FORMS = [BatchForm(), BatchForm(packed=True)]


@pytest.mark.parametrize("form", FORMS)
def test_statistics_stand_beside_their_tokens(scored_store: Path, tmp_path: Path, form: BatchForm):
    cache = open_cache(scored_store, ("logprob",), tmp_path)
    rows = np.array([9, 2, 17, 4])
    batch = make_batch(cache, rows, (3, 0), (), form)
    members = [cache.row(4), cache.row(9)]
    ids = np.concatenate([member.input_ids[member.target_positions] for member in members])
    assert batch.tokens.target_ids_N.tolist() == ids.tolist()
    assert batch.prior["logprob"].tolist() == np.concatenate([m.statistics["logprob"] for m in members]).tolist()
    counts = [len(member.target_positions) for member in members]
    assert batch.places_N.tolist() == [3] * counts[0] + [0] * counts[1]
    assert batch.positions_N.tolist() == np.concatenate([m.target_positions for m in members]).tolist()
    assert batch.num_targets == sum(counts)
    assert batch.num_tokens == sum(len(member.input_ids) for member in members)
    flat = batch.tokens.input_ids_BT.flatten()
    assert torch.equal(flat[batch.tokens.hidden_rows_N + 1], batch.tokens.target_ids_N)


def test_stop_tokens_are_marked(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, (), tmp_path)
    (eos,) = cache.manifest.stop_token_ids
    batch = make_batch(cache, np.arange(4), (0, 1, 2), (eos,))
    assert int(batch.is_stop_token_N.sum()) == 3
    assert torch.equal(batch.is_stop_token_N, batch.tokens.target_ids_N == eos)


def test_an_empty_micro_batch_has_tokens_but_no_target(scored_store: Path, tmp_path: Path):
    cache = open_cache(scored_store, ("logprob",), tmp_path)
    batch = make_batch(cache, np.arange(4), (), ())
    assert batch.tokens.input_ids_BT.numel() > 0
    assert (batch.num_targets, batch.num_tokens, len(batch.prior["logprob"])) == (0, 0, 0)


def test_parts_of_a_micro_batch_are_the_whole(scored_store: Path, tmp_path: Path):
    """Each target with its statistics is held by one of the ranks that share the micro-batch."""
    cache = open_cache(scored_store, ("logprob",), tmp_path)
    rows, members = np.array([9, 2, 17, 4]), (3, 0, 1)
    (eos,) = cache.manifest.stop_token_ids
    whole = make_batch(cache, rows, members, (eos,), BatchForm(packed=True))
    parts = [make_batch(cache, rows, members, (eos,), BatchForm(True, part, 4)) for part in range(4)]
    for name in ("places_N", "positions_N", "is_stop_token_N"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert torch.equal(torch.cat([part.prior["logprob"] for part in parts]), whole.prior["logprob"])
    assert torch.equal(torch.cat([part.tokens.target_ids_N for part in parts]), whole.tokens.target_ids_N)
    assert sum(part.num_tokens for part in parts) == whole.num_tokens
    assert {part.num_targets for part in parts} == {whole.num_targets}

"""The loss function and collator for other trainers, without their trainers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from shared.errors import UserError
from stage2_train.hf import ScoreStore, _pack, _unpack, collate

IGNORED = -100


@pytest.fixture
def store(tmp_path: Path, store_of: Any, manifest_with: Any, scored_row: Any) -> Path:
    return store_of(tmp_path / "store", manifest_with(), [scored_row(index) for index in range(4)])


def opened(store: Path, **settings: Any) -> ScoreStore:
    return ScoreStore(store, cache_dir=store.parent / "cache", **settings)


def batch_of(store: ScoreStore) -> dict[str, torch.Tensor]:
    rows = store.dataset
    return collate([rows[index] for index in range(len(rows))])


def test_an_id_and_a_weight_go_into_a_label_and_come_out_as_they_were():
    ids = torch.tensor([0, 1, 151_935, 2**31 - 1, 7])
    weights = torch.tensor([0.0, 1.0, 1e-38, 123456.789, float("nan")])
    labels = _pack(ids, weights)
    assert labels.dtype == torch.int64
    assert (labels >= 2**31).all()
    found_ids, found_weights = _unpack(labels)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_weights[:4], weights[:4])
    assert found_weights[4].isnan()
    with pytest.raises(UserError, match="carry no weights"):
        _unpack(torch.tensor([int(labels[0]), 5]))


def test_the_loss_is_the_weighted_sum_over_the_targets_of_the_step(store: Path):
    made = opened(store, method="prift_prob")
    batch = batch_of(made)
    logits = torch.randn(*batch["input_ids"].shape, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    num_items = int((batch["labels"] != IGNORED).sum()) * 2  # as with a second micro-batch of the same size
    loss = made.loss({"logits": logits}, batch["labels"], torch.tensor(num_items))
    expected = 0.0
    for row in range(4):
        logprob = np.array([-0.5, -1.5, -0.25], np.float32) - np.float32(row)
        for position, weight in zip((2, 3, 4), np.exp(logprob), strict=True):
            target = batch["input_ids"][row, position]
            expected += float(weight) * F.cross_entropy(logits[row, position - 1].double(), target).item() / num_items
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    # The labels are plain ids afterwards, for the metrics of the trainer.
    assert torch.equal(batch["labels"][:, 2:], batch["input_ids"][:, 2:])


def test_weights_of_zero_give_zero_and_no_gradient(store: Path):
    made = opened(store, rule="prob_threshold", min_prob=1.0)
    batch = batch_of(made)
    logits = torch.randn(*batch["input_ids"].shape, 100, requires_grad=True)
    loss = made.loss({"logits": logits}, batch["labels"], torch.tensor(12))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_kept_leaves_out_the_labels_of_weight_zero(store: Path):
    counts = [
        int((batch_of(opened(store, method="prift_mass", normalize_by=by))["labels"] != IGNORED).sum())
        for by in ("targets", "kept")
    ]
    assert counts == [12, 8]  # mass_rank 0, 0.5 ** (1 + row), 1: the last is dropped


def test_padding_on_the_right_is_no_target():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [IGNORED]}]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]


def test_rows_that_were_cut_or_shifted_are_refused(store: Path):
    made = opened(store, method="prift_prob")
    labels = batch_of(made)["labels"]
    with pytest.raises(UserError, match="expected logits"):
        made.loss({"logits": torch.zeros(4, 4, 100)}, labels)
    with pytest.raises(UserError, match="cut or shifted"):
        made.loss({"logits": torch.zeros(4, 3, 100)}, labels[:, 2:])


def test_labels_of_another_collator_are_refused(store: Path):
    made = opened(store, method="prift_prob")
    batch = batch_of(made)
    labels = torch.where(batch["labels"] == IGNORED, IGNORED, batch["input_ids"])
    with pytest.raises(UserError, match="carry no weights"):
        made.loss({"logits": torch.zeros(4, 5, 100)}, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_online_rules_refuse_logits_that_were_rounded(store: Path, dtype: torch.dtype):
    made = opened(store, method="dft")
    logits = torch.randn(4, 5, 100)
    made.loss({"logits": logits}, batch_of(made)["labels"])
    with pytest.raises(UserError, match="logits were rounded"):
        made.loss({"logits": logits.to(dtype)}, batch_of(made)["labels"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "talr"}, "whole global batch"),
        ({"method": "dft", "normalize_by": "kept"}, "expected targets, or kept with source=prior"),
        ({"method": "sft", "normalize_by": "weights"}, "expected targets, or kept"),
        ({"rule": "deft"}, "expected the column collision"),
        ({"rule": "mass", "alpha": 2.0}, "takes"),
        ({}, "expected train.method or train.weighting.rule"),
    ],
)
def test_rules_that_a_loss_function_cannot_compute_are_refused(store: Path, settings: dict, expected: str):
    with pytest.raises(UserError, match=expected):
        opened(store, **settings)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns=True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"n_gpu": 2}, "n_gpu=2"),
        ({"packing": True}, "packing=True"),
        ({"padding_free": True}, "padding_free=True"),
        ({"loss_type": "dft"}, "loss_type=dft"),
        ({"dataset_kwargs": {}}, "dataset_kwargs"),
        ({"world_size": 2, "average_tokens_across_devices": False}, "targets of all devices"),
        ({"max_length": 4}, "max_length=4, but the store has a row of 5 tokens"),
        ({"parallelism_config": SimpleNamespace(cp_size=2, sp_size=1)}, "cuts rows into parts"),
    ],
)
def test_settings_under_which_the_loss_would_be_another_are_refused(store: Path, changes: dict, expected: str):
    right = {
        "remove_unused_columns": False, "label_smoothing_factor": 0.0, "use_liger_kernel": False, "n_gpu": 1,
        "world_size": 1, "average_tokens_across_devices": True, "parallelism_config": None,
    }  # fmt: skip
    model = SimpleNamespace(config=LlamaConfig(vocab_size=100))
    made = opened(store, method="prift_mass")
    assert set(made.trainer_arguments(model, SimpleNamespace(**right))) == {
        "train_dataset", "data_collator", "compute_loss_func",
    }  # fmt: skip
    with pytest.raises(UserError, match=expected):
        made.trainer_arguments(model, SimpleNamespace(**{**right, **changes}))

"""The one shift, on ids that can be written down."""

from dataclasses import dataclass

import numpy as np
import torch

from shared.padding import pad_and_shift


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    target_positions: np.ndarray


def row(ids: list[int], targets: list[int]) -> Row:
    return Row(np.array(ids, np.int32), np.array(targets, np.int32))


def test_example_of_the_docstring():
    batch = pad_and_shift([row([5, 6, 7], [1, 2])])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7]]
    assert batch.hidden_rows_N.tolist() == [0, 1]
    assert batch.target_ids_N.tolist() == [6, 7]


def test_rows_of_different_lengths():
    batch = pad_and_shift([row([5, 6], [1]), row([7, 8, 9, 4], [1, 3]), row([3, 2, 1], [2])])
    assert batch.input_ids_BT.tolist() == [[5, 6, 0, 0], [7, 8, 9, 4], [3, 2, 1, 0]]
    # T = 4: row 1 begins at 4, row 2 at 8; the state before each target speaks of it.
    assert batch.hidden_rows_N.tolist() == [0, 4, 6, 9]
    assert batch.target_ids_N.tolist() == [6, 8, 4, 1]
    assert {batch.input_ids_BT.dtype, batch.hidden_rows_N.dtype, batch.target_ids_N.dtype} == {torch.int64}


def test_each_hidden_row_stands_right_before_its_target():
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        length = int(generator.integers(2, 30))
        positions = np.flatnonzero(generator.random(length) < 0.5)
        rows.append(row(generator.integers(1, 1000, length).tolist(), positions[positions > 0].tolist()))
    batch = pad_and_shift(rows)
    flat = batch.input_ids_BT.flatten()
    assert torch.equal(flat[batch.hidden_rows_N + 1], batch.target_ids_N)
    starts = batch.hidden_rows_N // batch.input_ids_BT.shape[1]
    assert torch.equal(starts, (batch.hidden_rows_N + 1) // batch.input_ids_BT.shape[1])


def test_to_moves_every_tensor():
    batch = pad_and_shift([row([5, 6], [1])]).to("meta")
    assert {batch.input_ids_BT.device.type, batch.hidden_rows_N.device.type, batch.target_ids_N.device.type} == {"meta"}

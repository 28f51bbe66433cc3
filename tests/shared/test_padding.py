"""The one shift, on ids that can be written down."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from shared.padding import pack_and_shift, pad_and_shift


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    target_positions: np.ndarray


def row(ids: list[int], targets: list[int]) -> Row:
    return Row(np.array(ids, np.int32), np.array(targets, np.int32))


def random_rows() -> list[Row]:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(20):
        length = int(generator.integers(2, 30))
        positions = np.flatnonzero(generator.random(length) < 0.5)
        rows.append(row(generator.integers(1, 1000, length).tolist(), positions[positions > 0].tolist()))
    return rows


def test_examples_of_the_docstrings():
    rows = [row([5, 6], [1]), row([7, 8, 9], [2])]
    padded, packed = pad_and_shift(rows), pack_and_shift(rows)
    assert padded.input_ids_BT.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert packed.input_ids_BT.tolist() == [[5, 6, 7, 8, 9]]
    assert padded.hidden_rows_N.tolist() == [0, 4]
    assert packed.hidden_rows_N.tolist() == [0, 3]
    assert padded.target_ids_N.tolist() == packed.target_ids_N.tolist() == [6, 9]


def test_rows_of_different_lengths():
    batch = pad_and_shift([row([5, 6], [1]), row([7, 8, 9, 4], [1, 3]), row([3, 2, 1], [2])])
    assert batch.input_ids_BT.tolist() == [[5, 6, 0, 0], [7, 8, 9, 4], [3, 2, 1, 0]]
    # T = 4: row 1 begins at 4, row 2 at 8; the state before each target speaks of it.
    assert batch.hidden_rows_N.tolist() == [0, 4, 6, 9]
    assert batch.target_ids_N.tolist() == [6, 8, 4, 1]
    assert {batch.input_ids_BT.dtype, batch.hidden_rows_N.dtype, batch.target_ids_N.dtype} == {torch.int64}


def test_packed_rows_with_their_boundaries():
    batch = pack_and_shift([row([5, 6], [1]), row([7, 8, 9, 4], [1, 3]), row([3, 2, 1], [])])
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert batch.boundaries.position_ids_BT.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.boundaries.starts.tolist() == [0, 2, 6, 9]
    assert batch.boundaries.longest == 4
    assert batch.hidden_rows_N.tolist() == [0, 2, 4]
    assert batch.target_ids_N.tolist() == [6, 8, 4]
    assert {batch.input_ids_BT.dtype, batch.hidden_rows_N.dtype, batch.target_ids_N.dtype} == {torch.int64}
    assert batch.boundaries.position_ids_BT.dtype == torch.int64
    assert batch.boundaries.starts.dtype == torch.int32


def test_arguments_of_the_model():
    boundaries = pack_and_shift([row([5, 6], [1]), row([7, 8, 9], [1])]).boundaries
    arguments = boundaries.model_arguments()
    assert arguments.keys() == {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert arguments["cu_seq_lens_q"] is arguments["cu_seq_lens_k"] is boundaries.starts
    # A tensor of the device would make each attention layer wait for it.
    assert arguments["max_length_q"] == 3
    assert type(arguments["max_length_q"]) is int


@pytest.mark.parametrize("make", [pad_and_shift, pack_and_shift])
def test_each_hidden_row_stands_right_before_its_target(make):
    rows = random_rows()
    batch = make(rows)
    flat = batch.input_ids_BT.flatten()
    assert torch.equal(flat[batch.hidden_rows_N + 1], batch.target_ids_N)
    # And in the same example: counted with the targets of each, the rows lie between its first and its last token.
    starts = (
        np.arange(len(rows)) * batch.input_ids_BT.shape[1]
        if batch.boundaries is None
        else batch.boundaries.starts[:-1].numpy()
    )
    counts = [len(each.target_positions) for each in rows]
    first = np.repeat(starts, counts)
    last = first + np.repeat([len(each.input_ids) for each in rows], counts) - 1
    hidden_rows = batch.hidden_rows_N.numpy()
    assert ((first <= hidden_rows) & (hidden_rows < last)).all()


@pytest.mark.parametrize("make", [pad_and_shift, pack_and_shift])
def test_to_moves_every_tensor(make):
    batch = make([row([5, 6], [1])]).to("meta")
    tensors = [batch.input_ids_BT, batch.hidden_rows_N, batch.target_ids_N]
    if batch.boundaries is not None:
        tensors += [batch.boundaries.position_ids_BT, batch.boundaries.starts]
    assert {tensor.device.type for tensor in tensors} == {"meta"}

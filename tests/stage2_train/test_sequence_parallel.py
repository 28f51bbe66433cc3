"""Four processes, in groups of two and of four, against one process that holds the whole row.

This file is also the program that each of the four processes runs.
"""

import functools
import itertools
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from shared.errors import UserError
from shared.head import hidden_states, logits_of_hidden, prepare_head
from shared.packed_attention import packing_obstacle, use_packed_attention
from shared.padding import PackedBatch, pack_and_shift
from stage2_train.sequence_parallel import (
    ATTENTION_NAME,
    make_group,
    sequence_parallel_attention,
    sequence_parallel_obstacle,
    split,
    use_sequence_parallel_attention,
)

NUM_RANKS = 4
WINDOW = 6


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    target_positions: np.ndarray


@dataclass(frozen=True)
class Case:
    """A model and the examples of a packed row."""

    model_type: str = "llama"
    heads: tuple[int, int] = (4, 2)
    """Of queries, of keys and values."""
    lengths: tuple[int, ...] = (17, 2, 9, 23)
    """51 tokens: the last example lies in both of two parts, and in three of four."""
    with_targets: tuple[int, ...] | None = None
    """Examples that have targets; None: all."""
    dtype: torch.dtype = torch.float64
    checkpointing: bool = False


QWEN3 = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
FIELDS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": WINDOW}, "qwen3": QWEN3}
CASES = {
    "llama": Case(),
    "a head of keys each": Case(heads=(4, 4)),
    "one head of keys for all": Case(heads=(8, 1)),
    "two heads of keys, eight of queries": Case(heads=(8, 2)),
    "biases": Case("qwen2"),
    "norms of heads, a window in one layer": Case("qwen3"),
    "windows": Case("mistral"),
    "checkpointing": Case(checkpointing=True),
    "checkpointing and windows": Case("mistral", checkpointing=True),
    "equal parts": Case(lengths=(12, 20)),
    "boundary between parts": Case(lengths=(12, 12, 12, 12)),
    "one example": Case(lengths=(37,)),
    "targets at the start": Case(lengths=(9, 30), with_targets=(0,)),
    "targets at the end, checkpointing": Case(lengths=(30, 9), with_targets=(1,), checkpointing=True),
    "fewer tokens than four": Case(lengths=(3,)),
    "float32": Case(dtype=torch.float32),
    "float32, windows, checkpointing": Case("mistral", dtype=torch.float32, checkpointing=True),
    "bfloat16": Case(dtype=torch.bfloat16, heads=(4, 1)),
}
SIZES = (2, 4)


def tiny_model(case: Case) -> Any:
    """Always the same weights."""
    config = AutoConfig.for_model(
        case.model_type,
        **{
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": case.heads[0], "num_key_value_heads": case.heads[1], "max_position_embeddings": 128,
            # Large enough that attention is far from even: else a wrong exchange would hardly show.
            "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
            **FIELDS.get(case.model_type, {}),
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(case.dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    for module in model.modules():
        if case.dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            # transformers' own computes in float32, and so makes a float32 error of a last bit.
            weight, eps = module.weight, module.variance_epsilon
            module.forward = functools.partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    prepare_head(model)
    return model.train()


def row_of_group(case: Case, index: int) -> tuple[PackedBatch, Tensor]:
    """The packed row of a group, another for each, and the weights of its targets, float64 (N,), some of them 0."""
    generator = np.random.default_rng(index)
    rows = []
    for example, length in enumerate(case.lengths):
        positions = np.sort(generator.choice(np.arange(1, length), max(1, 3 * length // 4), replace=False))
        if case.with_targets is not None and example not in case.with_targets:
            positions = positions[:0]
        rows.append(Row(generator.integers(1, 64, length).astype(np.int32), positions.astype(np.int32)))
    batch = pack_and_shift(rows)
    weights_N = generator.exponential(size=len(batch.target_ids_N)) * (generator.random(len(batch.target_ids_N)) < 0.8)
    return batch, torch.from_numpy(weights_N)


def target_nll(model: Any, batch: PackedBatch) -> Tensor:
    hidden_ND = hidden_states(model, batch.input_ids_BT, batch.boundaries).flatten(0, 1)[batch.hidden_rows_N]
    return F.cross_entropy(logits_of_hidden(model, hidden_ND), batch.target_ids_N, reduction="none")


@dataclass
class Outcome:
    """Of a case: sums over all ranks, and the nll of each rank's targets."""

    loss: Tensor
    gradients: dict[str, Tensor]
    nll: list[Tensor]
    nll_without_gradient: list[Tensor]


def in_one_process(case: Case, size: int) -> Outcome:
    """The rows of all groups one after the other, each whole."""
    model = tiny_model(case)
    assert packing_obstacle(model) is None
    use_packed_attention(model)
    loss, nll = torch.zeros((), dtype=torch.float64), []
    for index in range(NUM_RANKS // size):
        batch, weights_N = row_of_group(case, index)
        nll.append(target_nll(model, batch))
        part = (weights_N.to(nll[-1].dtype) * nll[-1]).sum()
        part.backward()
        loss += part.detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Outcome(loss, gradients, [part.detach() for part in nll], [])


def on_this_rank(model: Any, case: Case, group: Any, rank: int) -> Outcome:
    """This rank's part, and the sums over all ranks."""
    batch, weights_N = row_of_group(case, rank // group.size)
    part, held = split(batch, group.rank, group.size)
    with torch.no_grad():
        without_gradient = target_nll(model, part)
    nll = target_nll(model, part)
    weighted = (weights_N[held].to(nll.dtype) * nll).sum()
    weighted.backward()
    loss = weighted.detach().double()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for tensor in (loss, *gradients.values()):
        torch.distributed.all_reduce(tensor)
    return Outcome(loss, gradients, *(_of_all_ranks(values.detach()) for values in (nll, without_gradient)))


def _of_all_ranks(value: Any) -> list[Any]:
    values = [None] * NUM_RANKS
    torch.distributed.all_gather_object(values, value)
    return values


def _refusal(call: Any) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    return f"{refused.type.__name__}: {refused.value}"


def run_rank(rank: int, folder: Path) -> None:
    """What each of the processes does."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=NUM_RANKS)
    groups = {size: make_group(size) for size in SIZES}
    # All models before the first forward pass: each must keep the group that it was given.
    models = {}
    for name, size in itertools.product(CASES, SIZES):
        models[name, size] = tiny_model(CASES[name])
        use_sequence_parallel_attention(models[name, size], groups[size])
    outcomes = {key: on_this_rank(model, CASES[key[0]], groups[key[1]], rank) for key, model in models.items()}
    attend = functools.partial(sequence_parallel_attention, None, group=groups[2])
    query, starts = torch.ones(1, 2, 3, 4), torch.tensor([0, 6], dtype=torch.int32)
    facts = {
        "ranks": {
            size: _of_all_ranks(
                (group.rank, group.size, torch.distributed.get_process_group_ranks(group.process_group))
            )
            for size, group in groups.items()
        },
        "refused size": _refusal(lambda: make_group(3)),
        "no boundaries": _refusal(lambda: attend(query, query, query, None)),
        "two rows": _refusal(
            lambda: attend(*[query.expand(2, -1, -1, -1)] * 3, None, cu_seq_lens_q=starts, max_length_q=6)
        ),
        "config": models["llama", 2].config.to_json_string(use_diff=False),
    }
    if rank == 0:
        torch.save(({key: vars(outcome) for key, outcome in outcomes.items()}, facts), folder / "outcomes.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[dict, dict]:
    """What the processes found: an outcome of each case and size, and single facts."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(NUM_RANKS):
        with open(folder / f"log-{rank}", "w") as log:
            command = [sys.executable, __file__, str(rank), str(folder)]
            processes.append(
                subprocess.Popen(command, cwd=repository, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + 300
    try:
        while any(process.poll() is None for process in processes):
            # One that failed leaves the others waiting for it.
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"log-{rank}").read_text() for rank in range(NUM_RANKS))
    assert codes == [0] * NUM_RANKS, logs
    outcomes, facts = torch.load(folder / "outcomes.pt")
    return {key: Outcome(**fields) for key, fields in outcomes.items()}, facts


def relative_error(found: Outcome, exact: Outcome) -> float:
    """Of the gradient as one long vector."""
    difference = sum(float((found.gradients[n].double() - g).square().sum()) for n, g in exact.gradients.items())
    return (difference / sum(float(g.square().sum()) for g in exact.gradients.values())) ** 0.5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype != torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_whole_row(measured: tuple[dict, dict], name: str, size: int):
    found, expected = measured[0][name, size], in_one_process(CASES[name], size)
    assert float(expected.loss) > 0
    tolerance = 1e-10 if CASES[name].dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.loss, expected.loss, rtol=tolerance, atol=0)
    for nll in (found.nll, found.nll_without_gradient):
        torch.testing.assert_close(torch.cat(nll), torch.cat(expected.nll), rtol=tolerance, atol=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in expected.gradients.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            found.gradients[parameter], gradient, rtol=tolerance, atol=tolerance * scale,
            msg=lambda text, parameter=parameter: f"{parameter}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_errs_no_more_than_one_process(measured: tuple[dict, dict], size: int):
    case = CASES["bfloat16"]
    exact_case = Case(heads=case.heads)
    exact, naive = in_one_process(exact_case, size), in_one_process(case, size)
    found = measured[0]["bfloat16", size]
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.bfloat16}
    assert relative_error(found, exact) <= 1.2 * relative_error(naive, exact) + 1e-3


def test_the_cases_hold_what_they_promise(measured: tuple[dict, dict]):
    targets = {key: [len(nll) for nll in outcome.nll] for key, outcome in measured[0].items()}
    assert [count > 0 for count in targets["targets at the start", 2]] == [True, False] * 2
    assert [count > 0 for count in targets["targets at the start", 4]] == [True, False, False, False]
    assert [count > 0 for count in targets["targets at the end, checkpointing", 4]] == [False, False, False, True]
    assert targets["fewer tokens than four", 4] == [1, 1, 0, 0]
    assert all(min(targets["llama", size]) > 0 for size in SIZES)


def test_groups_are_of_consecutive_ranks(measured: tuple[dict, dict]):
    facts = measured[1]
    assert facts["ranks"][2] == [(0, 2, [0, 1]), (1, 2, [0, 1]), (0, 2, [2, 3]), (1, 2, [2, 3])]
    assert facts["ranks"][4] == [(rank, 4, [0, 1, 2, 3]) for rank in range(4)]
    assert facts["refused size"] == (
        "UserError: train.sequence_parallel=3: expected a number of ranks that 3 divides, got 4"
    )
    assert issubclass(UserError, ValueError)


def test_what_packed_attention_refuses_is_refused(measured: tuple[dict, dict]):
    facts = measured[1]
    assert "expected cu_seq_lens_q and max_length_q of a packed batch, got none" in facts["no boundaries"]
    assert "got no mask, 2 rows" in facts["two rows"]


def test_the_attention_stays_out_of_saved_configs(measured: tuple[dict, dict]):
    assert '"model_type": "llama"' in measured[1]["config"]
    assert ATTENTION_NAME not in measured[1]["config"]


@pytest.mark.parametrize(
    ("heads", "size", "reason"),
    [
        ((4, 4), 2, None),
        ((4, 2), 4, None),
        ((12, 6), 3, None),
        ((12, 1), 12, None),
        ((4, None), 4, None),
        ((4, 2), 3, "3 ranks cannot share 4 attention heads evenly"),
        ((2, 1), 4, "4 ranks cannot share 2 attention heads evenly"),
        ((12, 3), 2, "2 ranks cannot share 3 heads of keys and values evenly"),
        ((12, 4), 6, "6 ranks cannot share 4 heads of keys and values evenly"),
    ],
)
def test_heads_that_cannot_be_shared_are_an_obstacle(heads: tuple[int, int | None], size: int, reason: str | None):
    config = SimpleNamespace(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert sequence_parallel_obstacle(SimpleNamespace(config=config), size) == reason


def test_split_of_a_written_out_batch():
    rows = [Row(np.array([5, 6]), np.array([1])), Row(np.array([7, 8, 9]), np.array([1, 2]))]
    batch = pack_and_shift(rows)
    (first, held_first), (second, held_second) = split(batch, 0, 2), split(batch, 1, 2)
    assert first.input_ids_BT.tolist() == [[5, 6, 7]]
    assert second.input_ids_BT.tolist() == [[8, 9, 0]]
    assert first.boundaries.position_ids_BT.tolist() == [[0, 1, 0]]
    assert second.boundaries.position_ids_BT.tolist() == [[1, 2, 0]]
    assert (first.hidden_rows_N.tolist(), first.target_ids_N.tolist(), held_first) == ([0, 2], [6, 8], slice(0, 2))
    assert (second.hidden_rows_N.tolist(), second.target_ids_N.tolist(), held_second) == ([0], [9], slice(2, 3))
    for part in (first, second):
        assert part.boundaries.starts.tolist() == [0, 2, 5, 6]
        assert part.boundaries.longest == 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_parts_are_the_whole(size: int):
    """Every row of up to three examples of up to three tokens, with every choice of targets."""
    for lengths in itertools.chain.from_iterable(itertools.product((1, 2, 3), repeat=count) for count in (1, 2, 3)):
        choices = [
            [np.flatnonzero([0, *chosen]) for chosen in itertools.product((0, 1), repeat=n - 1)] for n in lengths
        ]
        for positions in itertools.product(*choices):
            ids = [10 * example + np.arange(1, length + 1) for example, length in enumerate(lengths)]
            check_parts(pack_and_shift(list(map(Row, ids, positions))), size)


def check_parts(batch: PackedBatch, size: int) -> None:
    """Joined in order, the parts are the batch and less than `size` tokens of padding."""
    parts, held = zip(*(split(batch, rank, size) for rank in range(size)), strict=True)
    num_tokens, length = batch.input_ids_BT.shape[1], parts[0].input_ids_BT.shape[1]
    num_added = size * length - num_tokens
    assert 0 <= num_added < size
    joined = torch.cat([part.input_ids_BT for part in parts], dim=1)
    positions = torch.cat([part.boundaries.position_ids_BT for part in parts], dim=1)
    assert joined.tolist() == [batch.input_ids_BT[0].tolist() + [0] * num_added]
    assert positions.tolist() == [batch.boundaries.position_ids_BT[0].tolist() + list(range(num_added))]
    assert [n for part in held for n in range(part.start, part.stop)] == list(range(len(batch.target_ids_N)))
    for rank, (part, own) in enumerate(zip(parts, held, strict=True)):
        assert part.input_ids_BT.shape == part.boundaries.position_ids_BT.shape == (1, length)
        assert (part.hidden_rows_N + rank * length).tolist() == batch.hidden_rows_N[own].tolist()
        assert all(0 <= row < length for row in part.hidden_rows_N.tolist())
        assert part.target_ids_N.tolist() == batch.target_ids_N[own].tolist()
        assert part.boundaries.starts.dtype == torch.int32
        starts = batch.boundaries.starts.tolist() + [num_tokens + num_added] * (num_added > 0)
        assert part.boundaries.starts.tolist() == starts
        assert part.boundaries.longest == max(np.diff(starts))


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))

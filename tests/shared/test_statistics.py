"""The statistics against float64, by error budget, and against values that can be written down."""

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from shared.statistics import VocabShard, statistics_in_chunks, token_statistics

ALL = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")


def formulas(logits_NV: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """The textbook formulas in the dtype of the logits: the yardstick in float64, the naive way in float32."""
    logp_NV = logits_NV.log_softmax(dim=-1)
    p_NV = logp_NV.exp()
    own_N1 = logits_NV.gather(1, targets_N[:, None])
    top_NK = logits_NV.topk(min(20, logits_NV.shape[1]), dim=1).values.log_softmax(dim=1)
    return {
        "logprob": logp_NV.gather(1, targets_N[:, None])[:, 0],
        "mass_rank": (p_NV * (logits_NV > own_N1)).sum(dim=1),
        "entropy": -(p_NV * logp_NV).sum(dim=1),
        "entropy_top20": -(top_NK.exp() * top_NK).sum(dim=1),
        "collision": p_NV.square().sum(dim=1),
    }


@pytest.mark.parametrize("vocab_size", [2, 7, 512, 5001])
@pytest.mark.parametrize("scale", [1.0, 8.0, 60.0])
@pytest.mark.parametrize("tied", [False, True])
def test_float32_is_no_worse_than_the_naive_way(vocab_size: int, scale: float, tied: bool):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(48, vocab_size, generator=generator) * scale
    if tied:
        logits = logits.round()
    targets = torch.randint(vocab_size, (48,), generator=generator)
    # The ends of the scale too: the most and the least likely token.
    targets[:16], targets[16:24] = logits[:16].argmax(dim=1), logits[16:24].argmin(dim=1)
    exact, naive = formulas(logits.double(), targets), formulas(logits, targets)
    ours = token_statistics(logits, targets, ALL)
    for column in ALL:
        assert ours[column].dtype == torch.float32
        error = (ours[column].double() - exact[column]).abs()
        size = exact[column].abs().clamp(min=1.0)
        budget = (naive[column].double() - exact[column]).abs() + 1e-6 * size
        assert (error <= budget).all(), (column, float((error - budget).max()))
        # So that a bad yardstick cannot excuse a bad result.
        assert (error <= 5e-6 * size).all(), (column, float(error.max()))


def test_float64_logits_stay_float64():
    logits = torch.randn(5, 30, dtype=torch.float64)
    targets = torch.arange(5)
    ours, exact = token_statistics(logits, targets, ALL), formulas(logits, targets)
    for column in ALL:
        torch.testing.assert_close(ours[column], exact[column], rtol=1e-13, atol=1e-13)


def test_probability_near_one_keeps_its_digits():
    # 1 - p is 2.06e-9, far below float32's step at 1: log_softmax gives 0 here.
    logits = torch.tensor([[20.0, 0.0], [30.0, 0.0]])
    ours = token_statistics(logits, torch.tensor([0, 0]), ["logprob"])["logprob"]
    expected = torch.tensor([-math.log1p(math.exp(-20)), -math.log1p(math.exp(-30))])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0.0)
    assert (ours < 0).all()


def test_target_hundreds_of_nats_below_the_maximum():
    # e^300 overflows float32: a form shifted by the target's logit would be infinite or clamped.
    logits = torch.tensor([[300.0, 0.0, 299.0], [0.0, -800.0, -1.0]])
    ours = token_statistics(logits, torch.tensor([1, 1]), ALL)
    extra = math.log1p(math.exp(-1))
    torch.testing.assert_close(ours["logprob"], torch.tensor([-300 - extra, -800 - extra]), rtol=1e-6, atol=0.0)
    assert ours["mass_rank"].tolist() == [1.0, 1.0]
    p = 1 / (1 + math.exp(-1))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    torch.testing.assert_close(ours["entropy"], torch.tensor([entropy, entropy]), rtol=1e-5, atol=0.0)


def test_logits_of_minus_infinity_have_no_mass():
    logits = torch.tensor([[0.0, -math.inf, 0.0, -math.inf]])
    for target, logprob, above in [(0, -math.log(2), 0.0), (1, -math.inf, 1.0)]:
        ours = token_statistics(logits, torch.tensor([target]), ALL)
        assert ours["logprob"].item() == pytest.approx(logprob)
        assert ours["mass_rank"].item() == above
        assert ours["entropy"].item() == pytest.approx(math.log(2))
        assert ours["entropy_top20"].item() == pytest.approx(math.log(2))
        assert ours["collision"].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    "row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [-math.inf] * 3], ids=["nan", "inf", "no mass"]
)
def test_rows_without_a_softmax_are_nan_in_every_column(row: list[float]):
    ours = token_statistics(torch.tensor([row]), torch.tensor([0]), ALL)
    # A finite number would pass as a score.
    assert all(math.isnan(ours[column].item()) for column in ALL), ours


def test_mass_rank_is_strictly_above():
    logits = torch.tensor([[1.0, 1.0, 0.0]]).repeat(3, 1)
    ours = token_statistics(logits, torch.tensor([0, 1, 2]), ["mass_rank", "logprob"])
    above = 2 * math.e / (2 * math.e + 1)
    torch.testing.assert_close(ours["mass_rank"], torch.tensor([0.0, 0.0, above]))
    # A tie of the maximum is not alone at the top: -log1p runs over the other one as well.
    assert ours["logprob"][0].item() == pytest.approx(math.log(math.e / (2 * math.e + 1)), rel=1e-6)


def test_identities_over_all_tokens_of_a_row():
    vocab_size = 40
    # Rounded to halves: ties stand in every row.
    row = (torch.randn(vocab_size, dtype=torch.float64) * 4).round() / 2
    ours = token_statistics(row.expand(vocab_size, -1), torch.arange(vocab_size), ALL)
    p = ours["logprob"].exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert -(p * ours["logprob"]).sum().item() == pytest.approx(ours["entropy"][0].item(), abs=1e-12)
    assert p.square().sum().item() == pytest.approx(ours["collision"][0].item(), abs=1e-12)
    for token in range(vocab_size):
        at_most = p[row <= row[token]].sum().item()  # u, ties included
        assert ours["mass_rank"][token].item() + at_most == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("vocab_size", [2, 7, 20, 21, 5001])
def test_uniform_distribution(vocab_size: int):
    ours = token_statistics(torch.full((1, vocab_size), 3.7), torch.tensor([1]), ALL)
    assert ours["entropy"].item() == pytest.approx(math.log(vocab_size), rel=1e-6)
    assert ours["entropy_top20"].item() == pytest.approx(math.log(min(vocab_size, 20)), rel=1e-6)
    assert ours["collision"].item() == pytest.approx(1 / vocab_size, rel=1e-5)
    assert ours["logprob"].item() == pytest.approx(-math.log(vocab_size), rel=1e-6)
    assert ours["mass_rank"].item() == 0.0


def test_only_the_columns_asked_for():
    assert list(token_statistics(torch.zeros(1, 3), torch.tensor([0]), ["entropy"])) == ["entropy"]
    assert token_statistics(torch.zeros(1, 3), torch.tensor([0]), []) == {}
    with pytest.raises(ValueError, match="perplexity"):
        token_statistics(torch.zeros(1, 3), torch.tensor([0]), ["perplexity"])


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 7, 100])
def test_chunks_do_not_matter_and_stay_within_the_bound(rows_at_a_time: int):
    vocab_size, bound = 11, 4 * 11 * rows_at_a_time + 3
    hidden, head = torch.randn(7, 5), torch.randn(5, vocab_size)
    targets = torch.randint(vocab_size, (7,))
    sizes = []

    def logits_of(rows: Tensor) -> Tensor:
        logits = rows @ head
        sizes.append(logits.nbytes)
        return logits

    chunked = statistics_in_chunks(hidden, targets, ALL, logits_of, vocab_size, bound)
    whole = token_statistics(hidden @ head, targets, ALL)
    for column in ALL:
        torch.testing.assert_close(chunked[column], whole[column], rtol=1e-5, atol=1e-6)
    assert max(sizes) <= bound
    assert len(sizes) == -(-7 // rows_at_a_time)


def test_float64_logits_stay_within_the_bound_as_well():
    vocab_size, bound = 16, 16 * 8 * 4
    sizes = []

    def logits_of(rows: Tensor) -> Tensor:
        logits = rows @ torch.ones(3, vocab_size, dtype=torch.float64)
        sizes.append(logits.nbytes)
        return logits

    hidden = torch.randn(20, 3, dtype=torch.float64)
    statistics_in_chunks(hidden, torch.zeros(20, dtype=torch.int64), ALL, logits_of, vocab_size, bound)
    assert max(sizes) <= bound


def test_a_single_row_may_exceed_the_bound():
    ours = statistics_in_chunks(torch.zeros(2, 3), torch.tensor([0, 1]), ALL, lambda rows: rows, 3, 1)
    torch.testing.assert_close(ours["entropy"], torch.full((2,), math.log(3)))


def test_no_targets_give_empty_columns():
    none = torch.zeros(0, dtype=torch.int64)
    ours = statistics_in_chunks(torch.zeros(0, 3), none, ALL, lambda rows: rows, 3, 1 << 20)
    assert {column: tuple(values.shape) for column, values in ours.items()} == dict.fromkeys(ALL, (0,))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_target_outside_the_vocabulary_is_an_error(wrong: int):
    with pytest.raises((IndexError, RuntimeError)):
        token_statistics(torch.zeros(1, 3), torch.tensor([wrong]), ALL)


class Ranks:
    """Ranks as threads: each reduction waits for all of them, and works in place."""

    def __init__(self, widths: Sequence[int]):
        self.widths = widths
        self.log: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in widths]
        """Of each rank, the reductions it took part in and the shapes of their tensors."""
        self._barrier = threading.Barrier(len(widths), timeout=30)
        self._given: list[Tensor] = [torch.empty(0) for _ in widths]

    def shard(self, rank: int) -> VocabShard:
        def maximum_without_nan(parts: Tensor) -> Tensor:  # As an all-reduce may do it.
            return parts.masked_fill(parts.isnan(), -math.inf).amax(0)

        return VocabShard(
            start=sum(self.widths[:rank]),
            rank=rank,
            size=len(self.widths),
            all_max=self._reduction(rank, "max", maximum_without_nan),
            all_sum=self._reduction(rank, "sum", lambda parts: parts.sum(0)),
        )

    def _reduction(self, rank: int, name: str, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def all_reduce(tensor: Tensor) -> Tensor:
            self.log[rank].append((name, tuple(tensor.shape)))
            self._given[rank] = tensor.clone()
            self._barrier.wait()
            tensor.copy_(reduce(torch.stack(self._given)))
            self._barrier.wait()
            return tensor

        return all_reduce

    def run(self, work: Callable[[int, VocabShard], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The result of all ranks, which must be one and the same."""
        with ThreadPoolExecutor(len(self.widths)) as threads:
            results = list(threads.map(lambda rank: work(rank, self.shard(rank)), range(len(self.widths))))
        for result in results[1:]:
            for column, values in result.items():
                torch.testing.assert_close(values, results[0][column], rtol=0, atol=0, equal_nan=True)
        return results[0]

    def statistics(self, logits_NV: Tensor, targets_N: Tensor, columns: Sequence[str] = ALL) -> dict[str, Tensor]:
        slices = logits_NV.split(list(self.widths), dim=1)
        return self.run(lambda rank, shard: token_statistics(slices[rank], targets_N, columns, shard))


def sharded_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, 101), one row for each of the targets 0 to 100, and rows with ties, -inf, and extreme targets."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(110, 101, generator=generator, dtype=dtype) * 6
    targets_N = torch.arange(110) % 101
    logits_NV[:30] = logits_NV[:30].round()
    logits_NV[30:40, :50] = logits_NV[40:50, 60:] = -math.inf
    logits_NV[101] = 2.5
    logits_NV[102, 1], logits_NV[103, 2] = 60.0, -800.0
    logits_NV[104] = -math.inf
    logits_NV[104, 3] = 1.0
    logits_NV[105, 5:] = -math.inf
    return logits_NV, targets_N


WIDTHS = [(101,), (50, 51), (1, 100), (60, 7, 34), (19, 21, 20, 41), (40, 0, 61), (50, 51, 0)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_slices_of_the_vocabulary_do_not_matter(widths: tuple[int, ...], dtype: torch.dtype, tolerance: float):
    logits, targets = sharded_rows(dtype)
    ours, whole = Ranks(widths).statistics(logits, targets), token_statistics(logits, targets, ALL)
    for column in ALL:
        assert ours[column].dtype == dtype
        torch.testing.assert_close(ours[column], whole[column], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize(
    "values", [{7: math.nan}, {55: math.nan}, {7: math.inf}, {55: math.inf}, dict.fromkeys(range(101), -math.inf)],
    ids=["nan", "nan of the target", "+inf", "+inf of the target", "no mass"],
)  # fmt: skip
def test_sliced_rows_without_a_softmax_are_nan_in_every_column(widths: tuple[int, ...], values: dict[int, float]):
    logits = torch.randn(2, 101)
    logits[0, list(values)] = torch.tensor(list(values.values()))
    ours = Ranks(widths).statistics(logits, torch.tensor([55, 55]))
    assert all(math.isnan(ours[column][0].item()) for column in ALL), ours
    assert all(math.isfinite(ours[column][1].item()) for column in ALL), ours


@pytest.mark.parametrize("columns", [ALL, ("mass_rank",), ("logprob", "mass_rank", "entropy", "collision"), ()])
def test_a_chunk_takes_one_maximum_and_one_sum_and_no_logits_travel(columns: tuple[str, ...]):
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(7, 5, generator=generator), torch.randn(5, 101, generator=generator)
    targets = torch.tensor([0, 100, 50, 59, 60, 66, 67])
    ranks = Ranks((60, 7, 34))
    heads = head.split(list(ranks.widths), dim=1)
    bound = 3 * 4 * max(ranks.widths)  # Three rows a chunk: 3, 3 and 1.
    chunked = ranks.run(
        lambda rank, shard: statistics_in_chunks(
            hidden, targets, columns, lambda rows: rows @ heads[rank], max(ranks.widths), bound, shard
        )
    )
    num_sums = 25 if "entropy_top20" in columns else 5
    expected = [call for n in (3, 3, 1) for call in (("max", (n,)), ("sum", (n, 3, num_sums)))] if columns else []
    assert ranks.log == [expected] * 3
    whole = token_statistics(hidden @ head, targets, columns)
    for column in columns:
        torch.testing.assert_close(chunked[column], whole[column], rtol=1e-5, atol=1e-6)


def test_ranks_without_targets_still_meet():
    ranks = Ranks((2, 1))
    ours = ranks.statistics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert {column: tuple(values.shape) for column, values in ours.items()} == dict.fromkeys(ALL, (0,))

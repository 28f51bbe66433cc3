"""Both forms of the statistics, torch and triton, against float64; the kernel runs in triton's interpreter.

The interpreter is chosen when triton is imported, so the kernel runs in processes of its own: this file is their
program as well. They take what it is to compute from one file and write the results to another.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared import statistics

COLUMNS = ("logprob", "mass_rank", "entropy", "entropy_top20", "collision")
INF, NAN = math.inf, math.nan
BLOCK = 2048

Case = tuple[Tensor, Tensor]
"""Float32 logits (N, V) and targets (N,)."""


def float64_statistics(case: Case) -> dict[str, np.ndarray]:
    """The definitions row by row, in numpy and float64, sorted sums, nothing shared with the code under test."""
    rows: list[list[float]] = []
    for z, target in zip(case[0].double().numpy(), case[1].tolist(), strict=True):
        z = z - z.max()
        logp = z - np.logaddexp.reduce(np.sort(z))
        p, others = np.exp(logp), np.logaddexp.reduce(np.sort(np.delete(z, target)))
        top = np.sort(z)[-20:]
        top = top - np.logaddexp.reduce(top)
        rows.append(
            [
                # Of a probability near 1, log p = -log(1 + odds against).
                -np.logaddexp(0.0, others - z[target]),
                p[z > z[target]].sum(),
                -sum(np.sort(p[p > 0] * logp[p > 0])),
                -(np.exp(top[top > -INF]) * top[top > -INF]).sum(),
                np.square(p).sum(),
            ]
        )
    return dict(zip(COLUMNS, np.array(rows).T, strict=True))


def naive_statistics(case: Case) -> dict[str, Tensor]:
    """log_softmax and the textbook formulas, in float32: what the error budget grants."""
    logits_NV, targets_N = case
    logp_NV, own_N1 = logits_NV.log_softmax(1), logits_NV.gather(1, targets_N[:, None])
    p_NV = logp_NV.exp()
    top_NK = logits_NV.topk(20, dim=1).values.log_softmax(1)
    return {
        "logprob": logp_NV.gather(1, targets_N[:, None])[:, 0],
        "mass_rank": torch.where(logits_NV > own_N1, p_NV, 0.0).sum(1),
        "entropy": -torch.where(p_NV > 0, p_NV * logp_NV, 0.0).sum(1),
        "entropy_top20": -torch.where(top_NK > -INF, top_NK.exp() * top_NK, 0.0).sum(1),
        "collision": p_NV.square().sum(1),
    }


def random_logits(vocab_size: int, num_rows: int = 6, scale: float = 4.0) -> Case:
    """Targets: the likeliest token, the unlikeliest, and any."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_NV = torch.randn(num_rows, vocab_size, generator=generator) * scale
    targets_N = torch.randint(vocab_size, (num_rows,), generator=generator)
    targets_N[0], targets_N[1] = logits_NV[0].argmax(), logits_NV[1].argmin()
    return logits_NV, targets_N


def random_cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for vocab_size in (512, 513, 1000, 32000, 151936, 151937):
        logits_NV, targets_N = random_logits(vocab_size)
        logits_NV *= torch.tensor([0.5, 0.5, 1.0, 2.0, 0.25, 8.0])[:, None]
        cases[f"random {vocab_size}"] = logits_NV, targets_N
    logits_NV, targets_N = random_logits(5001)
    cases["ties"] = logits_NV.round(), targets_N
    cases["one value"] = torch.full((1, 5001), -3.7), torch.tensor([4000])
    cases["ascending"] = logits_NV.sort(dim=1).values, torch.tensor([0, 5000, 2500, 4999, 2048, 2047])
    cases["descending"] = logits_NV.sort(dim=1, descending=True).values, torch.tensor([0, 5000, 2500, 1, 2048, 2047])
    cases["far from zero"] = logits_NV + torch.tensor([300.0, -300, 2e3, -2e3, 8e3, -8e3])[:, None], targets_N
    near_one = logits_NV.scatter(1, targets_N[:, None], logits_NV.logsumexp(1, keepdim=True) + 18)
    cases["probability near one"] = near_one, targets_N
    below = logits_NV.amax(1, keepdim=True) - torch.tensor([100.0, 200, 500, 800, 2000, 1e5])[:, None]
    cases["far below the maximum"] = logits_NV.scatter(1, targets_N[:, None], below), targets_N
    return cases


def cases_of_infinity() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    logits_NV, targets_N = random_logits(4 * BLOCK + 5)
    some_NV = torch.rand(logits_NV.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    cases["-inf here and there"] = logits_NV.masked_fill(some_NV.scatter(1, targets_N[:, None], False), -INF), targets_N
    cases["target of -inf"] = logits_NV.masked_fill(some_NV.scatter(1, targets_N[:, None], True), -INF), targets_N
    blocks_NV = logits_NV.clone()
    blocks_NV[0, :BLOCK] = blocks_NV[1, : 3 * BLOCK] = blocks_NV[2, BLOCK : 3 * BLOCK] = -INF
    blocks_NV[3, 2 * BLOCK :] = blocks_NV[4, 4 * BLOCK :] = blocks_NV[5, 1:] = -INF
    cases["blocks of -inf"] = blocks_NV, torch.tensor([BLOCK, 4 * BLOCK, 0, 7, 9, 0])
    cases["-inf but for the target"] = (
        torch.full((1, 3000), -INF).index_fill(1, torch.tensor(2999), 5),
        torch.tensor([2999]),
    )
    # Farther apart than float32 reaches: their difference is infinite, they are not.
    ends_NV = torch.tensor([[3e38, -3e38, 1.0], [-3e38, 3e38, 1.0], [-3e38, -3e38, -3e38]]).repeat(1, 1000)
    cases["ends of float32"] = ends_NV, torch.tensor([0, 2998, 1])
    return cases


def views() -> dict[str, Case]:
    """Logits inside a wider tensor whose other values would spoil every sum."""
    logits_NV, targets_N = random_logits(5001)
    wide = torch.full((2 * len(logits_NV), 5120), NAN)
    wide[::2, :5001] = logits_NV
    cases = {"cut on the right": (wide[::2, :5001], targets_N)}
    wide = torch.full((len(logits_NV), 5120), 1e4)
    wide[:, 7:5008] = logits_NV
    cases["cut on the left"] = wide[:, 7:5008], targets_N
    cases["columns apart"] = logits_NV.t().contiguous().t(), targets_N
    cases["one row for all"] = logits_NV[:1].expand(3, -1), torch.tensor([0, 1, 5000])
    return cases


CASES = {**random_cases(), **cases_of_infinity(), **views()}

ROWS_WITHOUT_SOFTMAX = {
    "nan": {1: NAN}, "nan of the target": {3000: NAN}, "+inf": {4999: INF}, "+inf of the target": {3000: INF},
    "two of +inf": {5: INF, 5 + BLOCK: INF}, "+inf and nan": {2: INF, 3: NAN}, "nan after -inf": {0: -INF, BLOCK: NAN},
    "no mass": dict.fromkeys(range(5001), -INF), "nan without mass": {**dict.fromkeys(range(5001), -INF), 77: NAN},
}  # fmt: skip


def without_softmax() -> Case:
    logits_NV = torch.randn(len(ROWS_WITHOUT_SOFTMAX), 5001, generator=torch.Generator().manual_seed(1))
    for row, values in enumerate(ROWS_WITHOUT_SOFTMAX.values()):
        logits_NV[row, list(values)] = torch.tensor(list(values.values()))
    return logits_NV, torch.full((len(logits_NV),), 3000)


def slices() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Arguments of `partial_sums` as ranks have them: the target here or elsewhere, its logit known to all."""
    logits_NV, targets_N = random_logits(5001)
    elsewhere_N = torch.full_like(targets_N, -1)
    own_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    nan_NV, nan_N = logits_NV.scatter(1, targets_N[:, None], NAN), torch.full_like(own_N, -INF)
    return {
        "target here": (logits_NV, own_N, targets_N),
        "target elsewhere": (logits_NV, torch.tensor([0.0, 1e3, -1e3, -INF, 5.0, float(logits_NV[5, 0])]), elsewhere_N),
        "no mass": (torch.full_like(logits_NV, -INF), own_N, elsewhere_N),
        "nan that a reduction has dropped": (nan_NV, nan_N, targets_N),
    }


def in_interpreter(tmp_path: Path, repository: Path, work: Any) -> Any:
    """What `worker` makes of `work` in a process with triton's interpreter."""
    torch.save(work, tmp_path / "work.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, tmp_path / "work.pt", tmp_path / "done.pt"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "done.pt")


def worker(work: dict[str, Any]) -> dict[str, Any]:
    """Statistics of `cases` and partial sums of `slices` by the kernel, and the statistics of rows far apart."""
    from shared import statistics_kernel

    statistics.uses_kernel = lambda logits_NV: True
    del statistics.partial_sums  # The torch form cannot stand in for the kernel.
    done: dict[str, Any] = {
        "cases": {name: statistics.token_statistics(*case, COLUMNS) for name, case in work["cases"].items()},
        "slices": {name: statistics_kernel.partial_sums(*each) for name, each in work["slices"].items()},
    }
    # A sparse file: 8 GiB of addresses, two pages of memory. Row 2 begins at element 2^31.
    flat = torch.from_file(work["sparse_file"], shared=True, size=(1 << 31) + 600)
    far_NV = flat.as_strided((3, 600), (1 << 30, 1))
    far_NV.copy_(work["far"][0])
    done["far"] = statistics.token_statistics(far_NV, work["far"][1], COLUMNS)
    return done


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Any:
    """All that this file has the kernel compute, in one process: its start takes longer than the work."""
    tmp_path = tmp_path_factory.mktemp("interpreter")
    cases = {**CASES, "without softmax": without_softmax(), "no rows": (torch.zeros(0, 7), torch.zeros(0).long())}
    work = {
        "cases": cases, "slices": slices(), "far": random_logits(600, 3), "sparse_file": str(tmp_path / "sparse")
    }  # fmt: skip
    return in_interpreter(tmp_path, repository, work)


@pytest.fixture(params=["torch", "triton"])
def statistics_of(request: pytest.FixtureRequest, by_kernel: Any) -> Callable[[str, Case], dict[str, Tensor]]:
    """Statistics of a named case by either form."""
    if request.param == "triton":
        return lambda name, case: by_kernel["cases"][name]
    return lambda name, case: statistics.token_statistics(*case, COLUMNS)


def refuse_errors(ours: dict[str, Tensor], case: Case) -> None:
    exact, naive = float64_statistics(case), naive_statistics(case)
    for column in COLUMNS:
        value, yardstick = ours[column].double().numpy(), naive[column].double().numpy()
        infinite = np.isinf(exact[column])
        np.testing.assert_array_equal(value[infinite], exact[column][infinite])
        value, yardstick, expected = (each[~infinite] for each in (value, yardstick, exact[column]))
        size = np.maximum(np.abs(expected), 1.0)
        error = np.abs(value - expected)
        assert (error <= np.abs(yardstick - expected) + 5e-7 * size).all(), (column, error, yardstick - expected)
        # So that a bad yardstick cannot excuse a bad result.
        assert (error <= 1e-6 * size).all(), (column, error)


@pytest.mark.parametrize("name", CASES)
def test_error_budget_against_float64(statistics_of, name: str):
    refuse_errors(statistics_of(name, CASES[name]), CASES[name])


def test_probability_near_one_keeps_its_digits(statistics_of):
    case = CASES["probability near one"]
    ours = statistics_of("probability near one", case)["logprob"].double().numpy()
    # 1 - p is 1.5e-8: in float32, log_softmax gives 0.
    exact = float64_statistics(case)["logprob"]
    assert (exact > -1e-7).all()
    np.testing.assert_allclose(ours, exact, rtol=3e-6)


@pytest.mark.parametrize("row", range(len(ROWS_WITHOUT_SOFTMAX)), ids=list(ROWS_WITHOUT_SOFTMAX))
def test_rows_without_a_softmax_are_nan_in_every_column(statistics_of, row: int):
    ours = statistics_of("without softmax", without_softmax())
    assert all(math.isnan(ours[column][row].item()) for column in COLUMNS), ours


def test_no_rows(statistics_of):
    ours = statistics_of("no rows", (torch.zeros(0, 7), torch.zeros(0).long()))
    assert {column: tuple(values.shape) for column, values in ours.items()} == dict.fromkeys(COLUMNS, (0,))


def test_rows_more_than_2_31_elements_apart(by_kernel):
    refuse_errors(by_kernel["far"], random_logits(600, 3))


@pytest.mark.parametrize("name", slices())
def test_partial_sums_of_a_slice(by_kernel, name: str):
    logits_NV, target_logit_N, local_target_N = slices()[name]
    ours = by_kernel["slices"][name].double()
    exact = statistics.partial_sums(logits_NV.double(), target_logit_N.double(), local_target_N)
    torch.testing.assert_close(ours[:, 0], exact[:, 0], rtol=0, atol=0, equal_nan=True)
    if name.startswith("nan"):
        assert ours[:, 0].isnan().all()
    else:  # Of a slice without a maximum the sums mean nothing.
        torch.testing.assert_close(ours[:, 1:], exact[:, 1:], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("capability", "vocab_size"), [(80, 151936), (90, 151936), (90, 320)])
def test_the_kernel_compiles_to_machine_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, vocab_size: int, aligned: bool
):
    # The interpreter takes what the compiler refuses. Compiling needs no GPU.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from shared import statistics_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants, options = statistics_kernel.launch_parameters(vocab_size)
    types = {
        "logits": "*fp32", "row_stride": "i32" if aligned else "i64", "target_logits": "*fp32",
        "local_targets": "*i64", "sums": "*fp32", "vocab_size": "i32",
    }  # fmt: skip
    # What a launch finds out by itself: the address of the logits, the distance of rows and their length.
    attributes: Any = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 5) if aligned}
    source = ASTSource(
        fn=statistics_kernel._row_sums, signature={**types, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants, attrs=attributes,
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    # Each logit is read once, and where rows are aligned in 16 bytes at a time.
    assert (".v4." in compiled.asm["ptx"]) == aligned


def test_the_kernel_is_for_float32_on_cuda_where_triton_is_there(monkeypatch: pytest.MonkeyPatch):
    def logits(device: str, dtype: torch.dtype) -> Any:
        return SimpleNamespace(is_cuda=device == "cuda", dtype=dtype)

    assert statistics.uses_kernel(logits("cuda", torch.float32))
    assert not statistics.uses_kernel(logits("cuda", torch.float64))
    assert not statistics.uses_kernel(logits("cpu", torch.float32))
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not statistics.uses_kernel(logits("cuda", torch.float32))


def test_without_triton_the_torch_form_still_works(repository: Path):
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from shared.statistics import token_statistics; "
        "print(token_statistics(torch.zeros(1, 4), torch.tensor([0]), ['collision'])['collision'].item())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0.25"


if __name__ == "__main__":
    torch.save(worker(torch.load(sys.argv[1])), sys.argv[2])

"""Fifty steps as they were when the numbers were written down: a change of any of them must be meant.

Where it is, `python tests/integration/test_golden_curve.py` writes the curve of the working tree in their place.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import Finished, demo_overrides, finish, metrics_of, score

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curve.tsv"
COLUMNS = ("loss", "nll", "grad_norm")
STEPS = 50
FORMS = {"packed": ["train.padding_free=true"], "padded": ["train.padding_free=false"]}
TWO_RANKS = ["train.micro_batch_tokens=300", "train.deepspeed.zero_optimization.stage=3"]


def case(store: Path, output: Path, *more: str) -> list[str]:
    """PriFT-prob with warm-up, cosine, clipping and weight decay, over six epochs."""
    return [
        f"train.scores={store}", f"train.output={output}", "train.method=prift_prob", "train.batch_size=12",
        "train.epochs=7", f"train.max_steps={STEPS}", "train.learning_rate=2e-4", "train.gradient_clipping=0.5",
        "train.seed=1", *more,
    ]  # fmt: skip


def curve_of(run: Path) -> list[list[float]]:
    """Rows of COLUMNS."""
    return [[line[column] for column in COLUMNS] for line in metrics_of(run)]


def test_the_curve_is_what_it_was_packed_and_padded(
    demo_store: Path, train_cases: Callable[..., Finished], tmp_path: Path
):
    one = [case(demo_store, tmp_path / name, *form) for name, form in FORMS.items()]
    for cases, ranks in ((one, 1), ([case(demo_store, tmp_path / "two", *TWO_RANKS)], 2)):
        done = train_cases(cases, ranks)
        assert done.code == 0, done.output
    golden = [list(map(float, line.split("\t"))) for line in GOLDEN.read_text().splitlines()[1:]]
    assert len(golden) == STEPS
    for name in (*FORMS, "two"):
        for step, (ours, theirs) in enumerate(zip(curve_of(tmp_path / name), golden, strict=True), start=1):
            assert ours == pytest.approx(theirs, rel=1e-4), (name, step)


def write_golden() -> None:
    """Write the curve of the working tree."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "pipeline.yaml").write_text(f"train: {{cache_dir: {folder / 'cache'}}}\n")
        score(folder / "pipeline.yaml", *demo_overrides(folder / "store"))
        (folder / "cases.json").write_text(json.dumps([case(folder / "store", folder / "run", *FORMS["packed"])]))
        runner = Path(__file__).with_name("run_cases.py")
        done = finish([sys.executable, str(runner), str(folder / "pipeline.yaml"), str(folder / "cases.json")])
        assert done.code == 0, done.output
        lines = ["\t".join(COLUMNS), *("\t".join(f"{value:.7g}" for value in row) for row in curve_of(folder / "run"))]
        GOLDEN.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_golden()

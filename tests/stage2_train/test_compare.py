"""The table and the picture of runs."""

import json
from pathlib import Path

import pytest

from shared.errors import UserError
from stage2_train.compare import compare, summarise


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [{"step": s, "loss": 1.0 / s, "nll": float(s), "tokens_per_second": 10.0 * s} for s in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evals = [{"step": s, "name": "held", "nll": 3.0 - s / 20, "nll_supported": None} for s in (0, 10, 20)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evals))
    (folder / "evaluation.json").write_text(json.dumps({"exact_answers": 0.25, "num_problems": 4}))
    return folder


def test_summary(run: Path):
    summary = summarise(run)
    assert summary.num_steps == 20
    assert summary.nll == 19.5  # mean of the last tenth: steps 19 and 20
    assert summary.tokens_per_second == 110.0  # median of steps 2 to 20
    assert summary.evaluation["held nll"] == (3.0, 2.0)
    assert summary.evaluation["exact_answers"][1] == 0.25
    assert set(summary.evaluation) == {"held nll", "exact_answers"}


def test_table_and_picture(run: Path, tmp_path: Path, capsys):
    compare([run], tmp_path / "curves.png")
    printed = capsys.readouterr().out
    assert "19.5000" in printed
    assert "3.000 → 2.000" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_sampled_nll_takes_the_place_of_the_exact_one_and_is_marked(run: Path, tmp_path: Path, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["nll_sampled"] = None
    lines[19] |= {"nll": None, "nll_sampled": 22.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare([run], tmp_path / "curves.png")
    assert "~20.5000" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="expected a training run"):
        summarise(tmp_path)

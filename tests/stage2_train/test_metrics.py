"""Metrics on disk."""

import json
from pathlib import Path

import pytest

from stage2_train.metrics import StepMetrics, TrainingProgress, append_line, cut_after, finite_or_none


def test_lines_after_the_checkpoint_are_cut_and_so_is_a_torn_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    cut_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    cut_after(path, 0)
    assert path.read_text() == ""
    cut_after(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_only_the_writer_writes(tmp_path: Path, capsys):
    metrics = StepMetrics(1, 0.5, None, 2.0, 90, 0.25, 0.75, 1.5, True, 1e-4, 100, 1234.0, 0.001)
    TrainingProgress(tmp_path, 1, 1, is_writer=False).record(metrics)
    assert not (tmp_path / "metrics.jsonl").exists()
    TrainingProgress(tmp_path, 1, 1, is_writer=True).record(metrics)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["weight_zero_fraction"] == 0.75
    assert "75% zero" in capsys.readouterr().out


def test_a_step_that_is_not_finite_is_valid_json_and_shown(tmp_path: Path, capsys):
    loss, norm = finite_or_none(float("nan")), finite_or_none(float("inf"))
    metrics = StepMetrics(1, loss, None, None, 0, None, 0.75, norm, False, 1e-4, 100, 1234.0, 0.001)
    TrainingProgress(tmp_path, 1, 1, is_writer=True).record(metrics)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (line["loss"], line["grad_norm"], line["update_applied"]) == (None, None, False)
    assert "loss not finite  weight not finite (75% zero)" in capsys.readouterr().out

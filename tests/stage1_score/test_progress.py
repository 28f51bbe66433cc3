"""Progress: plain lines where there is no terminal, not too many of them."""

import itertools

import pytest

import stage1_score.progress as progress_module
from stage1_score.progress import scoring_progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch):
    """A clock that a test sets."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock["now"])
    return clock


def test_lines_with_rate_and_time_left(seconds, capsys: pytest.CaptureFixture[str]):
    with scoring_progress(1000) as progress:
        seconds["now"] += 5
        progress.add(100, 5000)
        assert capsys.readouterr().out == ""  # too early for a line
        seconds["now"] += 15
        progress.add(100, 5000)
        assert capsys.readouterr().out == "200/1,000 rows, 10,000 tokens, 500 tokens/s, about 80 s left\n"
        progress.add(1, 1)
        assert capsys.readouterr().out == ""
        assert progress.tokens_per_second == pytest.approx(10_001 / 20)


def test_many_batches_make_few_lines(seconds, capsys: pytest.CaptureFixture[str]):
    with scoring_progress(1000) as progress:
        for _ in itertools.repeat(None, 1000):
            seconds["now"] += 0.1
            progress.add(1, 10)
    assert 9 <= len(capsys.readouterr().out.splitlines()) <= 10


def test_nothing_counted_has_a_rate_of_zero():
    with scoring_progress(10) as progress:
        assert progress.tokens_per_second == 0.0


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(progress_module.sys.stdout, "isatty", lambda: True)
    with scoring_progress(10) as progress:
        progress.add(10, 100)
    shown = capsys.readouterr().out
    assert "10/10 rows" in shown
    assert "tokens/s" in shown

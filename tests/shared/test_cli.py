"""Exit codes, and which rank speaks when."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from shared import cli
from shared.errors import CheckFailed, LostRank, UserError
from shared.stopping import Stopped


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were to be waited."""
    seconds: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", seconds.append)
    return seconds


def run(error: BaseException | None) -> int:
    def command() -> None:
        if error is not None:
            raise error

    return cli.exit_code_of(command, "prog")


CASES = [
    (None, 0, ""),
    (UserError("expected a, got b"), 2, "prog: expected a, got b\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 2, "prog: No space left on device: /data/x\n"),
    (CheckFailed("3 rows differ"), 3, "prog: 3 rows differ\n"),
    (Stopped(), 75, "prog: stopped; the same command goes on from the last finished shard or checkpoint\n"),
    (KeyboardInterrupt(), 75, "prog: stopped; the same command goes on from the last finished shard or checkpoint\n"),
    (LostRank("another process died"), 1, "prog: another process died\n"),
]


@pytest.mark.parametrize(("error", "code", "message"), CASES)
def test_one_line_and_its_code(
    error: BaseException | None, code: int, message: str, slept: list[float], capsys: pytest.CaptureFixture[str]
):
    assert run(error) == code
    assert capsys.readouterr().err == message
    # Rank 0 waits only where another rank may have a reason of its own to tell.
    assert bool(slept) == isinstance(error, LostRank)


@pytest.mark.parametrize(("error", "code", "message"), CASES)
def test_other_ranks_let_rank_0_speak_first_and_stop_without_a_word(
    error: BaseException | None,
    code: int,
    message: str,
    slept: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("RANK", "3")
    assert run(error) == code
    speaks = error is not None and code != 75
    assert capsys.readouterr().err == (f"[rank 3] {message}" if speaks else "")
    assert slept == ([10.0] if speaks else [])


@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.EIO, "Input/output error"), ValueError("ours")])
def test_a_defect_of_ours_keeps_its_traceback(error: Exception, slept: list[float]):
    with pytest.raises(type(error)):
        run(error)
    assert not slept


@pytest.mark.parametrize("code", [0, 3])
def test_a_library_that_aborts_on_the_way_out_does_not_take_the_exit_code(repository: Path, code: int):
    """The abort itself: an exit handler that kills, as a C++ thread that nobody joined does."""
    text = (
        "import atexit, os; from shared.cli import leave, leave_at_once_because_of\n"
        "atexit.register(os.abort); print('said'); {}leave({})"
    )
    for said, expected in (("", -6), ("leave_at_once_because_of('it'); ", code)):
        done = subprocess.run(
            [sys.executable, "-c", text.format(said, code)], cwd=repository, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected
        assert said == "" or done.stdout == "said\n"

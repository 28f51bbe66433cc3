"""What is tried again, what is not, and what is said of it."""

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from shared import retrying as module
from shared.errors import UserError
from shared.retrying import retrying
from shared.stopping import Stopped, stop_switch

URL = "s3://bucket/key"


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.01)


def client_error(code: str, status: int) -> Exception:
    errors = pytest.importorskip("botocore.exceptions")
    return errors.ClientError(
        {"Error": {"Code": code, "Message": f"of {code}"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def translated(code: str, status: int) -> Exception:
    """As s3fs raises it."""
    return pytest.importorskip("s3fs.errors").translate_boto_error(client_error(code, status))


def of_botocore(name: str, **fields: Any) -> Exception:
    return getattr(pytest.importorskip("botocore.exceptions"), name)(**fields)


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "done"

    return action


@pytest.mark.parametrize(
    "make",
    [
        lambda: ConnectionResetError("reset"),
        lambda: TimeoutError("late"),
        lambda: translated("SlowDown", 503),
        lambda: translated("InternalError", 500),
        lambda: translated("OperationAborted", 409),
        lambda: translated("BadGateway", 502),
        lambda: client_error("TooManyRequests", 429),
        lambda: of_botocore("EndpointConnectionError", endpoint_url="http://host"),
        lambda: of_botocore("ReadTimeoutError", endpoint_url="http://host"),
        lambda: of_botocore("ConnectionClosedError", endpoint_url="http://host"),
    ],
)
def test_what_passes_is_tried_again(make: Callable[[], Exception], capsys: pytest.CaptureFixture[str]):
    assert retrying(failing(3, make()), URL) == "done"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{URL}: ")
    assert lines[0].endswith("trying again for up to 300 seconds")
    assert "answers again after" in lines[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: translated("AccessDenied", 403), "permission refused (of AccessDenied)"),
        (lambda: translated("SignatureDoesNotMatch", 403), "permission refused"),
        (lambda: translated("ExpiredToken", 400), "permission refused"),
        (lambda: of_botocore("NoCredentialsError"), "no credentials"),
        (lambda: FileNotFoundError("The specified bucket does not exist"), "the bucket does not exist: create it"),
        (
            lambda: translated("EntityTooLarge", 400),
            "refused by the store or its client ([Errno 90] of EntityTooLarge)",
        ),
        (lambda: of_botocore("SSLError", endpoint_url="https://host", error="self-signed"), "refused by the store"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    make: Callable[[], Exception], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError) as raised:
        retrying(failing(1, make()), URL)
    assert str(raised.value).startswith(f"{URL}: ")
    assert message in str(raised.value)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError(URL), FileExistsError(URL), KeyError("ours")])
def test_what_the_caller_knows_is_left_to_it(error: Exception):
    with pytest.raises(type(error)):
        retrying(failing(1, error), URL)


def test_each_outage_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """That there is no such object is an answer too, and so is a refusal."""

    def answers(*errors: Exception) -> Callable[[], None]:
        left = list(errors)

        def action() -> None:
            raise left.pop(0)

        return action

    reset = ConnectionResetError("reset")
    with pytest.raises(FileNotFoundError):
        retrying(answers(reset, reset, FileNotFoundError(URL)), URL)
    with pytest.raises(UserError):
        retrying(answers(reset, PermissionError("no")), URL)
    assert retrying(failing(1, reset), URL) == "done"
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    for _ in range(2):
        with pytest.raises(UserError):
            retrying(failing(1000, reset), URL)
    told = [line.split(": ", 1)[1].split(" ")[0] for line in capsys.readouterr().err.splitlines()]
    assert told == ["reset;", "answers"] * 3 + ["reset;"] * 2


def test_it_gives_up_at_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no answer for 0 seconds .*reset.*the same command goes on"):
        retrying(failing(1000, ConnectionResetError("reset")), URL)
    assert 0.3 < time.monotonic() - started < 5


def test_it_waits_longer_each_time(monkeypatch: pytest.MonkeyPatch):
    waits: list[float] = []
    monkeypatch.setattr(module, "_sleep", waits.append)
    retrying(failing(14, ConnectionResetError()), URL)
    assert all(0.5 <= wait / min(0.01 * 2**number, 15) <= 1 for number, wait in enumerate(waits))
    assert len(waits) == 14
    assert waits[-1] >= 7.5


def test_credentials_of_an_address_are_not_told():
    error = OSError(5, 'Could not reach "http://me:secret@host/bucket/key?X-Amz-Signature=secret"')
    with pytest.raises(UserError) as raised:
        retrying(failing(1, error), URL)
    assert "secret" not in str(raised.value)
    assert "http://***@host/bucket/key?***" in str(raised.value)


def test_a_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_FIRST_WAIT", 60.0)
    started = time.monotonic()
    with stop_switch([signal.SIGUSR1]):
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Stopped):
            retrying(failing(1, ConnectionResetError()), URL)
    assert time.monotonic() - started < 5

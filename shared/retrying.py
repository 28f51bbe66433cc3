"""Waiting out an outage of an object store: what will pass is tried again, what will not is the user's mistake.

Errors are told apart by their HTTP status and the names of their types, so that no client library is imported here.
"""

import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from shared.errors import UserError, first_line
from shared.stopping import check_stop

PATIENCE_SECONDS = 300.0
"""How long one operation is tried again before the run gives up."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0

_PASSING_STATUS = {408, 409, 425, 429}
"""Besides 5xx. 409: two conditional writes met; S3 asks that the one that lost be tried again."""
_PASSING_TYPES = {
    "builtins.ConnectionError", "builtins.TimeoutError", "asyncio.TimeoutError", "socket.gaierror",
    "botocore.ConnectionError", "botocore.HTTPClientError", "botocore.FlexibleChecksumError",
    "botocore.IncompleteReadError", "botocore.ResponseParserError", "aiohttp.ClientError", "http.IncompleteRead",
    "httpx.TransportError", "requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError",
    "fsspec.FSTimeoutError",
}  # fmt: skip
"""Package and name of the types that say that a server was not reached, or went away in the middle."""
_LASTING_TYPES = {
    "botocore.SSLError", "requests.SSLError", "ssl.SSLCertVerificationError", "huggingface_hub.OfflineModeIsEnabled",
}  # fmt: skip
_OF_A_CLIENT = {"builtins.OSError", "botocore.BotoCoreError", "botocore.ClientError", "google.GoogleAuthError"}

_Result = TypeVar("_Result")
_lock = threading.Lock()
_waiting_since: float | None = None


def retrying(action: Callable[[], _Result], url: str) -> _Result:
    """Do something with an object store; while it does not answer, wait and try again.

    Args:
        action: may be done more than once.
        url: what it is about, for messages.

    Raises:
        FileNotFoundError: there is no such object.
        FileExistsError: it was to be created, and is there.
        UserError: what will not pass, such as a bucket that is not there or a lack of rights; or an outage that
            lasted longer than PATIENCE_SECONDS.
        Stopped: a signal came while it waited.
    """
    started: float | None = None
    wait = _FIRST_WAIT
    while True:
        try:
            result = action()
        except Exception as error:
            if not _is_passing(error):
                if started is not None:
                    _say_goes_on(url)  # a refusal is an answer too
                reason = _lasting_reason(error)
                if reason is None:
                    raise
                raise UserError(f"{url}: {reason}") from None
            now = time.monotonic()
            started = now if started is None else started
            if now - started > PATIENCE_SECONDS:
                _forget_waiting()
                raise UserError(
                    f"{url}: no answer for {PATIENCE_SECONDS:.0f} seconds ({_in_words(error)}); what is finished "
                    "stays, and the same command goes on once the store answers"
                ) from None
            _say_waiting(url, error)
            _sleep(wait * random.uniform(0.5, 1.0))
            wait = min(2 * wait, _LONGEST_WAIT)
        else:
            if started is not None:
                _say_goes_on(url)
            return result


def _sleep(seconds: float) -> None:
    """Sleep, but not on into a stop that was asked for."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check_stop()
        time.sleep(min(left, 0.5))
    check_stop()


def _say_waiting(url: str, error: Exception) -> None:
    """One line for an outage, however many threads meet it."""
    global _waiting_since
    with _lock:
        if _waiting_since is None:
            _waiting_since = time.monotonic()
            _say(f"{url}: {_in_words(error)}; trying again for up to {PATIENCE_SECONDS:.0f} seconds")


def _say_goes_on(url: str) -> None:
    global _waiting_since
    with _lock:
        if _waiting_since is not None:
            _say(f"{url}: answers again after {time.monotonic() - _waiting_since:.0f} seconds")
            _waiting_since = None


def _forget_waiting() -> None:
    global _waiting_since
    with _lock:
        _waiting_since = None


def _say(line: str) -> None:
    # Not on standard output, which may be a verb's JSON; of the ranks of a node one speaks.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _lasting_reason(error: Exception) -> str | None:
    """Why the operation will not succeed however often it is tried, with what to do; None where it may, or where the
    caller knows what it means."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, FileNotFoundError | FileExistsError):
        missing = "bucket" in str(error).lower() and "not exist" in str(error).lower()
        return "the bucket does not exist: create it, or correct the name" if missing else None
    names = set(_type_names(error))
    if isinstance(error, PermissionError) or _status(error) in (401, 403):
        return (
            f"permission refused ({_in_words(error)}): the credentials in the environment need the rights to read, "
            "list and, for a store that is written, write there"
        )
    if names & {"botocore.NoCredentialsError", "botocore.PartialCredentialsError"}:
        return f"no credentials ({_in_words(error)}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
    if names & _OF_A_CLIENT or _status(error) is not None:
        return f"refused by the store or its client ({_in_words(error)})"
    return None


def _is_passing(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in _PASSING_STATUS or status >= 500
    names = {name for each in _causes(error) for name in _type_names(each)}
    return bool(names & _PASSING_TYPES) and not names & _LASTING_TYPES


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer that an error, or what it was made from, speaks of."""
    for each in _causes(error):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(response, "status_code", getattr(each, "status", getattr(each, "code", None)))
        if isinstance(status, int | str) and re.fullmatch(r"[1-5]\d\d", str(status)):
            return int(status)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    while each is not None:
        yield each
        each = each.__cause__


def _type_names(error: BaseException) -> Iterator[str]:
    return (f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__)


def _in_words(error: BaseException) -> str:
    """An error's first line, without what a URL in it may hold of credentials."""
    line = first_line(error) if isinstance(error, Exception) else type(error).__name__
    return re.sub(r"//[^/@\s]*@", "//***@", re.sub(r"\?[^\s\"']*=[^\s\"']*", "?***", line))

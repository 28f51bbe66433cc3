"""What the commands have in common: exit codes, and errors shown as one line. Imports no torch."""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from shared.errors import CheckFailed, LostRank, UserError
from shared.files import remove_scratch
from shared.places import Place, local_place, place

DONE, FAILED, USER_MISTAKE, CHECK_FAILED, STOPPED = 0, 1, 2, 3, 75

_USER_ERRNOS = {
    errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST,
}  # fmt: skip


_SECONDS_FOR_THE_FIRST = 10.0
_libraries_that_abort: set[str] = set()


def leave_at_once_because_of(library: str) -> None:
    """Say that a library ran here whose threads may abort the interpreter on its way out."""
    _libraries_that_abort.add(library)


def leave(code: int) -> NoReturn:
    """End the process with an exit code.

    Where a library may abort the interpreter's ending ("terminate called without an active exception"), the ending is
    left out, or the code would be lost: everything written is closed by then.
    """
    if _libraries_that_abort:
        remove_scratch()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def place_argument(text: str) -> Place:
    """A path or URL on a command line."""
    try:
        return place(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_argument(text: str) -> Path:
    """A local path on a command line."""
    try:
        return local_place(text, "OUT")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def exit_code_of(command: Callable[[], None], program: str) -> int:
    """Run a command; print the user's mistakes and failed checks as one line each, and return the exit code.

    What is neither is a defect of ours: it is raised on, with its traceback.
    """
    try:
        command()
    except CheckFailed as error:
        return _report(f"{program}: {error}", CHECK_FAILED)
    except KeyboardInterrupt:
        # All ranks of a training stop together, and a grace period is short: no rank waits to speak.
        if not _rank():
            _report(f"{program}: stopped; the same command goes on from the last finished shard or checkpoint", STOPPED)
        return STOPPED
    except LostRank as error:
        # The one that is lost may have had a reason of its own, and exits with its code: it comes first, also where
        # this is rank 0, which waits for nobody else.
        if not _rank():
            time.sleep(_SECONDS_FOR_THE_FIRST)
        return _report(f"{program}: {error}", FAILED)
    except (UserError, OSError) as error:
        mistake = mistake_in_words(error)
        if mistake is None:
            raise
        return _report(f"{program}: {mistake}", USER_MISTAKE)
    return DONE


def mistake_in_words(error: Exception) -> str | None:
    """What the user can mend, such as a full disk, as one message; None where the error is no mistake of the user."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _USER_ERRNOS:
        return f"{error.strerror}: {error.filename or 'while writing'}"
    return None


def _report(message: str, code: int) -> int:
    """Print a message once per job: ranks other than 0 hold back while rank 0, which meets the same, speaks."""
    if rank := _rank():
        # The launcher ends the other ranks when rank 0 exits; whoever is still there has met something of its own.
        time.sleep(_SECONDS_FOR_THE_FIRST)
        message = f"[rank {rank}] {message}"
    sys.stdout.flush()  # what was said before the error must not come after it in a log
    print(message, file=sys.stderr, flush=True)
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))

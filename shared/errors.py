"""Errors that are shown as one line, without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one clear line, exit code 2, no traceback.

    The message says what was expected, what came, where, and what to do about it.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something; its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class CheckFailed(Exception):
    """A check that the user asked for did not hold: exit code 3."""


class LostRank(Exception):
    """Another process of the run died or does not answer: exit code 1; the same command goes on."""

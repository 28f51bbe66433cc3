"""The one exception that stands for a mistake of the user."""


class UserError(ValueError):
    """A mistake that the user can mend: one clear line, exit code 2, no traceback.

    The message says what was expected, what came, where, and what to do about it.
    """


class CheckFailed(Exception):
    """A check that the user asked for did not hold: exit code 3."""

"""Errors that a user can mend: each names the value, what is allowed, and what to do."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that would control a terminal, or the direction of the text after them."""


def printable(text: str) -> str:
    """Text of data, such as captions and names of files, without control characters."""
    return _CONTROL.sub("", text)


def first_line(error: BaseException) -> str:
    """The message of an error, in one line without a full stop; its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"; "1 class", "2 classes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


class SciflowError(ValueError):
    """A mistake in options, files or data. Recipes print it without a traceback and exit with status 2."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class CacheError(SciflowError):
    """A cache that cannot be used: names the file, the row and the column."""


class DiskFullError(SciflowError):
    """A file that could not be written because no room was left. During training it costs a save, not the run."""


class Preempted(SystemExit):
    """Training was stopped by SIGTERM or SIGUSR1, and is saved: exit status 75, which asks to be started again.

    75 is EX_TEMPFAIL of sysexits.h. It is a `SystemExit`, so that a script needs no code to end rightly.
    """

    status = 75

    def __init__(self) -> None:
        super().__init__(self.status)

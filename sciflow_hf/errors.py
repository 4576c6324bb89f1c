"""Errors that a user can mend: each names the value, what is allowed, and what to do."""


class SciflowError(ValueError):
    """A mistake in options, files or data. Recipes print it without a traceback and exit with status 2."""


class CacheError(SciflowError):
    """A cache that cannot be used: names the file, the row and the column."""

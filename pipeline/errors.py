"""Errors that are the user's to mend: one line, no traceback."""

import difflib
from collections.abc import Iterable

from cache.redaction import one_line, redacted

LONGEST_NAME = 100  # comparing takes time that grows with its square


class UserError(Exception):
    """What went wrong, by which rule, what was found, and the way out, in one line; URLs without login and query."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


def nearest(name: object, known: Iterable[object]) -> str:
    """A hint "; did you mean 'x'?" for a name that is not among `known`, or nothing if none is close."""
    if len(text := str(name)) > LONGEST_NAME:
        return ""
    match = difflib.get_close_matches(text, [str(k) for k in known], n=1)
    return f"; did you mean {match[0]!r}?" if match else ""

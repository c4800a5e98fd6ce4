"""Errors that are the user's to mend: one line, no traceback."""

import difflib
import errno
import os
from collections.abc import Iterable

from h2t.cache.redaction import one_line, redacted

LONGEST_NAME = 100  # comparing takes time that grows with its square


class UserError(Exception):
    """What went wrong, by which rule, what was found, and the way out, in one line; URLs without login and query."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG}
#: How torch, threads and the loader of libraries say that memory is at its limit, where they do not raise MemoryError.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread", "map segment")


def of_the_machine(error: BaseException) -> UserError | None:
    """`error` as what the machine lacks, a disk to write to or memory; None if it is neither."""
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        why = os.strerror(error.errno)
        return UserError(f"{error.filename or 'disk'}: {why}; make room or change its owner, and run again")
    known = isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in NO_MEMORY)
    if known or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        said = next(iter(str(error).splitlines()), "").rstrip(". ") or "there is not enough"
        return UserError(f"memory: {said}; raise the limit, or end other programs, and run again")
    return None


def nearest(name: object, known: Iterable[object]) -> str:
    """A hint "; did you mean 'x'?" for a name that is not among `known`, or nothing if none is close."""
    if len(text := str(name)) > LONGEST_NAME:
        return ""
    match = difflib.get_close_matches(text, [str(k) for k in known], n=1)
    return f"; did you mean {match[0]!r}?" if match else ""

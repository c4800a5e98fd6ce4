"""The only exception of this package: a reason from a fixed set and a one-line message."""

import errno

from h2t.cache.redaction import one_line, redacted

#: Errors of a path where nothing can be made: below a file, in /proc, by too long a name.
NO_PLACE = frozenset({errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP})
REASONS = frozenset(
    {
        "busy",  # another process holds the staging directory
        "closed",  # the cache was closed, here or by another thread
        "damaged",  # bytes differ from what was committed
        "exists",  # the target already holds something else
        "full",  # no disk space or memory left
        "incomplete",  # commit was called before every shard was written
        "mismatch",  # two values that must agree do not
        "missing",  # a file or row that should exist does not
        "newer-format",  # written by a later version of this software
        "out-of-range",  # the cache has no such row or expert
        "replaced",  # the files are no longer the ones that were opened
        "spec",  # an invalid cache specification or row table
        "unreachable",  # a remote store refused or broke off
        "unwritable",  # a read-only disk or missing write permission
        "uncommitted",  # the directory has no commit record, so it is not a cache
    }
)


class CacheError(Exception):
    """Raised for every problem with a cache.

    `reason` is one of `REASONS`, for programs. `detail` is one line for people: what is wrong, the rule, the value
    found, and what to do. Logins and query strings are removed from URLs in it, so a message never repeats a password
    or token. Control characters in it are escaped, so names from data cannot start a new line or control a terminal.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason
        self.detail = one_line(redacted(detail))
        super().__init__(self.detail)

    def __reduce__(self) -> tuple[type["CacheError"], tuple[str, str]]:
        return CacheError, (self.reason, self.detail)  # workers of a cluster send it


def numbered(what: str, first: int, last: int) -> str:
    """A range of numbers for a message, `last` included: "row 7" or "rows 6 to 7"."""
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"


class CacheWarning(UserWarning):
    """A guarantee that a cache cannot give on the store it is read from."""

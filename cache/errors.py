"""The one exception of this package: a reason from a fixed set, and one line that says what to do."""

from h2t.cache.redaction import one_line, redacted

REASONS = frozenset(
    {
        "busy",  # another process holds the staging directory
        "closed",  # the cache was closed before, or by another thread
        "damaged",  # bytes differ from what was committed
        "exists",  # the target holds something else
        "full",  # no space left
        "incomplete",  # a commit was asked for before every shard was written
        "mismatch",  # two things that must agree do not
        "missing",  # a file or row that should be there is not
        "newer-format",  # written by a later version of this software
        "out-of-range",  # a row or expert number the cache does not have
        "replaced",  # the files are no longer those that were opened
        "spec",  # a specification that no cache can have
        "unreachable",  # a remote store refuses, or breaks off
        "unwritable",  # a read-only disk, or someone else's folder
        "uncommitted",  # a directory without a commit record is not a cache
    }
)


class CacheError(Exception):
    """Raised for every problem with a cache.

    `reason` is one of `REASONS`, for programs; `detail` is one line for people: what, rule, got, way out. URLs in it
    lose their login and their query here, so that no message can repeat a password or a token, and names that came from
    data can neither begin a line nor steer a terminal.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise ValueError(f"unknown reason {reason!r}")
        self.reason = reason
        self.detail = one_line(redacted(detail))
        super().__init__(self.detail)


class CacheWarning(UserWarning):
    """What a cache cannot promise where it lies."""

"""What is requested of a store and what comes back: bytes at a minimum rate, and the version of their file."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Span = tuple[int, int]
Take = Callable[[bytes], object]  # receives the pieces of a body in order

LEAST_RATE = 1000  # bytes per second that a store must send, averaged over each window, until its answer is complete
WINDOW = 30.0  # seconds
TIMES = ("mtime", "LastModified", "Last-Modified", "last_modified", "updated", "modified", "created")


class Unasked(ValueError):
    """The answer is not what was requested: encoded, too long, or another range."""


class TooSlow(ValueError):
    """The store sent fewer than `LEAST_RATE` bytes per second over a window."""


class Version(NamedTuple):
    """Identifies one version of a file: an ETag, or its size in bytes and the time of its last change."""

    tag: str | None = None
    size: int | None = None
    time: tuple[str, str] | None = None  # (field name, value); stores have several fields with different times

    @property
    def known(self) -> bool:
        """True if a replaced file would have another version."""
        return bool(self.tag or self.time)

    def differs(self, other: "Version") -> bool:
        """True if a field that both versions have is different; an ETag decides alone."""
        if self.tag and other.tag:
            return self.tag != other.tag
        if None not in (self.size, other.size) and self.size != other.size:
            return True
        return bool(self.time and other.time and self.time[0] == other.time[0] and self.time[1] != other.time[1])


class Answer(NamedTuple):
    """Bytes from a store, and the version of the file that they are from."""

    data: bytes | memoryview
    version: Version


class WholeFile(NamedTuple):
    """All bytes of a file, and its version."""

    data: bytes
    version: Version


def range_header(span: Span) -> str:
    """The HTTP header `Range` for a span."""
    return f"bytes={span[0]}-{span[1] - 1}"


def content_range(header: str) -> tuple[int | None, int | None]:
    """First byte and file size in a header `bytes FIRST-LAST/SIZE`, each None if it is not given."""
    unit, _, told = header.partition(" ")
    if unit != "bytes":
        return None, None
    part, _, size = told.partition("/")
    first = part.partition("-")[0]
    return int(first) if first.isdecimal() else None, int(size) if size.isdecimal() else None


def version_of(about: Mapping[str, Any]) -> Version:
    """The version of a file, from fsspec's details about it or from the headers of an HTTP answer."""
    tag = str(about.get("ETag") or about.get("etag") or "").removeprefix("W/").strip('"')
    size = about.get("size")
    changed = next(((key, _timed(about[key])) for key in TIMES if about.get(key)), None)
    return Version(tag or None, None if size is None else int(size), changed)


def _timed(value: Any) -> str:
    """A time as text: listings and single files give the same time in different types."""
    seconds = value.timestamp() if isinstance(value, datetime) else value
    return f"{seconds:.3f}" if isinstance(seconds, (int, float)) else str(seconds)


class Pace:
    """Counts the bytes received from a store over all its requests, as some requests wait while others are served."""

    def __init__(self) -> None:
        self.window, self.count = WINDOW, 0
        self._lock, self._process = threading.Lock(), os.getpid()

    def came(self, size: int) -> None:
        """Adds received bytes."""
        if self._process != os.getpid():  # forked, perhaps while another thread held the lock
            self._lock, self._process = threading.Lock(), os.getpid()
        with self._lock:
            self.count += size


class Patience:
    """Waits for the answer to one question, over all its tries, as long as the store sends at least `LEAST_RATE`."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._begin()

    def _begin(self) -> None:
        self._had, self._until = self.pace.count, time.monotonic() + self.pace.window

    def result(self, fs: Any, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """The result of `work`, run in the event loop of `fs`.

        Raises TooSlow if the store is; with `seconds`, if the answer is not complete after that time.
        """
        future = asyncio.run_coroutine_threadsafe(work, fs.loop)
        try:
            self.wait([future], seconds=seconds)
        finally:
            future.cancel()
        return future.result()

    def wait(self, futures: Sequence[Future[Any]], *, seconds: float | None = None) -> None:
        """Returns once all `futures` are done; raises as `result`."""
        if seconds is not None:
            self._until = time.monotonic() + seconds
        while wait(futures, self.left).not_done:
            self.check(seconds=seconds)

    @property
    def left(self) -> float:
        """Seconds until the window ends, at least 0."""
        return max(0.0, self._until - time.monotonic())

    def check(self, *, seconds: float | None = None) -> None:
        """Begins another window if one has ended. Raises as `result`."""
        if self.left:
            return
        if seconds is not None or self.pace.count - self._had < LEAST_RATE * self.pace.window:
            raise TooSlow(f"fewer than {LEAST_RATE} bytes/s over {seconds or self.pace.window:g} s")
        self._begin()

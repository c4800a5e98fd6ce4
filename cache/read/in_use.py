"""Closing while others work: who is inside is let finish, and nobody else comes in."""

import threading
from types import TracebackType

from h2t.cache.errors import CacheError


class InUse:
    """A context manager that each user enters; `close` waits until all have left. May be entered again by its thread.

    Entering after `close` raises CacheError `closed`, which names `what`.
    """

    def __init__(self, what: object) -> None:
        self._what = what
        self._inside: dict[int, int] = {}  # thread -> how often it is inside
        self._closed = False
        self._new_lock()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._closed and me not in self._inside:
                raise CacheError("closed", f"{self._what}: this cache was closed; open it again")
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        me = threading.get_ident()
        with self._lock:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
                if self._closed:
                    self._left.notify_all()

    def close(self) -> None:
        """Lets nobody in from now on and waits for the other threads that are inside.

        Its own thread is not waited for: Ctrl-C may have kept it from noting that it left.
        """
        me = threading.get_ident()
        with self._lock:
            self._closed = True
            self._left.wait_for(lambda: not self._inside.keys() - {me})

    def after_fork(self) -> None:
        """In a forked child: forgets the parent's threads, which do not exist here."""
        self._inside = {}
        self._new_lock()

    def _new_lock(self) -> None:
        self._lock = threading.Lock()  # taken by itself, as a Condition takes it several times more slowly
        self._left = threading.Condition(self._lock)

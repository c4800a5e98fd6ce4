"""Closing a resource that other threads use: current users finish, new ones are refused."""

import threading
from types import TracebackType

from h2t.cache.errors import CacheError


class InUse:
    """A context manager that every use of a resource enters; `close` waits until all have left. Reentrant.

    Entering it after `close` raises CacheError `closed`, whose message begins with `what`.
    """

    def __init__(self, what: object) -> None:
        self._what = what
        self._inside: dict[int, int] = {}  # thread -> how many times it has entered
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
        """Refuses new users and waits until all other threads have left.

        It does not wait for its own thread, because Ctrl-C may have interrupted `__exit__` there.
        """
        me = threading.get_ident()
        with self._lock:
            self._closed = True
            self._left.wait_for(lambda: not self._inside.keys() - {me})

    def after_fork(self) -> None:
        """Forgets the parent's threads in a forked child, where they do not exist."""
        self._inside = {}
        self._new_lock()

    def _new_lock(self) -> None:
        self._lock = threading.Lock()  # used directly, which is several times faster than through the Condition
        self._left = threading.Condition(self._lock)

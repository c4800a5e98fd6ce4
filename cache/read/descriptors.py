"""The file descriptors that all local caches of a process keep open, together no more than the process can spare."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from h2t.cache.machine import open_files

MAX_OPEN = 256  # kept open while unused, of all caches together; fewer where the process may open few

#: A file descriptor, and the size in bytes and mtime in ns that its file had when it was opened.
Opened = tuple[int, int, int]
#: Number of a store (`LocalFiles`) and name of a file in it.
Key = tuple[int, str]


class Descriptors:
    """Descriptors in use, at most half of those that the process may have, and a fourth, `MAX_OPEN` at most, unused."""

    def __init__(self) -> None:
        self._open: OrderedDict[Key, Opened] = OrderedDict()
        self._busy: dict[int, int] = {}
        self._changed = threading.Condition(threading.RLock())  # a signal handler may fork while it is held

    @contextmanager
    def held(self, keys: Sequence[Key], new: Callable[[str], Opened]) -> Iterator[list[Opened]]:
        """Descriptors of `keys`, open inside the context; `new` opens the file of a name. Never enter it twice.

        Waits for other threads where all together would open too many. A thread waits before it holds any, so no two
        wait for each other.
        """
        held: list[Opened] = []
        room = open_files()
        with self._changed:
            while self._busy and len(self._busy) + len(keys) > room // 2:
                self._changed.wait()
            try:
                for key in keys:
                    held.append(self._acquire(key, new))  # noqa: PERF401 - if one fails, the others are released below
                self._close_idle(min(MAX_OPEN, room // 4))
            except BaseException:
                self._release(held)
                raise
        try:
            yield held
        finally:
            with self._changed:
                self._release(held)

    def close(self, store: int) -> None:
        """Closes those of one store, which nobody may use any more."""
        with self._changed:
            for key in [key for key in self._open if key[0] == store]:
                os.close(self._open.pop(key)[0])

    def before_fork(self) -> None:
        self._changed.acquire()

    def after_fork_in_parent(self) -> None:
        self._changed.release()

    def after_fork_in_child(self) -> None:
        """Forgets the parent's other threads, which do not exist here."""
        self._busy = {}
        self._changed = threading.Condition(threading.RLock())

    def _acquire(self, key: Key, new: Callable[[str], Opened]) -> Opened:
        opened = self._open.get(key)
        if opened is None:
            opened = self._open[key] = new(key[1])
        else:
            self._open.move_to_end(key)
        self._busy[opened[0]] = self._busy.get(opened[0], 0) + 1
        return opened

    def _release(self, held: Sequence[Opened]) -> None:
        for handle, *_ in held:
            self._busy[handle] -= 1
            if not self._busy[handle]:
                del self._busy[handle]
        self._changed.notify_all()

    def _close_idle(self, most: int) -> None:
        """Closes the least recently used idle descriptors until at most `most` are left."""
        if len(self._open) > most:
            idle = [key for key, (handle, *_) in self._open.items() if handle not in self._busy]
            for key in idle[: len(self._open) - most]:
                os.close(self._open.pop(key)[0])


DESCRIPTORS = Descriptors()
os.register_at_fork(
    before=DESCRIPTORS.before_fork,
    after_in_parent=DESCRIPTORS.after_fork_in_parent,
    after_in_child=DESCRIPTORS.after_fork_in_child,
)

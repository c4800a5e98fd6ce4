"""Progress bars: updated five times a second in a terminal, every ten seconds in a log."""

import math
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# No monitor thread: if a thread cannot start for lack of memory, Python waits for it forever.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())  # its own holds a semaphore too, which a killed process leaves behind, with a warning

_hidden = False


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar that Ctrl-C may interrupt while it is made: Python still calls its `close`, which needs these."""

    start_t = math.inf  # never displayed
    last_print_t = 0.0
    delay = 1.0
    pos = 0
    gui = False


@contextmanager
def hidden(hide: bool) -> Iterator[None]:
    """With `hide`, `progress` shows no bars in the block."""
    global _hidden
    before, _hidden = _hidden, hide
    try:
        yield
    finally:
        _hidden = before


def progress(
    items: Iterable[Any] | None,
    what: str,
    *,
    unit: str,
    total: int | None = None,
    disable: bool = False,
    **more: Any,
) -> Any:
    """A tqdm bar over `items` that appears after one second. With None for `items`, the caller updates the bar."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return Bar(
        items,
        what,
        total=total,
        unit=unit,
        delay=1,
        dynamic_ncols=True,
        mininterval=interval,
        disable=disable or _hidden,
        **more,
    )

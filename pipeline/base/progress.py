"""Progress bars: updated five times a second in a terminal, every ten seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# No monitor thread: if a thread cannot start for lack of memory, Python waits for it forever.
tqdm.monitor_interval = 0


def progress(items: Iterable[Any] | None, what: str, *, unit: str, total: int | None = None, **more: Any) -> Any:
    """A tqdm bar over `items` that appears after one second. With None for `items`, the caller updates the bar."""
    quick = sys.stderr.isatty()
    return tqdm(
        items, what, total=total, unit=unit, delay=1, dynamic_ncols=True, mininterval=0.2 if quick else 10, **more
    )

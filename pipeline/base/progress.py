"""Progress bars: lively in a terminal, a line every ten seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# A thread less: one that finds no memory at its start makes Python wait for it for ever.
tqdm.monitor_interval = 0


def progress(items: Iterable[Any] | None, what: str, *, unit: str, total: int | None = None, **more: Any) -> Any:
    """A tqdm bar over `items` (or to be updated by hand, for None) that appears after a second."""
    quick = sys.stderr.isatty()
    return tqdm(
        items, what, total=total, unit=unit, delay=1, dynamic_ncols=True, mininterval=0.2 if quick else 10, **more
    )

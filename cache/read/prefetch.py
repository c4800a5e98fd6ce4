"""Background reads in order: while one window is used, the next is being read; errors surface where they belong."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Meter:
    """What reading cost. `waited` and `worked` in seconds: for a window, and between windows; bytes read and used."""

    waited: float = 0.0
    worked: float = 0.0
    bytes_read: int = 0
    bytes_used: int = 0
    draws: int = 0
    hits: int = 0

    @property
    def stall(self) -> float:
        """Share of the time that was spent waiting for data."""
        total = self.waited + self.worked
        return self.waited / total if total else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the receivers' draws that the hot set served; None where nothing is streamed."""
        return self.hits / self.draws if self.draws else None


def in_background(jobs: Iterable[Callable[[], T]], *, ahead: int = 1, meter: Meter | None = None) -> Generator[T]:
    """The results of `jobs`, in order, each computed in one background thread at most `ahead` before it is asked for.

    So at most `ahead` + 1 results exist at a time. A job's exception is raised in place of its result. Closing the
    generator (also by Ctrl-C in the loop over it) waits for the job that runs and starts no other.
    """
    meter = meter or Meter()
    source = iter(jobs)
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, "prefetch") as thread:
        try:
            while True:
                while len(pending) < ahead and (job := next(source, None)) is not None:
                    pending.append(thread.submit(job))
                if not pending:
                    return
                asked = time.perf_counter()
                result = pending.popleft().result()
                if (job := next(source, None)) is not None:
                    pending.append(thread.submit(job))
                meter.waited += (given := time.perf_counter()) - asked
                yield result
                del result  # the consumer's copy is the only one now
                meter.worked += time.perf_counter() - given
        finally:
            for future in pending:
                future.cancel()

"""Reads ahead in a background thread: while one window is used, the next is read."""

import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Meter:
    """The cost of reading.

    `waited` and `worked` are seconds spent waiting for windows and using them. `bytes_read` and `bytes_used` count what
    was read and what of it was used. `draws` and `hits` count the receivers' draws and those served by the hot set.
    """

    waited: float = 0.0
    worked: float = 0.0
    bytes_read: int = 0
    bytes_used: int = 0
    draws: int = 0
    hits: int = 0

    @property
    def stall(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        total = self.waited + self.worked
        return self.waited / total if total else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the receivers' draws served by the hot set, 0 to 1; None if nothing is streamed."""
        return self.hits / self.draws if self.draws else None


def in_background(jobs: Iterable[Callable[[], T]], *, meter: Meter | None = None) -> Generator[T]:
    """Yields the results of `jobs` in order, computed in one background thread one job in advance.

    So at most two results exist at a time. An exception of a job is raised in place of its result. Closing the
    generator (also by Ctrl-C in the loop over it) waits for the running job and starts no other.
    """
    meter = meter or Meter()
    source = iter(jobs)
    with ThreadPoolExecutor(1, "prefetch") as thread:

        def following() -> Future[T] | None:
            job = next(source, None)
            return None if job is None else thread.submit(job)

        pending = following()
        try:
            while pending is not None:
                asked = time.perf_counter()
                result = pending.result()
                pending = following()
                meter.waited += (given := time.perf_counter()) - asked
                yield result
                del result  # only the consumer's reference is left
                meter.worked += time.perf_counter() - given
        finally:
            if pending is not None:
                pending.cancel()

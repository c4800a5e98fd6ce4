"""Where the time of this process goes: start, reading, training, evaluation and drawing.

Work calls `begins` with the part it comes to. What a thread does meanwhile counts for the part that runs: features that
are streamed are read while training, and count as training.
"""

import resource
import time
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["start", "reading", "training", "evaluation", "drawing"]


def processor() -> float:
    """Processor seconds of this process, and of those that it started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


@dataclass
class _Clock:
    """`seconds` and processor seconds (`cpu`) of the parts that have ended, in order; `at` is the part that runs."""

    at: Part = "start"
    # A process has used a processor since it began, so this is when it began, or a little later.
    since: tuple[float, float] = field(default_factory=lambda: (time.perf_counter() - time.process_time(), 0.0))
    spent: dict[Part, tuple[float, float]] = field(default_factory=dict)

    def begins(self, part: Part) -> None:
        """From now on time counts for `part`. A process begins with `start`."""
        now = (time.perf_counter(), processor())
        seconds, cpu = self.spent.get(self.at, (0.0, 0.0))
        self.spent[self.at] = (seconds + now[0] - self.since[0], cpu + now[1] - self.since[1])
        self.at, self.since = part, now


_clock = _Clock()
begins = _clock.begins


def parts() -> dict[str, dict[str, float]]:
    """Part -> {"seconds": by the clock, "cpu": as `processor` counts}, up to now, rounded to milliseconds."""
    _clock.begins(_clock.at)
    return {part: {"seconds": round(s, 3), "cpu": round(c, 3)} for part, (s, c) in _clock.spent.items()}


def told(parts: dict[str, dict[str, float]]) -> str:
    """The parts in one line, for the terminal."""
    each = ", ".join(f"{part} {time['seconds']:.1f} s ({time['cpu']:.1f})" for part, time in parts.items())
    return f"{each}; {sum(time['seconds'] for time in parts.values()):.1f} s in all (in brackets: processor)"

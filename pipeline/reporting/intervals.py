"""Paired differences over seeds: heads of one seed saw the same batches, so they share much of their noise.

If the 95 % interval contains 0, the difference is too close to tell. Each interval is for one comparison; there is no
correction for many comparisons.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit  # the t quantile, without the seconds that scipy.stats takes to import

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean and standard deviation (ddof 1) of `seeds` paired differences, and the bounds of the mean's t-interval.

    All are in the unit of the figure (percentage points). With one seed, std, low and high are None.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        """`higher`, `lower`, `too close to tell` (the interval contains 0), or `one seed: unknown`."""
        if self.low is None or self.high is None:
            return "one seed: unknown"
        if self.low <= 0 <= self.high:
            return "too close to tell"
        return "higher" if self.mean > 0 else "lower"

    @property
    def interval(self) -> str | None:
        """The interval as text in brackets; None if there is none."""
        return None if self.low is None or self.high is None else f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def text(self) -> str:
        """Mean, interval and verdict on one line."""
        return " ".join(filter(None, (f"{self.mean:+.2f}", self.interval, self.verdict)))

    def as_dict(self) -> dict[str, Any]:
        """The fields and the verdict, for JSON."""
        return {**asdict(self), "verdict": self.verdict}


def paired(after: Mapping[int, float], before: Mapping[int, float]) -> Difference | None:
    """The difference `after` - `before`, both by seed, over the seeds that both have; None if there are none.

    The interval is that of the paired t-test (Student, "The Probable Error of a Mean", Biometrika 1908).
    """
    seeds = sorted(set(after) & set(before))
    if not seeds:
        return None
    each = np.array([after[s] - before[s] for s in seeds], np.float64)
    mean = float(each.mean())
    if len(each) == 1:
        return Difference(mean, None, None, None, 1)
    std = float(each.std(ddof=1))
    reach = float(stdtrit(len(each) - 1, (1 + LEVEL) / 2)) * std / len(each) ** 0.5
    return Difference(mean, std, mean - reach, mean + reach, len(each))

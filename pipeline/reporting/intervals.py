"""Paired differences over seeds: heads of one seed saw the same batches, so much of their noise is the same.

A difference whose 95 % interval holds 0 is called no difference. Intervals are for one comparison each; nobody corrects
for looking at many.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit  # the t quantile, without the seconds that scipy.stats takes to import

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean and standard deviation (ddof 1) of `seeds` paired differences, and the t-interval of the mean.

    With one seed there is no spread, hence no interval: std, low and high are None.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "one seed: unknown"
        if self.low <= 0 <= self.high:
            return "no difference"
        return "higher" if self.mean > 0 else "lower"

    @property
    def interval(self) -> str | None:
        """The interval in brackets; None if there is none."""
        return None if self.low is None or self.high is None else f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def text(self) -> str:
        """Mean, interval and verdict on one line."""
        return " ".join(filter(None, (f"{self.mean:+.2f}", self.interval, self.verdict)))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}


def paired(after: Mapping[int, float], before: Mapping[int, float]) -> Difference | None:
    """`after` - `before`, both by seed, over the seeds they share; None if there is none."""
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

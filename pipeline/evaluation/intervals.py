"""Differences between classifiers with 95 % intervals: over seeds and test images, or over seeds alone.

Seeds and test images are crossed: every seed's classifier is scored on every image. A difference varies with both, and
both parts are estimated from the same paired predictions. Multi-reader studies in radiology have the same layout, with
readers for seeds and cases for images; variance and degrees of freedom are theirs (Obuchowski and Rockette,
Communications in Statistics 24, 1995; Hillis, Statistics in Medicine 26, 2007). Images vary within their classes only,
as a test set has a fixed number of images of each class. docs/intervals.md shows how often the intervals hold.

Each interval is for one comparison; there is no correction for many comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit  # the t quantile, without the seconds that scipy.stats takes to import

from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.evaluation.metrics import BINS, Answers, calibration_gaps

FIGURES = ("top1", *GROUPS, "ece")
LEVEL = 0.95
FEWEST_SEEDS = 3  # for a verdict; with two, 95 % intervals hold in 87 to 92 % of cases
FEWEST_CHANGED = 5  # images, mean over seeds, on which the two classifiers differ, for `higher` or `lower`
FEWEST_FOR_ECE = 20 * BINS  # images for a verdict on ECE; with fewer, its bias is as large as what is measured


@dataclass(frozen=True)
class Difference:
    """A difference between two classifiers, in the unit of the figure (percentage points), and its 95 % interval.

    `covers` names the sources of variation behind the interval: `seeds`, `images` (of the test split, within classes).
    Without any, low and high are None. `verdict` is `higher`, `lower`, `too close to tell`, `identical` (all
    predictions are equal), or None where the data allow no verdict. `seeds` counts the paired seeds.
    """

    mean: float
    low: float | None
    high: float | None
    verdict: str | None
    covers: tuple[str, ...]
    seeds: int

    @property
    def interval(self) -> str | None:
        """The interval as text in brackets; None if there is none, and beside `identical`, which says more."""
        if self.low is None or self.high is None or self.verdict == "identical":
            return None
        return f"[{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def text(self) -> str:
        """Mean, interval and verdict on one line."""
        return " ".join((f"{self.mean:+.2f}", *filter(None, (self.interval, self.verdict or "no verdict"))))

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**asdict(self), "covers": list(self.covers)}


def differences(
    after: Sequence[Answers],
    before: Sequence[Answers],
    labels: np.ndarray,
    group_of: Sequence[str | None],
    seeded: bool = True,
    verdicts: bool = True,
) -> dict[str, Difference | None]:
    """`after` - `before` of each of `FIGURES`; None for a group without test images.

    Both sides hold predictions for the same n images, one entry per seed, in the same order of seeds. `labels` is int
    (n,); `group_of` has one entry per class. `seeded`: False if neither side depends on a seed (closed-form fits, stage
    I). `verdicts`: False where something else varies that the intervals cannot cover, such as two backbones trained
    once each.
    """
    pairs = list(zip(after, before, strict=True))
    seeds = len(pairs)
    counts = np.bincount(labels, minlength=len(group_of))
    groups = np.array([group or "" for group in group_of])
    right = np.stack([100.0 * (a.guesses == labels) - 100.0 * (b.guesses == labels) for a, b in pairs])
    gaps = np.stack([100 * (calibration_gaps(a, labels) - calibration_gaps(b, labels)) for a, b in pairs])
    same = np.all([a.guesses == b.guesses for a, b in pairs], 0)
    same_confidence = same & np.all([a.confidence == b.confidence for a, b in pairs], 0)

    found: dict[str, Difference | None] = {}
    for figure in FIGURES:
        weights = np.full(len(labels), 1 / len(labels))
        if figure in GROUPS:  # the mean over its classes, whatever the number of their images
            members = (groups == figure) & (counts > 0)
            weights = np.where(members, 1 / np.maximum(counts * members.sum(), 1), 0)[labels]
        inside = weights > 0
        if not inside.any():
            found[figure] = None
            continue
        each, alike = (gaps, same_confidence) if figure == "ece" else (right, same)
        enough = (not seeded or seeds >= FEWEST_SEEDS) and (figure != "ece" or len(labels) >= FEWEST_FOR_ECE)
        mean, reach, changed = _mean_and_reach(each[:, inside], labels[inside], weights[inside])
        low, high = max(mean - reach, -100.0), min(mean + reach, 100.0)
        verdict = None
        if alike[inside].all():
            verdict = "identical"
        elif enough and verdicts:
            verdict = _verdict(low, high) if changed >= FEWEST_CHANGED else "too close to tell"
        covers = ("seeds", "images") if seeds > 1 else ("images",)
        found[figure] = Difference(mean, low, high, verdict, covers, seeds)
    return found


def _verdict(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else "too close to tell"


def _mean_and_reach(each: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """The weighted mean over images of `each` (seeds, n), averaged over seeds; half the width of its 95 % interval; and
    the number of images, mean over seeds, where `each` is not 0.

    The variance of the mean is A + C. A, the variance over seeds divided by their number, holds the seeds and what
    images add to single seeds; C is the covariance that shared images cause between seeds. The degrees of freedom are
    Satterthwaite's.

    With few changed images, no variance estimate can be trusted. Then two more images count, one gained and one lost
    (Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", Journal of Educational and Behavioral Statistics 37, 2012).
    """
    seeds = len(each)
    means = each @ weights
    changed = float(np.count_nonzero(each) / seeds)
    variances, freedom = _variances_over_images(np.vstack([each.mean(0), each]), labels, weights)
    if seeds > 1:
        a = means.var(ddof=1) / seeds
        c = max(float(seeds * variances[0] - variances[1:].mean()) / (seeds - 1), 0.0)
    else:
        a, c = 0.0, float(variances[0])
    if changed < FEWEST_CHANGED:
        c += 2 * (100 * float(weights @ weights)) ** 2
    if not a + c:
        return float(means.mean()), 0.0, changed
    freedom = (a + c) ** 2 / (a**2 / max(seeds - 1, 1) + c**2 / freedom)
    reach = float(stdtrit(freedom, (1 + LEVEL) / 2)) * (a + c) ** 0.5
    return float(means.mean()), reach, changed


def _variances_over_images(values: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, int]:
    """For each line of `values` (lines, n), the variance of its weighted sum if other images of the same classes were
    drawn, float64 (lines,). Also the degrees of freedom.

    The weights of a class are equal. A class with one image has no variance of its own: the square of its value stands
    in, which is too large rather than too small.
    """
    lines, classes = len(values), int(labels.max()) + 1
    place = (labels + classes * np.arange(lines)[:, None]).ravel()
    total, square = (
        np.bincount(place, v.ravel(), minlength=lines * classes).reshape(lines, classes) for v in (values, values**2)
    )
    counts = np.bincount(labels)
    at_least_one = np.maximum(counts, 1)
    spread = np.where(counts > 1, (square - total**2 / at_least_one) / np.maximum(counts - 1, 1), square)
    of_class = np.bincount(labels, weights) ** 2 / at_least_one
    return np.maximum(spread, 0) @ of_class, int(np.maximum(counts[counts > 0] - 1, 1).sum())


def paired(after: Mapping[int, float], before: Mapping[int, float]) -> Difference | None:
    """The difference `after` - `before` of a figure, both by seed, over the seeds that both have; None without any.

    For figures without the predictions behind them: the interval covers seeds alone. It is that of the paired t-test
    (Student, "The Probable Error of a Mean", Biometrika 1908).
    """
    seeds = sorted(set(after) & set(before))
    if not seeds:
        return None
    each = np.array([after[s] - before[s] for s in seeds], np.float64)
    mean = float(each.mean())
    if len(each) == 1:
        return Difference(mean, None, None, None, (), 1)
    reach = float(stdtrit(len(each) - 1, (1 + LEVEL) / 2)) * float(each.std(ddof=1)) / len(each) ** 0.5
    low, high = mean - reach, mean + reach
    return Difference(mean, low, high, _verdict(low, high) if reach else "too close to tell", ("seeds",), len(each))

"""Differences between classifiers with 95 % intervals: over seeds, test images and trainings of the backbone.

Seeds and test images are crossed: every seed's classifier is scored on every image. A difference varies with both, and
both parts are estimated from the same paired predictions. Multi-reader studies in radiology have the same layout, with
readers for seeds and cases for images; variance and degrees of freedom are theirs (Obuchowski and Rockette,
Communications in Statistics 24, 1995; Hillis, Statistics in Medicine 26, 2007). Images vary within their classes only,
as a test set has a fixed number of images of each class. docs/intervals.md shows how often the intervals hold. Where
test images come in groups, whole groups vary (`image_groups.py`).

Replicates, with a backbone and test images of their own, take the place of seeds: the seeds within a replicate are
averaged, and what replicates have in common are the test images that several of them hold out.

Each interval is for one comparison; there is no correction for many comparisons.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.evaluation.image_groups import contributions, freedom, group_numbers, sums
from h2t.pipeline.evaluation.metrics import AUROC, BINS, Answers, calibration_gaps, placements

FIGURES = ("top1", *GROUPS, "ece")  # of two classes `auroc` as well
LEVEL = 0.95
FEWEST_SEEDS = 3  # for a verdict; with two, 95 % intervals hold in 87 to 92 % of cases
FEWEST_REPLICATES = 3  # for a verdict, where there are replicates
FEWEST_CHANGED = 5  # images or groups, mean over seeds, on which the classifiers differ, for `higher` or `lower`
FEWEST_FOR_ECE = 20 * BINS  # images or groups for a verdict on ECE; with fewer, its bias is as large as the figure


@dataclass(frozen=True)
class Difference:
    """A difference between two classifiers, in the unit of the figure (percentage points), and its 95 % interval.

    `covers` names the sources of variation behind the interval: `seeds`, `images` (of the test split, within classes),
    `backbones` (replicates). Without any, low and high are None. `verdict` is `higher`, `lower`, `too close to tell`,
    `identical` (all predictions are equal), or None where the data allow no verdict. `seeds` counts the paired seeds,
    of each replicate. `image_groups`: the number of groups of test images (of the first replicate), if these come in
    groups; then `images` in `covers` means other groups.
    """

    mean: float
    low: float | None
    high: float | None
    verdict: str | None
    covers: tuple[str, ...]
    seeds: int
    image_groups: int | None = None

    def interval(self, decimals: int = 2) -> str:
        """The interval as text in brackets; empty if there is none, and beside `identical`, which says more."""
        if self.low is None or self.high is None or self.verdict == "identical":
            return ""
        return f"[{self.low:+.{decimals}f}, {self.high:+.{decimals}f}]"

    def in_words(self, decimals: int = 2) -> str:
        """Mean, interval and verdict on one line."""
        parts = (f"{self.mean:+.{decimals}f}", self.interval(decimals), self.verdict or "no verdict")
        return " ".join(filter(None, parts))

    @property
    def text(self) -> str:
        """`in_words` with two decimals."""
        return self.in_words()

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON; `image_groups` only where test images come in groups."""
        fields = {**asdict(self), "covers": list(self.covers)}
        return {k: v for k, v in fields.items() if k != "image_groups" or v is not None}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Difference":
        """The difference that `as_dict` turned into `fields`."""
        return cls(**{**fields, "covers": tuple(fields["covers"])})


@dataclass(frozen=True)
class Pairs:
    """Predictions of two classifiers for the same n test images of one replicate, an entry per seed on both sides.

    `labels`: int (n,). `images`: numbers of the images, int (n,), the same in all replicates. `groups`: likewise the
    number of each image's group; None where each is on its own.
    """

    after: Sequence[Answers]
    before: Sequence[Answers]
    labels: np.ndarray
    images: np.ndarray
    groups: np.ndarray | None = None


def differences(
    after: Sequence[Answers],
    before: Sequence[Answers],
    labels: np.ndarray,
    group_of: Sequence[str | None],
    seeded: bool = True,
    verdicts: bool = True,
    groups: np.ndarray | None = None,
) -> dict[str, Difference | None]:
    """`after` - `before` of each of `FIGURES`, and of `auroc` where the scores of two classes are known.

    None for a group without test images, and for `auroc` if a class has none.

    Both sides hold predictions for the same n images, one entry per seed, in the same order of seeds. `labels` is int
    (n,); `group_of` has one entry per class. `seeded`: False if neither side depends on a seed (closed-form fits, stage
    I). `verdicts`: False where something else varies that the intervals cannot cover, such as two backbones trained
    once each. `groups`: the group of each image, int (n,), where images come in groups.
    """
    pairs = Pairs(after, before, labels, np.arange(len(labels)), groups)
    return over_replicates([pairs], group_of, seeded, verdicts)


def over_replicates(
    replicates: Sequence[Pairs], group_of: Sequence[str | None], seeded: bool = True, verdicts: bool = True
) -> dict[str, Difference | None]:
    """`differences` of one replicate or several. Each of several has seeds and a training of the backbone of its own.

    Then the interval covers these as well; `verdicts` may be True for two backbones, which both vary with replicates.
    """
    several = len(replicates) > 1
    seeds = len(replicates[0].after)
    numbered = group_numbers([pairs.groups for pairs in replicates], [pairs.images for pairs in replicates])
    scored = [_Scored.of(replace(pairs, groups=own)) for pairs, own in zip(replicates, numbered, strict=True)]
    found: dict[str, Difference | None] = {}
    for figure in (*FIGURES, AUROC) if all(one.places is not None for one in scored) else FIGURES:
        parts = [part for one in scored if (part := one.part(figure, group_of)) is not None]
        if len(parts) < len(scored):
            found[figure] = None
            continue
        fewest = min(part.units for part in parts)
        repeated = len(replicates) >= FEWEST_REPLICATES if several else not seeded or seeds >= FEWEST_SEEDS
        enough = repeated and (figure != "ece" or fewest >= FEWEST_FOR_ECE)
        mean, reach, changed = _over_replicates(parts) if several else _mean_and_reach(parts[0])
        low, high = max(mean - reach, -100.0), min(mean + reach, 100.0)
        verdict = None
        if all(part.alike for part in parts):
            verdict = "identical"
        elif enough and verdicts:
            verdict = _verdict(low, high) if changed >= FEWEST_CHANGED else "too close to tell"
        if several:
            covers = (*(("seeds",) if seeded else ()), "images", "backbones")
        else:
            covers = ("seeds", "images") if seeds > 1 else ("images",)
        image_groups = None if parts[0].groups is None else parts[0].units
        found[figure] = Difference(mean, low, high, verdict, covers, seeds, image_groups)
    return found


@dataclass(frozen=True)
class _Part:
    """What one figure is computed from, in one replicate: `each` (seeds, n), the mean of which by `weights` is the
    difference; labels and numbers of the images, (n,), and of their groups, from 0 on. `differs` (seeds, n): where the
    two classifiers do; nowhere if they are `alike`, which for groups and ECE asks for more: equal predictions.
    `freedom`: degrees of freedom that the variance over images has at most.
    """

    each: np.ndarray
    differs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    images: np.ndarray
    groups: np.ndarray | None
    alike: bool
    freedom: float = float("inf")

    @property
    def units(self) -> int:
        """How many images or, where they come in groups, how many groups."""
        return len(self.labels) if self.groups is None else int(np.count_nonzero(np.bincount(self.groups)))

    @property
    def changed(self) -> float:
        """The number of units on which the two classifiers differ, mean over seeds."""
        differs = self.differs
        if self.groups is not None:
            differs = sums(differs.astype(float), self.groups, int(self.groups.max()) + 1)
        return float(np.count_nonzero(differs) / len(self.each))

    @property
    def weight(self) -> float:
        """The weight of one unit: their mean, each counted as often as it weighs."""
        weights = self.weights if self.groups is None else np.bincount(self.groups, self.weights)
        return float(weights @ weights)


@dataclass(frozen=True)
class _Scored:
    """Differences in correctness, calibration gap and, for two classes, placement, (seeds, n), in percent; and which
    images are equal in all.
    """

    pairs: Pairs
    right: np.ndarray
    gaps: np.ndarray
    places: np.ndarray | None
    same: np.ndarray
    same_confidence: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs) -> "_Scored":
        both, labels = list(zip(pairs.after, pairs.before, strict=True)), pairs.labels
        right = np.stack([100.0 * (a.guesses == labels) - 100.0 * (b.guesses == labels) for a, b in both])
        gaps = np.stack([100 * (calibration_gaps(a, labels) - calibration_gaps(b, labels)) for a, b in both])
        same = np.all([a.guesses == b.guesses for a, b in both], 0)
        scores = [(a.score, b.score) for a, b in both if a.score is not None and b.score is not None]
        places = None
        if len(scores) == len(both):
            occur = len(np.unique(labels)) == 2
            each = [[placements(s, labels) if occur else np.zeros(len(labels)) for s in pair] for pair in scores]
            places = np.stack([100 * (a - b) for a, b in each])
        return cls(pairs, right, gaps, places, same, same & np.all([a.confidence == b.confidence for a, b in both], 0))

    def part(self, figure: str, group_of: Sequence[str | None]) -> _Part | None:
        """What `figure` is computed from; None for a group without test images."""
        labels = self.pairs.labels
        weights = figure_weights(figure, labels, group_of)
        inside = weights > 0
        if not inside.any():
            return None
        each, alike = (self.gaps, self.same_confidence) if figure == "ece" else (self.right, self.same)
        differs, most = each != 0, float("inf")
        if figure == AUROC and self.places is not None:
            differs = self.places != 0
            units = _units_of_classes(labels, self.pairs.groups)
            each = _summed_over_both_classes(self.places, labels, int(units.argmax()))
            alike, most = ~differs.any(0), max(float(units.min()) - 1, 1.0)  # it varies most with the rarer class
        images, groups = self.pairs.images[inside], self.pairs.groups
        groups = None if groups is None else groups[inside]
        alike_inside = bool(alike[inside].all())
        return _Part(
            each[:, inside], differs[:, inside], labels[inside], weights[inside], images, groups, alike_inside, most
        )


def _units_of_classes(labels: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """How many images, or groups with images, each of two classes has, int (2,)."""
    of_units = labels if groups is None else np.unique(np.stack([groups, labels]), axis=1)[1]
    return np.bincount(of_units, minlength=2)


def _summed_over_both_classes(places: np.ndarray, labels: np.ndarray, larger: int) -> np.ndarray:
    """Values (seeds, n) whose weighted mean is the mean of `places` over either class, and whose variance is DeLong's.

    The area varies with the images of both classes, so the variances of both means add up. As `auroc` weighs classes
    equally, values are doubled; so that the mean does not count twice, those of the `larger` class are taken from their
    mean. It is the larger one because a class of one image or group has its square in place of a variance.
    """
    each = 2 * places
    each[:, labels == larger] -= each[:, labels == larger].mean(1, keepdims=True)
    return each


def figure_weights(figure: str, labels: np.ndarray, group_of: Sequence[str | None]) -> np.ndarray:
    """The weight of each of n images in `figure`, float64 (n,); all 0 for a group without test images.

    `labels`: int (n,); `group_of`: one entry per class.
    """
    if figure == AUROC:
        of_class = np.bincount(labels, minlength=2)
        return (0.5 / of_class)[labels] if of_class.all() else np.zeros(len(labels))
    if figure not in GROUPS:
        return np.full(len(labels), 1 / len(labels))
    counts = np.bincount(labels, minlength=len(group_of))  # a group's figure is the mean over its classes
    members = (np.array([group or "" for group in group_of]) == figure) & (counts > 0)
    return np.where(members, 1 / np.maximum(counts * members.sum(), 1), 0)[labels]


def _verdict(low: float, high: float) -> str:
    return "higher" if low > 0 else "lower" if high < 0 else "too close to tell"


def _mean_and_reach(part: _Part) -> tuple[float, float, float]:
    """The weighted mean over images, averaged over seeds; half the width of its 95 % interval; and the number of
    changed images or groups, mean over seeds.

    The variance of the mean is A + C. A, the variance over seeds divided by their number, holds the seeds and what
    images add to single seeds; C is the covariance that shared images cause between seeds. The degrees of freedom are
    Satterthwaite's.

    With few changed images, no variance estimate can be trusted. Then two more images count, one gained and one lost
    (Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data", Journal of Educational and Behavioral Statistics 37, 2012).
    """
    each, seeds = part.each, len(part.each)
    means = each @ part.weights
    variances, free = _variances_over_images(np.vstack([each.mean(0), each]), part)
    if seeds > 1:
        a = means.var(ddof=1) / seeds
        c = max(float(seeds * variances[0] - variances[1:].mean()) / (seeds - 1), 0.0)
    else:
        a, c = 0.0, float(variances[0])
    free = min(free, part.freedom)
    return float(means.mean()), _reach(a, seeds, c, free, part.changed, part.weight), part.changed


def _over_replicates(parts: Sequence[_Part]) -> tuple[float, float, float]:
    """`_mean_and_reach` with replicates in place of seeds, after averaging the seeds of each.

    A is the variance of the replicates' means divided by their number. C is the mean covariance of two replicates that
    the test images of both cause: within a class, the covariance over its m shared images, divided by how often the
    class has as many images as one of them. Where images come in groups, two replicates share groups.
    """
    means = np.array([float(part.each.mean(0) @ part.weights) for part in parts])
    changed = float(np.mean([part.changed for part in parts]))
    shared = [_shared_covariance(one, other) for one, other in combinations(parts, 2)]
    a, c = float(means.var(ddof=1)) / len(parts), max(float(np.mean([s for s, _ in shared])), 0.0)
    free = min(max(1, round(float(np.mean([f for _, f in shared])))), *(part.freedom for part in parts))
    return float(means.mean()), _reach(a, len(parts), c, free, changed, parts[0].weight), changed


def _shared_covariance(one: _Part, other: _Part) -> tuple[float, float]:
    """The covariance of two replicates' means that their shared images or groups cause, and its degrees of freedom."""
    if one.groups is not None and other.groups is not None:
        common = np.intersect1d(one.groups, other.groups)
        if not len(common):
            return 0.0, 1
        errors, free = [], []
        for part, groups in ((one, one.groups), (other, other.groups)):
            shared = np.isin(groups, common)
            number, labels = np.searchsorted(common, groups[shared]), part.labels[shared]
            errors.append(contributions(part.each[:, shared].mean(0)[None], labels, part.weights[shared], number)[0])
            free.append(freedom(labels, number))
        return float(errors[0] @ errors[1]), min(free)
    _, at, place = np.intersect1d(one.images, other.images, assume_unique=True, return_indices=True)
    if not len(at):
        return 0.0, 1
    labels = one.labels[at]
    x, y = (part.each.mean(0)[i] * part.weights[i] for part, i in ((one, at), (other, place)))
    counts = np.bincount(labels)
    of_x, of_y, of_both = (np.bincount(labels, v) for v in (x, y, x * y))
    # A class with one shared image has no covariance of its own: the product stands in, as for a variance.
    spread = (of_both - of_x * of_y / np.maximum(counts, 1)) / np.maximum(counts - 1, 1)
    return float(np.where(counts > 1, spread, of_both) @ counts), int(np.maximum(counts[counts > 0] - 1, 1).sum())


def _reach(a: float, samples: int, c: float, freedom: float, changed: float, weight: float) -> float:
    """Half the width of the interval from the variance A, over so many `samples`, and C with its degrees of freedom.

    `weight`: of an added image or group.
    """
    if changed < FEWEST_CHANGED:
        c += 2 * (100 * weight) ** 2
    if not a + c:
        return 0.0
    joint = (a + c) ** 2 / (a**2 / max(samples - 1, 1) + c**2 / freedom)
    return _quantile(joint) * (a + c) ** 0.5


def _quantile(freedom: float) -> float:
    """Student's t at (1 + LEVEL) / 2, for `freedom` of 1 or more: how many standard errors an interval reaches."""
    from scipy.special import stdtrit  # takes 0.4 s to import, scipy.stats some seconds

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _variances_over_images(values: np.ndarray, part: _Part) -> tuple[np.ndarray, float]:
    """For each line of `values` (lines, n), the variance of its weighted sum if other images of the same classes, or
    other groups, were drawn, float64 (lines,). Also the degrees of freedom.

    The weights of a class are equal. A class with one image has no variance of its own: the square of its value stands
    in, which is too large rather than too small.
    """
    labels, weights = part.labels, part.weights
    if part.groups is not None:
        return (contributions(values, labels, weights, part.groups) ** 2).sum(1), freedom(labels, part.groups)
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
    reach = _quantile(len(each) - 1) * float(each.std(ddof=1)) / len(each) ** 0.5
    low, high = mean - reach, mean + reach
    return Difference(mean, low, high, _verdict(low, high) if reach else "too close to tell", ("seeds",), len(each))

"""How often intervals hold where test images come in groups: `python -m benchmarks.image_groups`.

Data sets are drawn as in `benchmarks.intervals`, with test images in groups whose members have more or less in common:
everything, as copies do, or a share of the variance of each normal variable. Each data set goes through `differences`
twice: with every image on its own, and with the groups.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from benchmarks import measure
from benchmarks.intervals import CLASSES, GROUP_OF, Found, answered, tallied
from h2t.pipeline.base.text import markdown
from h2t.pipeline.evaluation.intervals import Difference, differences

OUT = Path(__file__).parent / "results" / "image_groups.json"
SETS = 100  # that are drawn at a time
IMAGE, METHOD, SEED = 2.0, 0.7, 0.1  # standard deviations, as the defaults of `benchmarks.intervals.Case`
FIGURES = ("top1", "tail", "ece")
WAYS = ("each image on its own", "in groups")


@dataclass(frozen=True)
class Case:
    """One kind of data set: seeds (1: a host without any), groups, accuracy of the first method, effect of the second.

    Each class has five images in each of its `groups`; or they go `across` classes: all classes have these groups, and
    the largest has ten times as many images as the smallest. `common` is the share of the variance of an image's
    variables that its group has in common.
    """

    kind: str
    seeds: int
    groups: int
    accuracy: float
    effect: float
    common: float
    across: bool = False

    @property
    def images(self) -> int:
        """Test images a class."""
        return 5 * self.groups

    @property
    def seed_noise(self) -> float:
        """The standard deviation of a seed's variables."""
        return SEED if self.seeds > 1 else 0.0

    @property
    def spread(self) -> float:
        """The standard deviation of the sum."""
        return float(np.sqrt(1 + IMAGE**2 + METHOD**2 + 2 * self.seed_noise**2))


KINDS = {
    "five copies of each image": {"common": 1.0},
    "five images that have 0.3 in common": {"common": 0.3},
    "uneven groups across classes, 0.3 in common": {"common": 0.3, "across": True},
}
CASES = [
    Case(kind, seeds, groups, accuracy, effect, float(given["common"]), "across" in given)
    for kind, given in KINDS.items()
    for seeds in (1, 3, 5)
    for groups in (8, 20)
    for accuracy in (0.6, 0.95)
    for effect in (0.0, 0.3)
]
SMALL = [
    Case("copies", 1, 8, 0.6, 0.0, 1.0),
    Case("alike", 3, 8, 0.6, 0.3, 0.3),
    Case("across", 3, 8, 0.6, 0.0, 0.3, across=True),
]


def group_numbers(case: Case, rng: np.random.Generator) -> np.ndarray:
    """The group of each test image, int (images,)."""
    images = CLASSES * case.images
    if not case.across:
        return np.arange(images) // 5
    share = np.linspace(1, 10, case.groups)
    return rng.choice(case.groups, images, p=share / share.sum())


def draw(case: Case, groups: np.ndarray, sets: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Right or not, bool, and confidence, float64, both (sets, methods, seeds, images); and the true difference."""

    def normal(*shape: int) -> np.ndarray:
        """Standard normal variables, (sets, *shape, images), that images of a group have in part in common."""
        ours = rng.normal(size=(sets, *shape, int(groups.max()) + 1))[..., groups]
        return case.common**0.5 * ours + (1 - case.common) ** 0.5 * rng.normal(size=(sets, *shape, len(groups)))

    known = (
        ndtri(case.accuracy) * case.spread
        + np.array([0.0, case.effect])[:, None, None]
        + IMAGE * normal(1, 1)
        + METHOD * normal(2, 1)
        + case.seed_noise * rng.normal(size=(sets, 1, case.seeds, 1))
        + case.seed_noise * rng.normal(size=(sets, 2, case.seeds, 1))
    )
    confidence = 1 / CLASSES + (1 - 1 / CLASSES) * ndtr(np.array([1.0, 1.5])[:, None, None] * known)
    true = float(ndtr(ndtri(case.accuracy) + case.effect / case.spread)) - case.accuracy
    return known + normal(2, case.seeds) > 0, confidence, true


def coverage(case: Case, sets: int, rng: np.random.Generator) -> dict[str, dict[str, Found]]:
    """How often the intervals of each figure hold over `sets` data sets, each way."""
    labels = np.arange(CLASSES).repeat(case.images)
    groups = group_numbers(case, rng)
    lines: dict[str, dict[str, list[tuple[bool, Difference]]]] = {way: {f: [] for f in FIGURES} for way in WAYS}
    true = 0.0
    for first in range(0, sets, SETS):
        right, confidence, true = draw(case, groups, min(SETS, sets - first), rng)
        for r, c in zip(right, confidence, strict=True):
            before, after = (answered(*of, labels) for of in zip(r, c, strict=True))
            for way, of_image in zip(WAYS, (None, groups), strict=True):
                found = differences(after, before, labels, GROUP_OF, case.seeds > 1, groups=of_image)
                for figure in FIGURES:
                    if (difference := found[figure]) is not None:
                        lines[way][figure].append((difference.verdict is not None, difference))
    truth = {"top1": 100 * true, "tail": 100 * true}
    truth["ece"] = float(np.mean([difference.mean for _, difference in lines[WAYS[0]]["ece"]]))
    return {way: {f: tallied(truth[f], line) for f, line in of.items()} for way, of in lines.items()}


def table(found: Sequence[tuple[Case, dict[str, dict[str, Found]]]]) -> str:
    """One line per kind and number of seeds: coverage and wrong verdicts of top1 and tail, before and after."""
    lines = []
    for kind in KINDS:
        for seeds in (1, 3, 5):
            of_kind = [of for case, of in found if (case.kind, case.seeds) == (kind, seeds)]
            cells = []
            for way in WAYS:
                mine = [of[way][f] for of in of_kind for f in FIGURES[:2]]
                shares = [f.everywhere for f in mine]
                cells += [f"{min(shares):.1f} to {max(shares):.1f}", f"at most {max(f.wrong for f in mine):.1f}"]
            lines.append([kind, seeds if seeds > 1 else "none", *cells])
    return markdown(["test images", "seeds", "top1, tail", "wrong", "top1, tail, by groups", "wrong"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000, help="data sets a case")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    found = []
    for number, case in enumerate(CASES):
        found.append((case, coverage(case, given.sets, np.random.default_rng([number, 2]))))
        print(f"{number + 1} of {len(CASES)}: {case}", file=sys.stderr, flush=True)
    cases = [
        {**asdict(case), "found": {way: {f: asdict(v) for f, v in of.items()} for way, of in ways.items()}}
        for case, ways in found
    ]
    measure.save(given.out, {"sets": given.sets, "cases": cases})
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

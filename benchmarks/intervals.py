"""How often 95 % intervals hold: `python -m benchmarks.intervals` simulates test sets and seeds whose truth is known.

A classifier predicts an image rightly if a sum of normal variables is above 0: a constant that sets the accuracy, one
for the image, one for the image and the method, one for the seed, one for the seed and the method, and one for itself.
So the true difference of two methods is known, and everything that makes predictions of seeds, methods and images alike
can be turned up and down. Each data set goes through `differences`, as evaluate uses it.

Confidences follow the same sum, sharpened more or less; the true difference of the ECE, on test sets of this size, is
taken to be the mean over all data sets of a case.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from h2t.pipeline.base.text import markdown
from h2t.pipeline.evaluation.intervals import (
    FEWEST_CHANGED,
    FEWEST_FOR_ECE,
    FEWEST_REPLICATES,
    FEWEST_SEEDS,
    Difference,
    Pairs,
    differences,
    over_replicates,
)
from h2t.pipeline.evaluation.metrics import Answers

CLASSES = 10
GROUP_OF = ["head"] * 3 + ["medium"] * 4 + ["tail"] * 3
OUT = Path(__file__).parent / "results" / "intervals.json"


@dataclass(frozen=True)
class Case:
    """One kind of data set: seeds, test images a class, accuracy of the first method, and standard deviations.

    `image`, `method` (image and method), `seed_noise` (seed and method, and the same for the seed alone) are in units
    of the variable of a single prediction. `alike`: seeds predict alike but for that. `effect` moves the second method.
    Each of the `replicates` has seeds of its own and a backbone: `backbone` (backbone and method, and the same for the
    backbone alone). Each holds out its test images from `pool` images of a class; 0: all have the same.
    """

    name: str
    seeds: int
    images: int
    accuracy: float
    image: float = 2.0
    method: float = 0.7
    seed_noise: float = 0.1
    effect: float = 0.0
    alike: bool = False
    replicates: int = 1
    backbone: float = 0.0
    pool: int = 0

    @property
    def spread(self) -> float:
        """The standard deviation of the sum."""
        parts = (self.image**2, self.method**2, 2 * self.seed_noise**2, 2 * self.backbone**2, self.own_backbone**2)
        return float(np.sqrt(1 + sum(parts)))

    @property
    def own_backbone(self) -> float:
        """The standard deviation of image, method and backbone together: which images another training gets wrong."""
        return self.method if self.backbone else 0.0


@dataclass(frozen=True)
class Found:
    """Of the data sets of a case, in percent: how often the interval held, and how often a verdict was wrong.

    `judged` counts the data sets that allow a verdict, `where_judged` is the coverage among them (None without any),
    `everywhere` among all. `wrong`: of all data sets, those whose verdict names a direction that the truth has not.
    """

    true: float
    judged: int
    where_judged: float | None
    everywhere: float
    wrong: float


#: Kinds of data: what differs from `Case`'s defaults.
KINDS = {
    "usual": {},
    "seeds that differ much, a true effect": {"seed_noise": 0.3, "effect": 0.3},
    "equal seeds": {"seed_noise": 0.0, "alike": True},
    "methods that are nearly tied": {"image": 5.0, "method": 0.3, "seed_noise": 0.05},
}
SIZES = [(2, 10), (3, 2), (3, 10), (3, 40), (5, 2), (5, 10), (5, 40), (10, 10)]  # seeds, test images a class
CASES = [
    Case(f"{kind}, {100 * accuracy:g} %, {seeds} seeds, {images} images a class", seeds, images, accuracy, **given)
    for seeds, images in SIZES
    for accuracy in (0.6, 0.97, 0.03)
    for kind, given in KINDS.items()
]
#: Kinds of data with replicates: what differs from `Case`'s defaults. `pool` is a multiple of the test images.
REPLICATED = {
    "usual": {"backbone": 0.2, "pool": 4},
    "backbones that differ much, a true effect": {"backbone": 0.5, "effect": 0.3, "pool": 4},
    "backbones that do not differ": {"pool": 4},
    "the same test images": {"backbone": 0.2},
}
REPLICATED_SIZES = [(2, 40), (3, 10), (3, 40), (5, 10), (5, 40)]  # replicates, test images a class; three seeds each
REPLICATED_CASES = [
    Case(
        f"{kind}, {100 * accuracy:g} %, {replicates} replicates, {images} images a class",
        seeds=3,
        images=images,
        accuracy=accuracy,
        replicates=replicates,
        backbone=given.get("backbone", 0.0),
        effect=given.get("effect", 0.0),
        pool=images * int(given.get("pool", 0)),
    )
    for replicates, images in REPLICATED_SIZES
    for accuracy in (0.6, 0.97)
    for kind, given in REPLICATED.items()
]
SMALL_REPLICATED = [
    Case("three replicates", 3, 10, 0.6, replicates=3, backbone=0.2, pool=40),
    Case("five replicates with the same test images", 2, 20, 0.8, replicates=5, backbone=0.4, effect=0.3),
]
SMALL = [
    Case("three seeds, ten images a class", 3, 10, 0.6),
    Case("five seeds that differ much", 5, 10, 0.9, seed_noise=0.3, effect=0.3),
    Case("equal seeds", 3, 20, 0.8, seed_noise=0.0, alike=True),
    Case("nearly every prediction right", 3, 10, 0.97, image=5.0),
    Case("nearly none right", 5, 10, 0.03),
]


def draw(case: Case, sets: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Right or not, bool, and confidence, float64, both (sets, methods, seeds, images); and the true difference."""
    images = CLASSES * case.images
    shape = (sets, 2, case.seeds, images)
    known = (
        ndtri(case.accuracy) * case.spread
        + np.array([0.0, case.effect])[:, None, None]
        + case.image * rng.normal(size=(sets, 1, 1, images))
        + case.method * rng.normal(size=(sets, 2, 1, images))
        + case.seed_noise * rng.normal(size=(sets, 1, case.seeds, 1))
        + case.seed_noise * rng.normal(size=(sets, 2, case.seeds, 1))
    )
    own = rng.normal(size=(*shape[:2], 1 if case.alike else case.seeds, images))
    sharp = np.array([1.0, 1.5])[:, None, None]
    confidence = 1 / CLASSES + (1 - 1 / CLASSES) * ndtr(sharp * known)
    true = float(ndtr(ndtri(case.accuracy) + case.effect / case.spread)) - case.accuracy
    return known + own > 0, np.broadcast_to(confidence, shape), true


def coverage(case: Case, sets: int, rng: np.random.Generator) -> dict[str, Found]:
    """How often the intervals of top1, tail and ece hold over `sets` data sets."""
    labels = np.arange(CLASSES).repeat(case.images)
    tail = labels >= GROUP_OF.index("tail")
    lines: dict[str, list[tuple[bool, Difference]]] = {"top1": [], "tail": [], "ece": []}
    truth = {}
    for right, confidence, true in _data(case, sets, rng):
        truth["top1"] = truth["tail"] = 100 * true
        differs = right[0] != right[1]
        enough = {
            "top1": differs.sum(1).mean() >= FEWEST_CHANGED,
            "tail": differs[:, tail].sum(1).mean() >= FEWEST_CHANGED,
            "ece": len(labels) >= FEWEST_FOR_ECE,
        }
        before, after = (answered(r, c, labels) for r, c in zip(right, confidence, strict=True))
        found = differences(after, before, labels, GROUP_OF)
        for figure, line in lines.items():
            if (difference := found[figure]) is not None:
                line.append((case.seeds >= FEWEST_SEEDS and bool(enough[figure]), difference))
    truth["ece"] = float(np.mean([found.mean for _, found in lines["ece"]]))
    return {figure: tallied(truth[figure], line) for figure, line in lines.items()}


def draw_replicates(case: Case, rng: np.random.Generator) -> tuple[list[Pairs], float]:
    """One data set with replicates, and the true difference of the two methods."""
    seeds, pool = case.seeds, case.pool or case.images
    labels = np.arange(CLASSES).repeat(case.images)
    known = (
        ndtri(case.accuracy) * case.spread
        + np.array([0.0, case.effect])[:, None]
        + case.image * rng.normal(size=(1, CLASSES * pool))
        + case.method * rng.normal(size=(2, CLASSES * pool))
    )
    found = []
    for _ in range(case.replicates):
        held = np.concatenate([j * pool + rng.permutation(pool)[: case.images] for j in range(CLASSES)])
        mine = (
            known[:, None, held]
            + case.backbone * rng.normal()
            + case.backbone * rng.normal(size=(2, 1, 1))
            + case.own_backbone * rng.normal(size=(2, 1, len(held)))
            + case.seed_noise * rng.normal(size=(1, seeds, 1))
            + case.seed_noise * rng.normal(size=(2, seeds, 1))
        )
        right = mine + rng.normal(size=(2, seeds, len(held))) > 0
        confidence = 1 / CLASSES + (1 - 1 / CLASSES) * ndtr(np.array([1.0, 1.5])[:, None, None] * mine)
        before, after = (answered(r, c, labels) for r, c in zip(right, confidence, strict=True))
        found.append(Pairs(after, before, labels, held))
    true = float(ndtr(ndtri(case.accuracy) + case.effect / case.spread)) - case.accuracy
    return found, true


def coverage_over_replicates(case: Case, sets: int, rng: np.random.Generator) -> dict[str, Found]:
    """How often the intervals of top1 and tail hold over `sets` data sets with replicates."""
    lines: dict[str, list[tuple[bool, Difference]]] = {"top1": [], "tail": []}
    truth = 0.0
    for _ in range(sets):
        pairs, true = draw_replicates(case, rng)
        found, truth = over_replicates(pairs, GROUP_OF), 100 * true
        for figure, line in lines.items():
            if difference := found[figure]:
                line.append((case.replicates >= FEWEST_REPLICATES and _enough_changed(pairs, figure), difference))
    return {figure: tallied(truth, line) for figure, line in lines.items()}


def _enough_changed(replicates: Sequence[Pairs], figure: str) -> bool:
    """Whether the methods differ on enough images for a verdict."""
    counts = []
    for pairs in replicates:
        inside = pairs.labels >= GROUP_OF.index("tail") if figure == "tail" else np.ones(len(pairs.labels), bool)
        counts += [
            np.count_nonzero(((a.guesses == pairs.labels) != (b.guesses == pairs.labels))[inside])
            for a, b in zip(pairs.after, pairs.before, strict=True)
        ]
    return bool(np.mean(counts) >= FEWEST_CHANGED)


def answered(right: np.ndarray, confidence: np.ndarray, labels: np.ndarray) -> list[Answers]:
    """Predictions by seed, from (seeds, images). Wrong ones name the next class."""
    wrong = (labels + 1) % CLASSES
    return [Answers(np.where(r, labels, wrong).astype(np.int32), c) for r, c in zip(right, confidence, strict=True)]


def _data(case: Case, sets: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """`sets` data sets one by one, drawn a hundred at a time: right or not, confidence, true difference."""
    for first in range(0, sets, 100):
        right, confidence, true = draw(case, min(100, sets - first), rng)
        yield from ((r, c, true) for r, c in zip(right, confidence, strict=True))


def tallied(true: float, lines: Sequence[tuple[bool, Difference]]) -> Found:
    judged = np.array([enough for enough, _ in lines])
    held = np.array([(d.low or 0) <= true <= (d.high or 0) for _, d in lines])
    wrong = [(d.verdict == "higher" and true <= 0) or (d.verdict == "lower" and true >= 0) for _, d in lines]
    among = float(100 * held[judged].mean()) if judged.any() else None
    return Found(true, int(judged.sum()), among, float(100 * held.mean()), float(100 * np.mean(wrong)))


def table(kinds: Sequence[Case], found: dict[str, dict[str, Found]], sets: int) -> str:
    """One line per number of seeds (or replicates) and images: the range of coverage over kinds and accuracies."""
    replicated = kinds[0].replicates > 1
    figures = [figure for figure in ("top1", "tail", "ece") if figure in found[kinds[0].name]]
    by_size: dict[tuple[int, int], list[dict[str, Found]]] = {}
    for case in kinds:
        size = (case.replicates if replicated else case.seeds, case.images)
        by_size.setdefault(size, []).append(found[case.name])
    lines = []
    for size, mine in by_size.items():
        cells = []
        for figure in figures:
            # Fewer judged data sets say little: 100 have a standard error of 2 points.
            shares = [s for f in mine if f[figure].judged >= sets / 2 and (s := f[figure].where_judged) is not None]
            cells.append(f"{min(shares):.1f} to {max(shares):.1f}" if shares else "no verdict")
        least = min(f[figure].everywhere for f in mine for figure in ("top1", "tail"))
        wrong = max(f[figure].wrong for f in mine for figure in f)
        lines.append([*size, *cells, f"at least {least:.1f}", f"at most {wrong:.1f}"])
    first, last = ("replicates", "all") if replicated else ("seeds", "all of top1, tail")
    return markdown([first, "images a class", *figures, last, "wrong verdicts"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000, help="data sets a case")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--replicates", action="store_true", help="the kinds with replicates alone")
    given = parser.parse_args()
    kinds = REPLICATED_CASES if given.replicates else CASES
    out = given.out.with_name(f"{given.out.stem}_replicates.json") if given.replicates else given.out
    found = {}
    for number, case in enumerate(kinds):
        of = coverage_over_replicates if given.replicates else coverage
        found[case.name] = of(case, given.sets, np.random.default_rng([number, int(given.replicates)]))
        print(f"{number + 1} of {len(kinds)}: {case.name}", file=sys.stderr, flush=True)
    cases = [{**asdict(case), "found": {k: asdict(v) for k, v in found[case.name].items()}} for case in kinds]
    out.write_text(json.dumps({"sets": given.sets, "cases": cases}, indent=1) + "\n", encoding="utf-8")
    print(table(kinds, found, given.sets))
    return 0


if __name__ == "__main__":
    sys.exit(main())

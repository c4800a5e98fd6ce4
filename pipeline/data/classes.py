"""Class facts: where each class lies among class-sorted samples, and which classes are head, medium and tail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h2t.pipeline.base.errors import UserError

#: Sizes of head and medium in the papers' tables, by number of classes and largest training count where it matters.
PAPER_INDEX = {10: (3, 4), 100: (36, 35), 1000: (390, 445), 8142: (842, 3701), 365: (131, 157)}

GROUPS = ("head", "medium", "tail")


def recorded_names(provenance: Mapping[str, Any], where: object) -> list[str]:
    """The class names that the record of the cache `where` holds. Raises UserError: anybody may have written it."""
    names = provenance.get("classes")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: its record names no classes; extract again, or import the features anew")
    return names


@dataclass(frozen=True, slots=True)
class ClassIndex:
    """Class-sorted samples: class j holds positions starts[j] to starts[j] + counts[j]. Both int64 (classes,)."""

    starts: np.ndarray
    counts: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())


def class_index(labels: np.ndarray, names: Sequence[str]) -> ClassIndex:
    """The index of sorted `labels`, int (n,). Raises UserError for a class without samples, or the other way."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise UserError(f"labels {labels.min()} to {labels.max()} for {len(names)} classes; extract again")
    counts = np.bincount(labels, minlength=len(names)).astype(np.int64)
    if (counts == 0).any():
        empty = int(np.argmin(counts))
        raise UserError(
            f"class {empty} ({names[empty]}): every class needs a training sample to draw from; got 0; "
            "drop the class or lower prepare.imbalance.ratio"
        )
    return ClassIndex(np.cumsum(counts) - counts, counts)


def groups(counts: Sequence[int]) -> dict[str, list[str | None]]:
    """Every group definition: name -> the group of each class, for classes in descending order of count.

    `paper_index` follows the index ranges of the papers' tables, and 30/40/30 % of the classes for any other number of
    classes; `paper_threshold`: head n > 100, medium 20 < n <= 100, tail n <= 20; `oltr`: medium 20 <= n <= 100.
    """
    first, second = PAPER_INDEX.get(len(counts), (round(0.3 * len(counts)), round(0.4 * len(counts))))
    return {
        "paper_index": by_index(len(counts), first, first + second),
        "paper_threshold": ["head" if n > 100 else "medium" if n > 20 else "tail" for n in counts],
        "oltr": ["head" if n > 100 else "medium" if n >= 20 else "tail" for n in counts],
    }


def by_index(classes: int, first: int, second: int) -> list[str | None]:
    """Head is classes 0 to `first`, medium to `second`, tail the rest (exclusive ends)."""
    return ["head" if i < first else "medium" if i < second else "tail" for i in range(classes)]

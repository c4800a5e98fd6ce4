"""Facts about classes: the positions of their samples, and which classes are head, medium and tail classes."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted

#: Number of classes -> (number of head classes, of medium classes) in the papers' tables.
PAPER_INDEX = {10: (3, 4), 100: (36, 35), 1000: (390, 445), 8142: (842, 3701), 365: (131, 157)}

#: Gives samplers their random streams: key -> generator.
Streams = Callable[..., np.random.Generator]

GROUPS = ("head", "medium", "tail")
SHOWN = 3  # groups of similar names in a line


def recorded_names(provenance: Mapping[str, Any], where: object) -> list[str]:
    """The class names in the record of the cache `where`. Raises UserError if there are none, or no valid ones."""
    names = provenance.get("classes")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: its record must name the classes; extract or import the cache again")
    return names


def describe_similar(names: Sequence[str]) -> list[str]:
    """A line if class names differ only by case, spaces, signs without width or Unicode form (é as one sign or two)."""
    alike: dict[str, list[str]] = {}
    for name in names:
        seen = "".join(sign for sign in name if unicodedata.category(sign) != "Cf")  # those have no width
        alike.setdefault(" ".join(unicodedata.normalize("NFC", seen).casefold().split()), []).append(name)
    groups = [group for group in alike.values() if len(group) > 1]
    if not groups:
        return []
    named = [" and ".join(_told_apart(group)) for group in groups[:SHOWN]]
    more = f"; and {len(groups) - SHOWN:,} more" if len(groups) > SHOWN else ""
    return [
        f"class names that differ only by case, spaces, invisible signs or Unicode form: {'; '.join(named)}{more}; "
        "each is a class of its own; if they mean the same, give their images one name"
    ]


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names in quotes, in ASCII where they would look the same."""
    same_look = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
    return [ascii(name) if same_look else repr(name) for name in names]


@dataclass(frozen=True, slots=True)
class ClassIndex:
    """Samples sorted by class: class j has the positions from starts[j] up to, not including, starts[j] + counts[j].

    `starts` and `counts`: int64 (classes,).
    """

    starts: np.ndarray
    counts: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def samples(self) -> int:
        return int(self.counts.sum())

    def drawn(self, draws: np.random.Generator, share: np.ndarray, size: int) -> np.ndarray:
        """Positions of `size` draws, int64: a class in proportion to `share` (classes,), then one of its samples."""
        label = draws.choice(self.classes, size=size, p=share / share.sum())
        return self.starts[label] + draws.integers(self.counts[label])


def class_index(labels: np.ndarray, names: Sequence[str], times: np.ndarray | None = None) -> ClassIndex:
    """The index of sorted `labels`, int (n,); each occurs as often as `times`, int (n,), says, or once.

    Raises UserError for a label out of range and for an empty class.
    """
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise UserError(
            f"labels: with {counted(len(names), 'class', 'classes')} labels are 0 to {len(names) - 1}; "
            f"got {labels.min()} to {labels.max()}; extract again"
        )
    counts = np.bincount(labels, times, len(names)).astype(np.int64)
    if (counts == 0).any():
        empty = int(np.argmin(counts))
        raise UserError(
            f"class {names[empty]}: must have at least one training sample; got 0; "
            "drop the class or lower prepare.imbalance.ratio"
        )
    return ClassIndex(np.cumsum(counts) - counts, counts)


def groups(counts: Sequence[int]) -> dict[str, list[str | None]]:
    """Definition of groups -> the group of each class. `counts`: training samples per class, descending.

    `paper_index`: the index ranges of the papers' tables; 30, 40 and 30 % of the classes for other numbers of classes.
    `paper_threshold`, by the class's training count n: head n > 100, medium 20 < n <= 100, tail n <= 20.
    `oltr`: the same, but medium is 20 <= n <= 100.
    """
    first, second = PAPER_INDEX.get(len(counts), (round(0.3 * len(counts)), round(0.4 * len(counts))))
    return {
        "paper_index": by_index(len(counts), first, first + second),
        "paper_threshold": ["head" if n > 100 else "medium" if n > 20 else "tail" for n in counts],
        "oltr": ["head" if n > 100 else "medium" if n >= 20 else "tail" for n in counts],
    }


def by_index(classes: int, first: int, second: int) -> list[str | None]:
    """The group of each class: head below `first`, medium below `second`, tail from there on."""
    return ["head" if i < first else "medium" if i < second else "tail" for i in range(classes)]

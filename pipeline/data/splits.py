"""Which images are held out for testing and validation, and what happens to small classes and to copies of images.

Everything is drawn from the seed and depends on names alone, not on the order in which a dataset lists its images.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Count, Index, Ratio, Section, above, within
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.base.text import counted, some
from h2t.pipeline.data.images import Collection
from h2t.pipeline.data.texts import Texts

OTHER = "other"  # the class that small classes are merged into
NAMED = 5  # so many classes or groups are named in a line
SPLIT_WORDS = {"train": "training", "val": "validation", "test": "test"}


class AtMost(Section):
    """A number of images of each class to hold out."""

    at_most: Count
    """Images of each class that are held out, at most."""
    share: Ratio = 1.0
    """Of a class's images, at most this share is held out."""
    keep: Count = 1
    """Images of each class that stay for training, at least."""


#: What is held out of each class: a share of its images, or a number of images.
HoldOut = Annotated[float, above(0), within(0, 0.9)] | AtMost


class SmallClasses(Section):
    """Section `prepare.min_per_class`."""

    n: Index = 0
    """Classes with fewer training images than this are small."""
    then: Literal["keep", "drop", "merge"] = "keep"
    """Train small classes but hold nothing out of them, drop them, or merge them into one class `other`."""


@dataclass
class Labelled:
    """The images of a collection as arrays: label int32 (n,) and split, text (n,); of dropped images it is "".

    `group` numbers the group of each image, an index into `groups`, int32 (n,); None without groups.
    """

    classes: list[str]
    source: Texts
    label: np.ndarray
    split: np.ndarray
    group: np.ndarray | None = None
    groups: Texts = field(default_factory=lambda: Texts.of([]))

    @classmethod
    def of(cls, images: Collection) -> "Labelled":
        """The arrays of a collection. Raises UserError for a group that is in two of the collection's splits."""
        label, split = np.array(images.label, np.int32), np.array(images.split, object)
        found = cls(list(images.classes), Texts.of(images.source), label, split)
        if images.group is not None:
            found.group, found.groups = Texts.of(images.group).numbered()
            found._refuse_divided_groups(found.group)
        return found

    def _refuse_divided_groups(self, group: np.ndarray) -> None:
        present = np.zeros((len(SPLIT_WORDS), len(self.groups)), bool)
        for row, name in zip(present, SPLIT_WORDS, strict=True):
            row[group[self.split == name]] = True
        divided = np.flatnonzero(present.sum(0) > 1)
        if len(divided):
            first = min(divided, key=lambda i: self.groups[i])
            words = zip(SPLIT_WORDS.values(), present[:, first], strict=True)
            where = " and ".join(sorted(word for word, there in words if there))
            raise UserError(
                f"{counted(len(divided), 'group')} must lie in one split each; got {self.groups[first]!r} in {where} "
                "images; correct the splits, or leave prepare.options.group out"
            )

    def members(self, split: str) -> list[np.ndarray]:
        """The positions of each class's images in `split`, ascending. Sorts once; a search per class would be slow."""
        inside = np.flatnonzero(self.split == split)
        inside = inside[np.argsort(self.label[inside], kind="stable")]
        return np.split(inside, np.searchsorted(self.label[inside], np.arange(1, len(self.classes))))

    def sizes(self, split: str) -> np.ndarray:
        """Images of each class in `split`, int64 (classes,)."""
        return np.bincount(self.label[self.split == split], minlength=len(self.classes))

    def named(self, classes: Iterable[int]) -> str:
        """The names of `classes`, the first few of them."""
        return shortened([self.classes[j] for j in classes])


def shortened(names: Sequence[str]) -> str:
    """The first few of `names`, separated by commas, and how many more there are."""
    return some(names, NAMED)


def treat_small_classes(images: Labelled, small: SmallClasses) -> tuple[Labelled, list[str]]:
    """(the images after small classes were dropped or merged, notes). `keep` changes nothing here."""
    sizes = images.sizes("train")
    few = np.flatnonzero(sizes < small.n)
    if not len(few) or small.then == "keep":
        return images, []
    inside = np.isin(images.label, few)
    images_of = counted(int(inside.sum()), "image")
    which = f"{counted(len(few), 'class', 'classes')} of fewer than {counted(small.n, 'training image')}"
    stay = [j for j in range(len(sizes)) if sizes[j] >= small.n]
    if small.then == "drop":
        if not stay:
            raise UserError(
                f"prepare.min_per_class.n: must leave at least one class; got {small.n}, and the largest has "
                f"{counted(int(sizes.max()), 'training image')}; lower it"
            )
        done = f"note: prepare.min_per_class drops {which}, {images_of}: {images.named(few)}"
        return _relabelled(images, {j: i for i, j in enumerate(stay)}, [images.classes[j] for j in stay]), [done]
    name = OTHER
    while name in (images.classes[j] for j in stay):
        name += "_"
    new = {j: i for i, j in enumerate(stay)} | {int(j): len(stay) for j in few}
    done = f"note: prepare.min_per_class merges {which}, {images_of}, into {name!r}: {images.named(few)}"
    return _relabelled(images, new, [*(images.classes[j] for j in stay), name]), [done]


def _relabelled(images: Labelled, new: Mapping[int, int], classes: list[str]) -> Labelled:
    """The images with other labels; those whose class is not in `new` are dropped."""
    table = np.array([new.get(j, -1) for j in range(len(images.classes))], np.int32)
    label = table[images.label]
    split = np.where(label < 0, "", images.split)
    return replace(images, classes=classes, label=np.maximum(label, 0), split=split)


def hold_out(images: Labelled, into: str, how: HoldOut, small: SmallClasses, seed: int) -> None:
    """Moves training images to the split `into`, "test" or "val", in place.

    A share gives round(share * n) of a class's n images, `at_most` gives min(at_most, share * n, n - keep); at least
    one image of each class stays. With groups, whole groups move, so that the numbers are met as nearly as these allow.
    """
    members = images.members("train")
    wanted = np.array([number_held(len(m), how) if len(m) >= small.n else 0 for m in members])
    keep = np.full(len(members), how.keep if isinstance(how, AtMost) else 1)
    if images.group is None:
        for j, positions in enumerate(members):
            by_name = positions[images.source.take(positions).order()]
            drawn = stream(seed, "hold out", into, images.classes[j]).permutation(len(by_name))[: wanted[j]]
            images.split[by_name[drawn]] = into
    else:
        _move_groups(images, images.group, into, wanted, keep, seed)


def without(images: Labelled, into: str) -> list[str]:
    """A note on the classes without an image in the split `into`, if there is that split."""
    held = images.sizes(into)
    lacking = np.flatnonzero((held == 0) & (images.sizes("train") > 0))
    if not held.any() or not len(lacking):
        return []
    which = f"{counted(len(lacking), 'class', 'classes')} of {len(held):,}"
    return [f"note: no {SPLIT_WORDS[into]} images of {which}, trained but not measured: {images.named(lacking)}"]


def left_for_training(images: Labelled, before: np.ndarray) -> list[str]:
    """A note on the classes of which less than a third of the `before` training images stay, by rules of `at_most`."""
    after = images.sizes("train")
    bare = [j for j in np.argsort(after, kind="stable") if 3 * after[j] < before[j]]
    if not bare:
        return []
    which = shortened([f"{images.classes[j]} {after[j]:,} of {before[j]:,}" for j in bare])
    key, example = ("share", "share: 0.4") if images.group is None else ("keep", "share: 0.4, keep: 10")
    return [
        f"note: less than a third of {counted(len(bare), 'class', 'classes')} stays for training: {which}; for more, "
        f"set {key} in prepare.test and prepare.validation, such as {{at_most: 20, {example}}}"
    ]


def number_held(size: int, how: HoldOut) -> int:
    """How many of the `size` training images of a class are to be held out."""
    if isinstance(how, AtMost):
        return max(0, min(how.at_most, int(how.share * size + 1e-9), size - how.keep))  # 0.29 * 100 is below 29
    return min(int(how * size + 0.5), max(0, size - 1))


def _move_groups(
    images: Labelled, group: np.ndarray, into: str, wanted: np.ndarray, keep: np.ndarray, seed: int
) -> None:
    """Moves whole groups, those with the rarest classes first, as long as each brings the classes nearer to `wanted`.

    Nearer: the sum over classes of |wanted - held| / max(wanted, 1) falls. No class falls below `keep`.
    """
    inside = np.flatnonzero(images.split == "train").astype(np.int32)
    inside = inside[np.argsort(group[inside], kind="stable")]
    present, starts = np.unique(group[inside], return_index=True)
    ends = np.append(starts[1:], len(inside))
    left, held = images.sizes("train"), np.zeros(len(wanted), np.int64)
    rarity = np.minimum.reduceat(left[images.label[inside]], starts) if len(inside) else left[:0]
    by_name = images.groups.take(present).order()
    shuffled = by_name[stream(seed, "hold out", into, "groups").permutation(len(present))]
    for i in shuffled[np.argsort(rarity[shuffled], kind="stable")]:
        members = inside[starts[i] : ends[i]]
        part = Counter(images.label[members].tolist())
        gain = 0.0
        for j, count in part.items():
            missing = int(wanted[j] - held[j])
            gain += (abs(missing) - abs(missing - count)) / max(int(wanted[j]), 1)
        if gain > 0 and all(left[j] - count >= keep[j] for j, count in part.items()):
            images.split[members] = into
            for j, count in part.items():
                left[j] -= count
                held[j] += count


def describe_copies(images: Labelled, alike: Sequence[Sequence[int]]) -> list[str]:
    """Lines on images that are equal byte by byte: in one class and split, in two splits, and under two labels."""
    lines = []
    labels = [group for group in alike if len({int(images.label[i]) for i in group}) > 1]
    splits = [group for group in alike if len({images.split[i] for i in group}) > 1]
    same = [group for group in alike if group not in labels and group not in splits]
    for groups, what in ((labels, "under two labels"), (splits, "in two splits"), (same, "more than once")):
        if groups:
            pair = groups[0]
            other = next((i for i in pair[1:] if _place(images, i) != _place(images, pair[0])), pair[1])
            named = " and ".join(f"{images.source[i]} ({_place(images, i)})" for i in (pair[0], other))
            lines.append(f"{counted(len(groups), 'image')} {what}, such as {named}")
    return lines


def _place(images: Labelled, i: int) -> str:
    return f"{images.classes[images.label[i]]}, {images.split[i]}"


def drop_copies(images: Labelled, alike: Sequence[Sequence[int]]) -> int:
    """Drops copies in place and returns how many. Of equal images one stays, a test image rather than a training one.

    Of images under two labels none stays, as nobody knows which label is right.
    """
    dropped = 0
    for group in alike:
        one_label = len({int(images.label[i]) for i in group}) == 1
        first = min(group, key=lambda i: (("test", "val", "train").index(images.split[i]), images.source[i]))
        gone = [i for i in group if not one_label or i != first]
        images.split[gone] = ""
        dropped += len(gone)
    return dropped

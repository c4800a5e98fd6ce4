"""The report of `h2t init`: classes as bars, sizes, modes, unreadable images and copies, in lines of text."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from h2t.cache.redaction import printable
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import describe_similar
from h2t.pipeline.data.labels import USUAL
from h2t.pipeline.data.splits import Labelled, describe_copies
from h2t.pipeline.data.texts import Texts
from h2t.pipeline.project.detect import Found
from h2t.pipeline.project.survey import Survey

WIDTH = 40  # characters of the longest bar
MOST, LAST = 20, 5  # of more classes than MOST, the first MOST - LAST and the last LAST are shown
NAME = 24  # characters of a class name
SAID = 3  # unreadable images that are named


def lines(found: Found, seen: Survey, *, bar: str = "█") -> Iterator[str]:
    """Yields the lines of the report, without signs that control a terminal. `bar` is the sign of bars."""
    return map(printable, _lines(found, seen, bar))


def _lines(found: Found, seen: Survey, bar: str) -> Iterator[str]:
    images = found.collection
    classes = counted(len(images.classes), "class", "classes")
    sizes = ", ".join(f"{split} {size:,}" for split in USUAL if (size := images.split.count(split)))
    yield f"{counted(len(images.source), 'image')} in {classes} (dataset {found.dataset}); {sizes}"
    yield from bars(images.classes, images.label, bar)
    if len(sides := seen.readable):
        low, high, middle = sides.min(), sides.max(), int(np.median(sides))
        yield f"short side  {low:,} pixels" + (f" to {high:,}, half of them at least {middle:,}" if high > low else "")
    yield "modes       " + ", ".join(f"{mode} {count:,}" for mode, count in seen.modes.most_common())
    if seen.turned:
        yield f"EXIF        {counted(seen.turned, 'image')} turned as their orientation says"
    if seen.animated:
        yield f"animated    {counted(seen.animated, 'image')}: only the first frame is used"
    if seen.deep:
        yield f"range       values of 16-bit and floating-point images: {seen.deep[0]:g} to {seen.deep[1]:g}"
    if len(seen.values) > 1 and "F" in seen.values:
        by_mode = ", ".join(f"{mode} {low:g} to {high:g}" for mode, (low, high) in sorted(seen.values.items()))
        yield f"            {by_mode}: one range holds for all, so convert one kind if these differ much"
    if images.group:
        groups = counted(len(Texts.of(images.group).numbered()[1]), "group")
        yield f"groups      {groups} by the column {found.options['group']!r}: none is divided among splits"
    notes = [*(note.removeprefix("note: ") for note in images.notes), *describe_similar(images.classes)]
    yield from (f"note        {note}" for note in notes)
    yield from _unreadable(found, seen)
    alike = seen.digests.copies()
    yield from (f"copies      {line}" for line in describe_copies(Labelled.of(images), alike))
    if alike:
        yield "            copies are left out, and all of an image under two labels (duplicates: drop)"
    if not seen.digests.known.any():
        yield "copies      not looked for; --check all reads every byte"


def bars(classes: list[str], label: list[int], bar: str) -> Iterator[str]:
    """A bar for each class, in descending order of its images."""
    counts = Counter(label)
    ordered = sorted(range(len(classes)), key=lambda j: (-counts[j], classes[j]))
    largest = max(counts.values())
    shown = ordered if len(ordered) <= MOST else [*ordered[: MOST - LAST], -1, *ordered[-LAST:]]
    names = {j: printable(classes[j]) for j in shown if j >= 0}
    width = min(NAME, max(map(len, names.values())))
    for j in shown:
        if j < 0:
            yield f"  ... {counted(len(ordered) - MOST, 'class', 'classes')} between"
            continue
        name = names[j] if len(names[j]) <= width else names[j][: width - 1] + "…"
        yield f"  {name:{width}} {counts[j]:>7,} {bar * max(1, round(WIDTH * counts[j] / largest))}"


def _unreadable(found: Found, seen: Survey) -> Iterator[str]:
    if not seen.unreadable:
        return
    yield f"unreadable  {counted(len(seen.unreadable), 'image')}, left out (bad_images: skip)"
    for i, reason in list(seen.unreadable.items())[:SAID]:
        yield f"            {found.collection.source[i]} {reason}"
    if len(seen.unreadable) > SAID:
        yield f"            and {len(seen.unreadable) - SAID:,} more, listed in data/prepare/skipped.parquet"

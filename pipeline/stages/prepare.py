"""prepare: chooses the samples. Holds out test and validation images, cuts a long tail if asked, orders the classes.

Writes `samples.parquet` (one row per sample, sorted by split, label, source, with the number of its group if the data
has groups) and `classes.json` (names, counts, class order, groups, transform). Both depend only on the dataset and the
parameters, so every machine gets the same subset.
Each chosen image is decoded once, so that a bad image is found here and not hours into stage I. Bad images that were
left out are listed in `skipped.parquet`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from h2t.cache.redaction import printable
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Index, Positive, Section, Seed, at_least, build, plugin
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Run, Say
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.base.text import counted
from h2t.pipeline.data import splits
from h2t.pipeline.data.classes import describe_similar, groups
from h2t.pipeline.data.images import BadImage, Collection, Images, open_images
from h2t.pipeline.data.samples import GROUPED, SCHEMA
from h2t.pipeline.data.splits import HoldOut, Labelled, SmallClasses
from h2t.pipeline.data.texts import Digests, Texts, first_repeat

NUMBER = 2026112801  # other results, another number: docs/numbers.md

NO_SPLIT = 127  # sorts after every split
GROUP_ROWS = 2**20  # samples of a row group in samples.parquet: as pyarrow would write the whole table
PIECE_ROWS = 2**17  # samples that are Python objects at a time, of 500 bytes each


class Imbalance(Section):
    """Section `prepare.imbalance`: the long tail that is cut from the training images."""

    profile: Literal["none", "exponential", "step"] = "none"
    """How class counts fall: exponentially, or in one step at half of the classes; `none` keeps every image: right for
    data that is long-tailed already."""
    ratio: Annotated[Positive, at_least(1)] = 1.0
    """Images of the largest class divided by images of the smallest."""
    seed: Seed = 0
    """Chooses which images of a class are kept."""


class Params(Section):
    """Section `prepare`."""

    dataset: Annotated[str, plugin("datasets")]
    """Where images and labels come from."""
    options: dict[str, Any] = {}
    """Options of the dataset; see below."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """Stop at the first image that cannot be decoded, or leave such images out and record them."""
    imbalance: Imbalance = Imbalance()
    """The long tail that is cut from the training images."""
    test: HoldOut | None = None
    """Test images held out before the tail is cut, for a dataset without test images: a share of each class, or
    `{at_most: n, share: s, keep: k}`: up to n images of each class, at most the share s of it (with groups, as
    nearly as these allow), as long as k stay for training."""
    validation: HoldOut | None = None
    """The same for validation images, which then choose the ratio; of the images that `test` leaves."""
    test_per_class: Index = 0
    """Images of each class held out as test images, in place of `test`; an error if a class is too small."""
    validation_per_class: Index = 0
    """Images of each class held out as validation images, in place of `validation`."""
    min_per_class: SmallClasses = SmallClasses()
    """What happens to classes with few training images."""
    duplicates: Literal["note", "refuse", "drop"] = "note"
    """Name images that are equal byte by byte, stop at them, or drop all but one before anything is held out; of images
    under two labels, drop all."""

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> "Params":
        for name in ("test", "validation"):
            if getattr(self, name) is not None and getattr(self, f"{name}_per_class"):
                raise ValueError(f"set {name} or {name}_per_class, not both")
        return self


def run(params: Params, run: Run) -> None:
    """Chooses the samples of the dataset and writes them to the directory `run.out`.

    `run.seed` decides which samples are held out. Raises UserError for data that cannot be used, BadImage for an image.
    """

    def say(text: str) -> None:
        run.say(printable(text))  # names of files and classes may hold line breaks

    dataset = plugins.load("datasets", params.dataset)
    options = build(dataset.Options, "prepare.options", params.options)
    images: Collection = dataset.load(options)
    for note in images.notes:
        say(note)
    for line in describe_similar(images.classes):
        say(f"note: {line}")
    found, listed_split, read = Labelled.of(images), images.split, images.read
    del images  # its lists are as large as the arrays made of them
    opened = open_images(dataset, options, found.source, None, dataset.transform(options))  # no digests exist yet

    digests = Digests(len(found.source))
    bad: dict[int, BadImage] = {}
    if params.duplicates == "drop":
        bad = _digest(opened, np.arange(len(found.source), dtype=np.int32), digests, params.bad_images)
        _drop_copies(found, digests, bad, say)
    found, notes = splits.treat_small_classes(found, params.min_per_class)
    if len(found.classes) < 2:
        raise UserError(
            f"dataset {params.dataset!r}: must have two or more classes; got one, {found.classes[0]!r}; correct "
            "prepare.options, or lower prepare.min_per_class.n"
        )
    whole = found.sizes("train")
    _hold_out(found, "test", params, run.seed, notes)
    _hold_out(found, "val", params, run.seed, notes)
    before = found.sizes("train")
    if any(isinstance(how, splits.AtMost) for how in (params.test, params.validation)):
        notes += splits.left_for_training(found, whole)
    kept = _long_tail(found, params.imbalance)
    if len(kept) < before.sum():
        notes.append(_cut(before, len(kept)))
    for note in notes:
        say(note)

    chosen = (found.split == "val") | (found.split == "test")
    chosen[kept] = True
    del kept
    if params.duplicates != "drop":
        bad = _digest(opened, np.flatnonzero(chosen), digests, params.bad_images)
        _name_copies(found, digests, params.duplicates, say)
    chosen &= digests.known
    label, split, classes = found.label, found.split, found.classes
    counts = np.bincount(label[chosen & (split == "train")], minlength=len(classes))
    if counts.min() == 0:
        raise UserError(
            f"class {classes[int(counts.argmin())]}: must have at least one usable training image; got 0; "
            "repair one, or remove the class"
        )
    order = np.argsort(-counts, kind="stable")  # class order map: new label -> native label
    label = np.argsort(order).astype(np.int32)[label]
    places = _in_order(chosen, split, label, found.source)
    if first_repeat(found.source, places) is not None:
        raise UserError(
            f"dataset {params.dataset!r}: sources must be unique; got one for two images; correct the plug-in"
        )

    ordered = counts[order].tolist()
    with fresh_directory(run.out) as into:
        _write_samples(into / "samples.parquet", places, found, label, digests)
        if params.bad_images == "skip":
            split_of = {i: str(split[i] or listed_split[i]) for i in bad}
            pq.write_table(_skipped(bad, split_of), into / "skipped.parquet", compression="zstd")
        write_json(
            into / "classes.json",
            {
                "dataset": params.dataset,
                "classes": [classes[j] for j in order],
                "counts": ordered,
                "order": order.tolist(),
                "groups": groups(ordered),
                "transform": json.loads(dataset.transform(options).model_dump_json()),
                "imbalance": json.loads(params.imbalance.model_dump_json()),
                **({"read": read} if read else {}),
            },
        )
    sizes = {name: int((chosen & (split == name)).sum()) for name in ("train", "val", "test")}
    class_count = counted(len(order), "class", "classes")
    most, fewest = ordered[0], ordered[-1]
    each = f"{most:,} to {fewest:,} training images" if most > fewest else f"{counted(most, 'training image')} each"
    say(f"{params.dataset}: {class_count} of {each}; " + ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if bad:
        first = next(iter(bad.values()))
        left_out = counted(len(bad), "bad image")
        say(f"note: {left_out} left out, listed in skipped.parquet; first: {first.source} {first.reason}")
    if ordered[-1] == 1:
        say("note: at least one class has only one training sample")
    if not sizes["val"]:
        say("note: no validation split, so no ratio can be chosen; evaluate.ratio is the ratio that is reported")


def _digest(images: Images, chosen: np.ndarray, into: Digests, policy: str) -> dict[int, BadImage]:
    """Puts the sha256 of the images `chosen`, whole numbers (n,), `into` digests, and returns the errors of bad ones.

    Raises BadImage if `policy` is `refuse`.
    """
    bad: dict[int, BadImage] = {}
    bar = progress(images.digests(chosen), "prepare", unit="image", total=len(chosen))
    for i, result in zip(chosen, bar, strict=True):
        if isinstance(result, str):
            into[i] = result
        elif policy == "refuse":
            raise result
        else:
            bad[int(i)] = result
    return bad


def _in_order(chosen: np.ndarray, split: np.ndarray, label: np.ndarray, source: Texts) -> np.ndarray:
    """The places of the images `chosen`, bool (n,), sorted by split, label and source; uint64."""
    import pyarrow.compute as pc  # takes 0.1 s to import, and every stage imports this module

    splits_in_order = sorted(("train", "val", "test"))
    codes = np.full(len(chosen), NO_SPLIT, np.int8)
    for code, name in enumerate(splits_in_order):
        codes[chosen & (split == name)] = code
    columns = pa.table({"split": codes, "label": label, "source": source.column})
    keys = [(name, "ascending") for name in columns.column_names]
    places: np.ndarray = pc.sort_indices(columns, sort_keys=keys).to_numpy()[: chosen.sum()]
    return places


def _write_samples(path: Path, places: np.ndarray, found: Labelled, label: np.ndarray, digests: Digests) -> None:
    """Writes samples.parquet: the images at `places`, in this order, a row group at a time.

    Groups are numbered by name, whatever the order of the images.
    """
    schema = SCHEMA if found.group is None else GROUPED
    numbers = np.argsort(found.groups.order()).astype(np.int32)
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for first in range(0, len(places), GROUP_ROWS):
            group, pieces = places[first : first + GROUP_ROWS], []
            for start in range(0, len(group), PIECE_ROWS):
                piece = group[start : start + PIECE_ROWS]
                columns = {
                    "sample": pa.array(range(first + start, first + start + len(piece)), pa.int64()),
                    "split": pa.array(found.split[piece].tolist(), pa.string()),
                    "label": pa.array(label[piece]),
                    "source": found.source.take(piece).column,
                    "digest": pa.array(digests.texts(piece), pa.string()),
                }
                if found.group is not None:
                    columns["group"] = pa.array(numbers[found.group[piece]])
                pieces.append(pa.table(columns, schema))
            file.write_table(pa.concat_tables(pieces).combine_chunks())


def _skipped(bad: dict[int, BadImage], split: Mapping[int, str]) -> pa.Table:
    """The table of bad images: columns split, source and reason, sorted by split and source."""
    return pa.table(
        {
            "split": pa.array([split[i] for i in bad], pa.string()),
            "source": pa.array([image.source for image in bad.values()], pa.string()),
            "reason": pa.array([image.reason for image in bad.values()], pa.string()),
        }
    ).sort_by([("split", "ascending"), ("source", "ascending")])


def _drop_copies(found: Labelled, digests: Digests, bad: dict[int, BadImage], say: Say) -> None:
    """Drops bad images and copies of others from `found`, and says so."""
    found.split[list(bad)] = ""
    alike = digests.copies()
    for line in splits.describe_copies(found, alike):
        say(f"note: {line}")
    if alike:
        say(f"note: prepare.duplicates=drop leaves out {counted(splits.drop_copies(found, alike), 'image')}")


def _name_copies(found: Labelled, digests: Digests, policy: str, say: Say) -> None:
    """Says which images are equal byte by byte. Raises UserError if there are any and `policy` is `refuse`."""
    alike = digests.copies()
    lines = splits.describe_copies(found, alike)
    if lines and policy == "refuse":
        raise UserError(
            f"prepare.duplicates=refuse: images must differ; got {'; '.join(lines)}; remove the copies, or set "
            "prepare.duplicates to drop"
        )
    for line in lines:
        say(f"note: {line}; prepare.duplicates=drop leaves copies out")
    tests = [[i for i in copies if found.split[i] == "test"] for copies in alike]
    if found.group is None and any(len(copies) > 1 for copies in tests):
        say("note: copies among the test images count as one image in intervals")
    elif found.group is not None and any(len(set(found.group[copies].tolist())) > 1 for copies in tests):
        say("note: copies among the test images, in different groups, make intervals too narrow")


def _cut(before: np.ndarray, after: int) -> str:
    """What the long tail leaves out; `before` and `after` it was cut, training images of each class and in all."""
    already = before.max() >= 2 * before.min()
    return f"imbalance: {after:,} of {before.sum():,} training images are kept" + (
        f"; the classes have {before.max():,} to {before.min():,} as they are, and "
        "prepare.imbalance.profile=none keeps all"
        if already
        else ""
    )


def _hold_out(found: Labelled, into: str, params: Params, seed: int, notes: list[str]) -> None:
    """Holds out what the parameters ask for, unless the dataset has the split `into`. Appends to `notes`.

    Raises UserError if there is no test split and none is asked for.
    """
    key = {"test": "test", "val": "validation"}[into]
    how, per_class = getattr(params, key), getattr(params, f"{key}_per_class")
    if (found.split == into).any():
        if how is not None:
            notes.append(f"note: the dataset has {splits.SPLIT_WORDS[into]} images, so prepare.{key} holds out none")
    elif how is not None:
        splits.hold_out(found, into, how, params.min_per_class, seed)
    elif per_class and found.group is None:
        _hold_out_per_class(found, into, per_class, f"prepare.{key}_per_class", seed)
    elif per_class:
        splits.hold_out(found, into, splits.AtMost(at_most=per_class), params.min_per_class, seed)
    notes += splits.without(found, into)
    if into == "test" and not (found.split == into).any():
        if how is None and not per_class:
            raise UserError(
                "prepare.test: must be set, as the dataset has no test split; got nothing; set it to a share such as "
                "0.2, or name test images in prepare.options.test"
            )
        raise UserError(
            f"prepare.{key}: must leave at least one image for testing; got none; set a larger share, lower keep, or "
            "use groups of fewer images"
        )


def _hold_out_per_class(found: Labelled, into: str, per_class: int, key: str, seed: int) -> None:
    """Moves `per_class` random images of each class from train to `into`."""
    for j, members in enumerate(found.members("train")):
        if len(members) <= per_class:
            raise UserError(
                f"{key}: must leave class {found.classes[j]} one of its {counted(len(members), 'sample')} for "
                f"training; got {per_class}; lower it, or set {key.removesuffix('_per_class')} to a share such as 0.2"
            )
        found.split[stream(seed, "prepare", into, j).permutation(members)[:per_class]] = into


def long_tailed_counts(largest: int, classes: int, imbalance: Imbalance) -> list[int]:
    """Samples per class, descending: a list of `classes` numbers.

    `exponential`: n_j = floor(n_0 * ratio^(-j / (C - 1))) for j from 0 to C - 1. `step`: n_0 for the first half of the
    classes, floor(n_0 / ratio) for the second. Here n_0 is `largest` and C is `classes`.
    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.
    """
    share = 1 / imbalance.ratio
    if imbalance.profile == "exponential":
        return [int(largest * share ** (j / max(1, classes - 1))) for j in range(classes)]
    if imbalance.profile == "step":
        return [largest if j < classes // 2 else int(largest * share) for j in range(classes)]
    return [largest] * classes


def _long_tail(found: Labelled, imbalance: Imbalance) -> np.ndarray:
    """The training samples that are kept, int64. One legacy RandomState shuffles the classes in order.

    With seed 0 this is the subset that the published codes of LDAM-DRW, MiSLAS, GCL, RIDE, ResLT and H2T train on.
    """
    names, members = found.classes, found.members("train")
    sizes = [len(m) for m in members]
    if min(sizes) == 0:
        raise UserError(
            f"class {names[sizes.index(0)]}: must have at least one training sample; got 0; add one, or drop the "
            "class: prepare.min_per_class={n: 1, then: drop}"
        )
    if imbalance.profile == "none":
        return np.concatenate(members)
    wanted = long_tailed_counts(min(sizes) if len(set(sizes)) > 1 else sizes[0], len(names), imbalance)
    if min(wanted) == 0:
        empty = wanted.index(0)
        raise UserError(
            f"prepare.imbalance.ratio: must leave class {names[empty]} at least one of its "
            f"{counted(sizes[empty], 'sample')}; got {imbalance.ratio:g}, which leaves 0; lower the ratio, or for data "
            "that is long-tailed already set prepare.imbalance.profile to none"
        )
    draws = np.random.RandomState(imbalance.seed)
    kept = []
    for indices, count in zip(members, wanted, strict=True):
        draws.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)

"""prepare: chooses the samples. Holds out evaluation samples, makes the rest long-tailed, orders the classes.

Writes `samples.parquet` (one row per sample, sorted by split, label, source) and `classes.json` (names, counts, class
order, groups, transform). Both depend only on the dataset and the parameters, so every machine gets the same subset.
Each chosen image is decoded once, so that a bad image is found here and not hours into stage I. Bad images that were
left out are listed in `skipped.parquet`.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Index, Positive, Section, Seed, at_least, build, plugin
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import groups
from h2t.pipeline.data.images import BadImage, Collection, Images, open_images

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Imbalance(Section):
    """Section `prepare.imbalance`: the long tail that is cut from the training images."""

    profile: Literal["none", "exponential", "step"] = "none"
    """How class counts fall: exponentially, or in one step at half of the classes; `none` keeps every image."""
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
    test_per_class: Index = 0
    """Images of each class held out as test images, before the tail is cut; for a dataset without test images."""
    validation_per_class: Index = 0
    """Images of each class held out as validation images, which then choose the ratio."""


def run(params: Params, run: Run) -> None:
    """Chooses the samples of the dataset and writes them to the directory `run.out`.

    `run.seed` decides which samples are held out. Raises UserError for data that cannot be used, BadImage for an image.
    """
    dataset = plugins.load("datasets", params.dataset)
    options = build(dataset.Options, "prepare.options", params.options)
    images: Collection = dataset.load(options)
    label, split = np.array(images.label), np.array(images.split, object)

    _hold_out(label, split, "test", params.test_per_class, "prepare.test_per_class", run.seed)
    _hold_out(label, split, "val", params.validation_per_class, "prepare.validation_per_class", run.seed)
    kept = _long_tail(label, split, params.imbalance, images.classes)

    chosen = sorted([*kept.tolist(), *np.flatnonzero(split != "train").tolist()])
    opened = open_images(dataset, options, images.source, None, dataset.transform(options))  # no digests exist yet
    digests, bad = _digests(opened, chosen, params.bad_images)
    chosen = [i for i in chosen if i in digests]
    counts = np.bincount(label[[i for i in chosen if split[i] == "train"]], minlength=len(images.classes))
    if counts.min() == 0:
        empty = int(counts.argmin())
        raise UserError(
            f"class {empty} ({images.classes[empty]}): must have at least one usable training image; got 0; "
            "repair one or drop the class"
        )
    order = np.argsort(-counts, kind="stable")  # class order map: new label -> native label
    relabel = np.argsort(order)
    table = pa.table(
        {
            "split": pa.array([str(split[i]) for i in chosen]),
            "label": pa.array([int(relabel[label[i]]) for i in chosen], pa.int32()),
            "source": pa.array([images.source[i] for i in chosen]),
            "digest": pa.array([digests[i] for i in chosen]),
        }
    ).sort_by([("split", "ascending"), ("label", "ascending"), ("source", "ascending")])
    if len(pa.compute.unique(table["source"])) != len(table):
        raise UserError(
            f"dataset {params.dataset!r}: sources must be unique; got one for two images; correct the plug-in"
        )
    table = table.add_column(0, "sample", pa.array(range(len(table)), pa.int64()))

    ordered = counts[order].tolist()
    with fresh_directory(run.out) as into:
        pq.write_table(table, into / "samples.parquet", compression="zstd")
        if params.bad_images == "skip":
            pq.write_table(_skipped(bad, split), into / "skipped.parquet", compression="zstd")
        write_json(
            into / "classes.json",
            {
                "dataset": params.dataset,
                "classes": [images.classes[j] for j in order],
                "counts": ordered,
                "order": order.tolist(),
                "groups": groups(ordered),
                "transform": json.loads(dataset.transform(options).model_dump_json()),
                "imbalance": json.loads(params.imbalance.model_dump_json()),
            },
        )
    sizes = {name: table["split"].to_pylist().count(name) for name in ("train", "val", "test")}
    class_count = counted(len(order), "class", "classes")
    run.say(
        f"{params.dataset}: {class_count} of {ordered[0]:,} to {ordered[-1]:,} training images; "
        + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    )
    if bad:
        first = next(iter(bad.values()))
        left_out = counted(len(bad), "bad image")
        run.say(f"note: {left_out} left out, listed in skipped.parquet; first: {first.source} {first.reason}")
    if ordered[-1] == 1:
        run.say("note: at least one class has only one training sample")
    if not sizes["val"]:
        run.say("note: no validation split, so no ratio can be chosen; evaluate.ratio is the ratio that is reported")


def _digests(images: Images, chosen: Sequence[int], policy: str) -> tuple[dict[int, str], dict[int, BadImage]]:
    """(image -> sha256 of its bytes, image -> error of a bad image). Raises BadImage if `policy` is `refuse`."""
    good: dict[int, str] = {}
    bad: dict[int, BadImage] = {}
    bar = progress(images.digests(chosen), "prepare", unit="image", total=len(chosen))
    for i, result in zip(chosen, bar, strict=True):
        if isinstance(result, str):
            good[i] = result
        elif policy == "refuse":
            raise result
        else:
            bad[i] = result
    return good, bad


def _skipped(bad: dict[int, BadImage], split: np.ndarray) -> pa.Table:
    """The table of bad images: columns split, source and reason, sorted by split and source."""
    return pa.table(
        {
            "split": pa.array([str(split[i]) for i in bad], pa.string()),
            "source": pa.array([image.source for image in bad.values()], pa.string()),
            "reason": pa.array([image.reason for image in bad.values()], pa.string()),
        }
    ).sort_by([("split", "ascending"), ("source", "ascending")])


def _hold_out(label: np.ndarray, split: np.ndarray, name: str, per_class: int, key: str, seed: int) -> None:
    """Moves `per_class` random samples of each class from train to `name`, unless the dataset has that split."""
    if (split == name).any() or not per_class:
        if name == "test" and not (split == name).any():
            raise UserError(
                f"{key}: must be at least 1, as the dataset has no test split; got {per_class}; set the number of test "
                "samples per class"
            )
        return
    for j, members in enumerate(_members(label, split, label.max() + 1)):
        if len(members) <= per_class:
            raise UserError(
                f"{key}: must leave class {j} one of its {counted(len(members), 'sample')} for training; "
                f"got {per_class}; lower it"
            )
        split[stream(seed, "prepare", name, j).permutation(members)[:per_class]] = name


def _members(label: np.ndarray, split: np.ndarray, classes: int) -> list[np.ndarray]:
    """The training samples of each class, ascending. Sorts once: a search per class takes hours for 100,000 classes."""
    train = np.flatnonzero(split == "train")
    train = train[np.argsort(label[train], kind="stable")]
    return np.split(train, np.searchsorted(label[train], np.arange(1, classes)))


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


def _long_tail(label: np.ndarray, split: np.ndarray, imbalance: Imbalance, names: Sequence[str]) -> np.ndarray:
    """The training samples that are kept, int64. One legacy RandomState shuffles the classes in order.

    With seed 0 this is the subset that the published codes of LDAM-DRW, MiSLAS, GCL, RIDE, ResLT and H2T train on.
    """
    members = _members(label, split, len(names))
    sizes = [len(m) for m in members]
    if min(sizes) == 0:
        empty = sizes.index(0)
        raise UserError(
            f"class {empty} ({names[empty]}): must have at least one training sample; got 0; drop the class"
        )
    if imbalance.profile == "none":
        return np.concatenate(members)
    wanted = long_tailed_counts(min(sizes) if len(set(sizes)) > 1 else sizes[0], len(names), imbalance)
    if min(wanted) == 0:
        empty = wanted.index(0)
        raise UserError(
            f"prepare.imbalance.ratio: must leave class {empty} ({names[empty]}) at least one of its "
            f"{counted(sizes[empty], 'sample')}; got {imbalance.ratio:g}, which leaves 0; lower the ratio"
        )
    draws = np.random.RandomState(imbalance.seed)
    kept = []
    for indices, count in zip(members, wanted, strict=True):
        draws.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)

"""prepare: choose the samples. Holds out evaluation samples, makes the rest long-tailed, orders the classes.

Writes `samples.parquet` (one line per sample, sorted by split, label, source) and `classes.json` (names, counts, class
order, groups, transform). They are a pure function of the dataset and the parameters: another lab gets the same subset.
Every chosen image is decoded once, so that a bad one is met here and not hours into stage I; what was left out for that
reason is listed in `skipped.parquet`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Index, Positive, Section, Seed, at_least, build, plugin
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.seeds import stream
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


def run(params: Params, seed: int, out: Path, say: Callable[[str], None]) -> None:
    """Prepares the samples of the dataset into the directory `out`."""
    dataset = plugins.load("datasets", params.dataset)
    options = build(dataset.Options, "prepare.options", params.options)
    found: Collection = dataset.load(options)
    label, split = np.array(found.label), np.array(found.split, object)

    _hold_out(label, split, "test", params.test_per_class, "prepare.test_per_class", seed)
    _hold_out(label, split, "val", params.validation_per_class, "prepare.validation_per_class", seed)
    kept = _long_tail(label, split, params.imbalance, found.classes)

    chosen = sorted([*kept.tolist(), *np.flatnonzero(split != "train").tolist()])
    images = open_images(dataset, options, found.source, None, dataset.transform(options))  # digests are made here
    digests, bad = _digests(images, chosen, params.bad_images)
    chosen = [i for i in chosen if i in digests]
    counts = np.bincount(label[[i for i in chosen if split[i] == "train"]], minlength=len(found.classes))
    if counts.min() == 0:
        empty = int(counts.argmin())
        raise UserError(f"class {empty} ({found.classes[empty]}): none of its training images can be used; mend one")
    order = np.argsort(-counts, kind="stable")  # class order map: new label -> native label
    relabel = np.argsort(order)
    table = pa.table(
        {
            "split": pa.array([str(split[i]) for i in chosen]),
            "label": pa.array([int(relabel[label[i]]) for i in chosen], pa.int32()),
            "source": pa.array([found.source[i] for i in chosen]),
            "digest": pa.array([digests[i] for i in chosen]),
        }
    ).sort_by([("split", "ascending"), ("label", "ascending"), ("source", "ascending")])
    if len(pa.compute.unique(table["source"])) != len(table):
        raise UserError(f"dataset {params.dataset!r}: two images have the same source; sources must be unique")
    table = table.add_column(0, "sample", pa.array(range(len(table)), pa.int64()))

    ordered = counts[order].tolist()
    with fresh_directory(out) as into:
        pq.write_table(table, into / "samples.parquet", compression="zstd")
        if params.bad_images == "skip":
            pq.write_table(_skipped(bad, split), into / "skipped.parquet", compression="zstd")
        write_json(
            into / "classes.json",
            {
                "dataset": params.dataset,
                "classes": [found.classes[j] for j in order],
                "counts": ordered,
                "order": order.tolist(),
                "groups": groups(ordered),
                "transform": json.loads(dataset.transform(options).model_dump_json()),
                "imbalance": json.loads(params.imbalance.model_dump_json()),
            },
        )
    sizes = {name: table["split"].to_pylist().count(name) for name in ("train", "val", "test")}
    say(f"{params.dataset}: {len(order)} classes, {ordered[0]} to {ordered[-1]} training samples; {sizes}")
    if bad:
        first = next(iter(bad.values()))
        say(f"note: {len(bad)} bad images left out, see skipped.parquet; the first: {first.source} {first.reason}")
    if ordered[-1] == 1:
        say("note: a class has one training sample; its accuracy rests on that one image")
    if not sizes["val"]:
        say("note: no validation split; nothing is chosen, evaluate.ratio decides which ratio is reported")


def _digests(images: Images, chosen: Sequence[int], policy: str) -> tuple[dict[int, str], dict[int, BadImage]]:
    """(image -> sha256 of its bytes, image -> what is wrong with it). Raises BadImage if the policy is to refuse."""
    good: dict[int, str] = {}
    bad: dict[int, BadImage] = {}
    bar = progress(images.digests(chosen), "prepare", unit="image", total=len(chosen))
    for i, found in zip(chosen, bar, strict=True):
        if isinstance(found, str):
            good[i] = found
        elif policy == "refuse":
            raise found
        else:
            bad[i] = found
    return good, bad


def _skipped(bad: dict[int, BadImage], split: np.ndarray) -> pa.Table:
    """Columns split, source and reason, sorted by split and source."""
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
            raise UserError(f"{key}: the dataset has no test split, so some samples must be held out; got {per_class}")
        return
    for j, members in enumerate(_members(label, split, label.max() + 1)):
        if len(members) <= per_class:
            raise UserError(
                f"{key}: class {j} has {len(members)} samples to hold out from and must keep one; got {per_class}"
            )
        split[stream(seed, "prepare", name, j).permutation(members)[:per_class]] = name


def _members(label: np.ndarray, split: np.ndarray, classes: int) -> list[np.ndarray]:
    """The training samples of each class, ascending; sorted once, as looking for each class takes hours for 100,000."""
    train = np.flatnonzero(split == "train")
    train = train[np.argsort(label[train], kind="stable")]
    return np.split(train, np.searchsorted(label[train], np.arange(1, classes)))


def long_tailed_counts(largest: int, classes: int, imbalance: Imbalance) -> list[int]:
    """Samples per class: n_j = floor(n_1 * ratio^(-j / (C - 1))) or, for a step, n_1 and floor(n_1 / ratio) halves.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019.
    """
    share = 1 / imbalance.ratio
    if imbalance.profile == "exponential":
        return [int(largest * share ** (j / max(1, classes - 1))) for j in range(classes)]
    if imbalance.profile == "step":
        return [largest if j < classes // 2 else int(largest * share) for j in range(classes)]
    return [largest] * classes


def _long_tail(label: np.ndarray, split: np.ndarray, imbalance: Imbalance, names: Sequence[str]) -> np.ndarray:
    """Training samples that stay, chosen by the reference rule: one legacy RandomState through the classes in order.

    With the seed 0 this is the subset that the published codes of LDAM-DRW, MiSLAS, GCL, RIDE, ResLT and H2T train on.
    """
    members = _members(label, split, len(names))
    sizes = [len(m) for m in members]
    if min(sizes) == 0:
        empty = sizes.index(0)
        raise UserError(f"class {empty} ({names[empty]}): every class needs a training sample; got 0; drop the class")
    if imbalance.profile == "none":
        return np.concatenate(members)
    wanted = long_tailed_counts(min(sizes) if len(set(sizes)) > 1 else sizes[0], len(names), imbalance)
    if min(wanted) == 0:
        empty = wanted.index(0)
        raise UserError(
            f"prepare.imbalance.ratio: class {empty} ({names[empty]}) must keep at least one of its {sizes[empty]} "
            f"samples; got {imbalance.ratio:g}, which leaves 0; lower the ratio"
        )
    draws = np.random.RandomState(imbalance.seed)
    kept = []
    for indices, count in zip(members, wanted, strict=True):
        draws.shuffle(indices)
        kept.append(indices[:count])
    return np.concatenate(kept)

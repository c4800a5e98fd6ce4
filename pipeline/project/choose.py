"""Settings that fit the data: what is held out, the size of the network's input, the network, how long it trains."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.data.labels import USUAL
from h2t.pipeline.project.detect import Found
from h2t.pipeline.project.survey import Survey

LARGEST_SIDE = 64  # pixels of a small ResNet's input; it trains on a CPU
PASS = 128  # images in a pass that estimates batch-norm statistics
SHARE = 0.15  # of all images that are held out for testing, where classes allow it
MOST_HELD = 50  # test images of a class
MANY = 10_000  # images, from which fewer epochs are enough


@dataclass
class Settings:
    """The values of params.yaml that depend on the data, and lines that say what they do to images."""

    prepare: dict[str, Any]
    name: str
    backbone: dict[str, Any]
    batchnorm_passes: int
    notes: list[str] = field(default_factory=list)

    @property
    def pretrained(self) -> bool:
        """Whether the backbone is taken as it is."""
        return bool(self.backbone.get("frozen"))


def choose(found: Found, seen: Survey, backbone: str | None) -> Settings:
    """Settings for a collection and its survey. `backbone`: a plug-in, or PLUG-IN:MODEL; None trains a small ResNet.

    Raises UserError for an unknown backbone, and if no image can be read.
    """
    if not len(seen.readable):
        reason = next(iter(seen.unreadable.values()), "there are none")
        raise UserError(f"--data: no image can be read; the first {reason}; correct the data")
    transform: dict[str, Any] = {}
    if backbone is None:
        size = _side(seen.readable)
        transform = {"size": size, "resize": round(size * 1.125), "area": [0.35, 1.0]}
    if seen.deep is not None:
        transform["range"] = _range(*seen.deep, floating="F" in seen.modes)
    prepare: dict[str, Any] = {"dataset": found.dataset, "options": found.written()}
    if transform:
        prepare["options"]["transform"] = transform
    if seen.unreadable:
        prepare["bad_images"] = "skip"
    if seen.copies():
        prepare["duplicates"] = "drop"
    notes = _hold_outs(found, prepare)
    images = found.collection.split.count("train")
    name, entry = _network(backbone, 30 if images >= MANY else 60)
    passes = int(np.clip(-(-10 * images // PASS), 10, 50))  # about ten times each image
    return Settings(prepare, name, entry, passes, notes)


def _side(short_sides: np.ndarray) -> int:
    """The side of the input, in pixels: what most images have, in steps of 8 and at most `LARGEST_SIDE`."""
    low = int(np.quantile(short_sides, 0.1))
    return max(8, min(LARGEST_SIDE, low // 8 * 8))


def _range(low: float, high: float, *, floating: bool) -> list[float]:
    """The pixel values that become black and white: the bits in use, or what floating-point images hold."""
    if floating:
        return [low, high]
    bits = max(8, int(high).bit_length())
    return [0.0, float(2**bits - 1)]


def _hold_outs(found: Found, prepare: dict[str, Any]) -> list[str]:
    """Adds `test` and `validation` to `prepare` where the data has no such split; as many as the rarest class allows.

    Returns lines on what is held out and on classes that are dropped.
    """
    images = found.collection
    sizes = np.zeros(len(images.classes), int)
    for label, split in zip(images.label, images.split, strict=True):
        sizes[label] += split == "train"
    empty = [images.classes[j] for j in np.flatnonzero(sizes == 0)]
    if len(sizes) - len(empty) < 2:
        name = images.classes[int(sizes.argmax())]
        raise UserError(
            f"--data: two or more classes must have training images; got one, {name!r}; give the folder above the "
            "folders of the classes, or the column of the labels by --label"
        )
    if empty:
        prepare["min_per_class"] = {"n": 1, "then": "drop"}
    keep = 3 if np.median(sizes[sizes > 0]) >= 6 else 1
    test = next(
        (n for n in range(2, MOST_HELD) if np.minimum(n, sizes - keep).clip(0).sum() >= SHARE * sizes.sum()), MOST_HELD
    )
    if "test" not in images.split:
        if sizes.max() <= keep:
            raise UserError(
                "--data: no class has two images, so no test image can be held out; add images, or if these are not "
                "the classes, give another folder or --label COLUMN"
            )
        prepare["test"] = {"at_most": test, "keep": keep}
    if "val" not in images.split:
        prepare["validation"] = {"at_most": max(2, test // 2), "keep": max(1, keep - 1)}
    lines = [
        f"{key:12}up to {rule['at_most']} images of each class are held out, as long as {rule['keep']} stay"
        for key in ("test", "validation")
        if (rule := prepare.get(key))
    ]
    dropped = [f"note: no training image of {', '.join(empty[:5])}: dropped (min_per_class)"] if empty else []
    return [*lines, *dropped]


def check_backbone(backbone: str) -> None:
    """Raises UserError unless `backbone`, PLUG-IN or PLUG-IN:MODEL, names a plug-in."""
    arch, known = backbone.partition(":")[0], plugins.names("backbones")
    if arch not in known:
        raise UserError(f"--backbone {backbone}: no backbone {arch!r}{nearest(arch, known)}; type: h2t list backbones")


def _network(backbone: str | None, epochs: int) -> tuple[str, dict[str, Any]]:
    """(name of the entry, the entry) in the section `backbones`."""
    if backbone is None:
        return "resnet20", {
            "arch": "resnet20",
            "objective": "ce",
            "mixup": 1.0,
            "epochs": epochs,
            "batch_size": 64,
            "weight_decay": 0.0005,
            "schedule": "cosine",
        }
    check_backbone(backbone)
    arch, _, model = backbone.partition(":")
    entry: dict[str, Any] = {"arch": arch, "objective": "ce"}
    if model:
        entry["options"] = {"model": model}
    entry |= {"start": "pretrained", "frozen": True, "head": "probe"}
    name = "".join(sign if sign.isalnum() else "_" for sign in (model or arch).rpartition("/")[2]).strip("_")
    return name or arch, entry


def split_sizes(found: Found) -> dict[str, int]:
    """Split -> number of images, for the splits that the data has."""
    return {split: count for split in USUAL if (count := found.collection.split.count(split))}

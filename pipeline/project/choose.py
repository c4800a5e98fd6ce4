"""Settings that fit the data: what is held out, the size of the network's input, the network, how long it trains."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.params import INPUTS
from h2t.pipeline.data import splits
from h2t.pipeline.evaluation.intervals import FEWEST_CHANGED
from h2t.pipeline.heads.setting import Optimiser
from h2t.pipeline.project.detect import Found
from h2t.pipeline.project.survey import Survey

LARGEST_SIDE = 64  # pixels of a small ResNet's input; it trains on a CPU
PASS = 128  # images in a pass that estimates batch-norm statistics
SHARE = 0.15  # of all images that are held out for testing, where classes allow it
MOST_HELD = 50  # test images of a class
TEST, VALIDATION = 0.4, 0.25  # of a class's images at most, then of those left: 45 % of a rare class stay
MANY = 10_000  # images, from which fewer epochs are enough


@dataclass
class Settings:
    """The values of params.yaml that depend on the data, and lines that say what they do to images."""

    prepare: dict[str, Any]
    name: str
    backbone: dict[str, Any]
    batchnorm_passes: int
    classifier_epochs: int
    classes: int  # with training images
    notes: list[str] = field(default_factory=list)
    weights: Path | None = None

    @property
    def pretrained(self) -> bool:
        """Whether the backbone is taken as it is."""
        return self.backbone.get("head") == "probe"


def choose(found: Found, seen: Survey, backbone: str | None, weights: Path | None = None) -> Settings:
    """Settings for a collection and its survey. `backbone`: a plug-in, or PLUG-IN:MODEL; None trains a small ResNet.

    `weights` is a file with the backbone's weights; otherwise they are pretrained ones, and where there are none, it is
    trained. Raises UserError for an unknown backbone, and if no image can be read.
    """
    if not len(seen.readable):
        reason = next(iter(seen.unreadable.values()), "there are none")
        raise UserError(f"--data: no image can be read; the first {reason}; correct the data")
    transform: dict[str, Any] = {}
    if _takes_any_size(backbone):
        size = _side(seen.readable)
        transform = {"size": size, "resize": round(size * 1.125), "area": [0.35, 1.0]}
        if weights is not None:  # nothing is trained that augmented images would help
            transform = {"size": size, "resize": size}
    if seen.deep is not None:
        transform["range"] = _range(*seen.deep, floating="F" in seen.modes)
    prepare: dict[str, Any] = {"dataset": found.dataset, "options": found.written()}
    if transform:
        prepare["options"]["transform"] = transform
    if seen.unreadable:
        prepare["bad_images"] = "skip"
    if seen.digests.copies():
        prepare["duplicates"] = "drop"
    notes = _hold_outs(found, prepare)
    images = found.collection.split.count("train")
    name, entry = _network(backbone, weights, 30 if images >= MANY else 60)
    passes = int(np.clip(-(-10 * images // PASS), 10, 50))  # about ten times each image
    if weights is not None and "input" not in vars(plugins.load("backbones", entry["arch"])):
        notes.append(
            "note: pixels are normalised by ImageNet's mean and std; if the weights were made with others, write them "
            "to params.yaml: prepare.options.transform: {mean: [...], std: [...]}"
        )
    collection = found.collection
    used = {label for label, split in zip(collection.label, collection.split, strict=True) if split == "train"}
    enough = Optimiser.enough_epochs(_left(found, prepare))
    return Settings(prepare, name, entry, passes, enough, len(used), notes, weights)


def _left(found: Found, prepare: dict[str, Any]) -> int:
    """How many training images stay, but for copies and groups, when `prepare` has held out test and validation."""
    images = found.collection
    sizes = np.bincount([j for j, split in zip(images.label, images.split, strict=True) if split == "train"])
    for rule in filter(None, (prepare.get("test"), prepare.get("validation"))):
        sizes = sizes - _held(sizes, rule)
    return int(sizes.sum())


def _held(sizes: np.ndarray, rule: dict[str, Any]) -> np.ndarray:
    """How many images of each class, of which there are `sizes`, int (K,), a rule of `prepare` holds out."""
    return np.array([splits.number_held(int(size), splits.AtMost(**rule)) for size in sizes])


def _side(short_sides: np.ndarray) -> int:
    """The side of the input, in pixels: what most images have, in steps of 8 and at most `LARGEST_SIDE`."""
    low = int(np.quantile(short_sides, 0.1))
    return max(8, min(LARGEST_SIDE, low // 8 * 8))


def _range(low: float, high: float, *, floating: bool) -> list[float]:
    """The pixel values that become black and white: the bits in use, or what the images hold if they have
    fractions or negative values.
    """
    if floating or low < 0:
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
    shares = [{"share": TEST}, {"share": VALIDATION}]
    if np.median(sizes[sizes > 0]) < 6:  # no share of so few images is one image
        shares = [{}, {}]
    elif images.group:  # whole groups are held out, as nearly as they allow: of a rare class they may be too large
        rarest = int(sizes[sizes > 0].min())
        shares = [{**shares[0], "keep": max(3, rarest * 3 // 5)}, {**shares[1], "keep": max(2, rarest * 9 // 20)}]

    def held(most: int) -> int:
        """How many test images there are, with `most` of a class at most."""
        return int(_held(sizes, {"at_most": most, **shares[0]}).sum())

    test = next((n for n in range(2, MOST_HELD) if held(n) >= SHARE * sizes.sum()), MOST_HELD)
    if "test" not in images.split:
        if sizes.max() < 2:
            raise UserError(
                "--data: no class has two images, so no test image can be held out; add images, or if these are not "
                "the classes, give another folder or --label COLUMN"
            )
        prepare["test"] = {"at_most": test, **shares[0]}
    if "val" not in images.split:
        prepare["validation"] = {"at_most": max(2, test // 2), **shares[1]}
    few = _few_groups(images.group, held(test) / sizes.sum()) if "test" in prepare and images.group else []
    lines = [
        f"{key:12}up to {rule['at_most']} images of each class are held out"
        + (f", at most {rule['share']:.0%} of it" if "share" in rule else ", as long as one stays")
        + (", as nearly as whole groups allow" if images.group else "")
        for key in ("test", "validation")
        if (rule := prepare.get(key))
    ]
    dropped = [f"note: no training image of {', '.join(empty[:5])}: dropped (min_per_class)"] if empty else []
    return [*lines, *dropped, *few]


def _few_groups(group: Sequence[str], share: float) -> list[str]:
    """A line if so few groups, a `share` of all, will be test images that no difference between methods can be told."""
    groups = len(set(group))
    held = round(groups * share)
    if held >= FEWEST_CHANGED:
        return []
    return [
        f"note: about {max(1, held)} of {groups} groups will be test images; fewer than {FEWEST_CHANGED} never tell "
        "methods apart. If images of one group are no more alike than others, remove the line group from params.yaml"
    ]


def check_backbone(backbone: str | None, weights: Path | None = None) -> None:
    """Raises UserError unless `backbone`, PLUG-IN or PLUG-IN:MODEL, names a plug-in and `weights` is a file for it."""
    if weights is not None and not weights.expanduser().is_file():
        raise UserError(f"--weights {weights}: no such file; correct the path")
    if backbone is None:
        if weights is not None:
            raise UserError(
                f"--weights {weights}: needs the name of the network that they belong to; add --backbone NAME, such as "
                "resnet32 or torchvision:resnet18 (h2t list backbones)"
            )
        return
    arch, known = backbone.partition(":")[0], plugins.names("backbones")
    if arch not in known:
        way = "type: h2t list backbones"
        if Path(backbone).expanduser().is_file():
            way = f"for a file of weights give the network too: --backbone NAME --weights {shlex.quote(backbone)}"
        raise UserError(f"--backbone {backbone}: no backbone {arch!r}{nearest(arch, known)}; {way}")
    if ":" in backbone and "model" not in plugins.load("backbones", arch).Options.model_fields:
        raise UserError(
            f"--backbone {backbone}: {arch} is one network, so there is no model to choose; type --backbone {arch}, "
            "with --weights FILE for weights of your own"
        )


def check_weights(backbone: str, weights: Path) -> None:
    """Raises UserError unless the file `weights` holds weights of `backbone`, PLUG-IN or PLUG-IN:MODEL."""
    from h2t.pipeline.base.params import build
    from h2t.pipeline.stages import train_backbone

    _, entry = _network(backbone, weights, 0)
    asked = f"--weights {weights} for --backbone {backbone}"
    train_backbone.check_weights(build(train_backbone.Params, "--backbone", entry), weights.expanduser(), asked)


def _takes_any_size(backbone: str | None) -> bool:
    """Whether the images' size is to be chosen: the network states none, and has no weights that were made with one."""
    if backbone is None:
        return True
    arch = plugins.load("backbones", backbone.partition(":")[0])
    return not hasattr(arch, "input") and not hasattr(arch, "weights")


def _network(backbone: str | None, weights: Path | None, epochs: int) -> tuple[str, dict[str, Any]]:
    """(name of the entry, the entry) in the section `backbones`."""
    check_backbone(backbone, weights)
    arch, _, model = (backbone or "resnet20").partition(":")
    if weights is None and (backbone is None or not hasattr(plugins.load("backbones", arch), "weights")):
        return arch, {
            "arch": arch,
            **({"options": {"model": model}} if model else {}),
            "objective": "ce",
            "mixup": 1.0,
            "epochs": epochs,
            "batch_size": 64,
            "weight_decay": 0.0005,
            "schedule": "cosine",
        }
    entry: dict[str, Any] = {"arch": arch, "objective": "ce"}
    if model:
        entry["options"] = {"model": model}
    if weights is None:
        entry |= {"start": "pretrained", "frozen": True, "head": "probe"}
    else:
        entry |= {"weights": f"{INPUTS}weights", "head": "probe"}
    name = "".join(sign if sign.isalnum() else "_" for sign in (model or arch).rpartition("/")[2]).strip("_")
    return name or arch, entry

"""CIFAR-10 and CIFAR-100 as torchvision keeps them on disk, checked by their published MD5 sums.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. A source is `train/00042`, the
number in torchvision's order, which is the order that the published long-tailed subsets are drawn in.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.transforms import CIFAR


class Options(Section):
    """Keys of `prepare.options`."""

    root: str = "data/datasets"
    """Folder that holds torchvision's files."""
    download: bool = True
    """Download the files where they are missing."""
    transform: Transform = CIFAR
    """Size, augmentation and normalisation."""


@lru_cache(maxsize=2)
def _parts(name: str, root: str, download: bool) -> dict[str, Any]:
    """Split -> torchvision's data set called `name`, with `data` uint8 (N, 32, 32, 3) and `targets`."""
    from torchvision import datasets

    try:
        kind = getattr(datasets, name)
        return {split: kind(root, train=split == "train", download=download) for split in ("train", "test")}
    except (OSError, RuntimeError) as error:
        # torchvision raises RuntimeError for files that are missing or differ, URLError (an OSError) without network.
        if download:
            way = (
                f"({' '.join(str(error).split())}); put torchvision's files there, or set prepare.options.root to them"
            )
            raise UserError(f"{root}: {name} is not here whole and cannot be downloaded {way}") from None
        raise UserError(
            f"{root}: no whole copy of {name} here; set prepare.options.root, or prepare.options.download to true"
        ) from None


def load(name: str, options: Options) -> Collection:
    """Every image, training images first."""
    parts = _parts(name, options.root, options.download)
    return Collection(
        classes=list(parts["train"].classes),
        source=[f"{split}/{i:05d}" for split, part in parts.items() for i in range(len(part.targets))],
        label=[int(y) for part in parts.values() for y in part.targets],
        split=[split for split, part in parts.items() for _ in part.targets],
    )


def reader(name: str, options: Options) -> Callable[[str], bytes]:
    """The 3,072 pixel values of an image, row by row, RGB."""
    parts = _parts(name, options.root, options.download)

    def read(source: str) -> bytes:
        split, _, number = source.partition("/")
        return parts[split].data[int(number)].tobytes()

    return read


def decode(data: bytes) -> np.ndarray:
    """The pixel values as uint8 (32, 32, 3)."""
    return np.frombuffer(data, np.uint8).reshape(32, 32, 3)

"""Digits: 1,797 scans of 8x8 pixels that come with scikit-learn; no download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the test part). The dataset has no splits: `prepare` holds out test and validation samples.
"""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from h2t.pipeline.base.params import Section
from h2t.pipeline.data.images import Collection, Transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

LEVELS = 16  # pixel values are 0 to 16


class Options(Section):
    """No options."""


def transform(options: Options) -> Transform:
    """8x8 input, shifted by up to one pixel for augmentation. No flip: a mirrored digit is another shape."""
    return Transform(size=8, padding=1, mean=[0.305, 0.305, 0.305], std=[0.376, 0.376, 0.376])


def load(options: Options) -> Collection:
    """All scans, in scikit-learn's order."""
    labels = _scans()[:, -1]
    return Collection(
        classes=[str(d) for d in range(10)],
        source=[f"digits/{i:04d}" for i in range(len(labels))],
        label=[int(y) for y in labels],
        split=["train"] * len(labels),
    )


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the 64 pixel values of a source, one byte each."""
    pixels = _scans()[:, :-1]
    return lambda source: pixels[int(source.removeprefix("digits/"))].tobytes()


def _scans() -> np.ndarray:
    """uint8 (1797, 65): 64 pixel values and the digit, as in scikit-learn's `load_digits`.

    Reads the file directly: importing scikit-learn takes a second in each of three stages.
    """
    package = importlib.util.find_spec("sklearn")
    assert package is not None
    path = Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt", encoding="ascii") as lines:
        return np.loadtxt(lines, delimiter=",").astype(np.uint8)


def decode(data: bytes) -> np.ndarray:
    """The scan as a grey image, uint8 (8, 8, 3)."""
    grey = np.frombuffer(data, np.uint8).reshape(8, 8).astype(np.float32) * (255 / LEVELS)
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)

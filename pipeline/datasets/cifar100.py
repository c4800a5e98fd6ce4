"""CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels in 100 classes, in torchvision's files.

With `imbalance: {profile: exponential, ratio: R, seed: 0}` the training samples are those of the published codes.
"""

from collections.abc import Callable

from h2t.pipeline.data import cifar_files
from h2t.pipeline.data.cifar_files import Options, decode
from h2t.pipeline.data.images import Collection, Transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "decode", "load", "reader", "transform"]


def transform(options: Options) -> Transform:
    """As given in the options; by default 4 pixels of padding, a random crop and a flip."""
    return options.transform


def load(options: Options) -> Collection:
    """Every image, training images first."""
    return cifar_files.load("CIFAR100", options)


def reader(options: Options) -> Callable[[str], bytes]:
    """The 3,072 pixel values of an image."""
    return cifar_files.reader("CIFAR100", options)

"""CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in 10 classes, in torchvision's files.

`imbalance: {profile: exponential, ratio: R, seed: 0}` gives the training samples of the published codes.
"""

from functools import partial

from h2t.pipeline.data import cifar_files
from h2t.pipeline.data.cifar_files import Options, decode
from h2t.pipeline.data.transforms import transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "decode", "load", "reader", "transform"]

load = partial(cifar_files.load, "CIFAR10")
reader = partial(cifar_files.reader, "CIFAR10")

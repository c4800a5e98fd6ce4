"""ImageNet-LT: 115,846 training images in 1,000 classes (1,280 to 5 each), 50,000 for testing; by list files.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019. The lists have lines such as
`train/n01440764/n01440764_10026.JPEG 0` and `val/n01440764/ILSVRC2012_val_00000293.JPEG 0`. These are ImageNet's two
folders, with the validation images sorted into class folders. If you have the published validation list, set `val`.
"""

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Transform
from h2t.pipeline.data.list_files import inputs, load, reader
from h2t.pipeline.data.transforms import IMAGENET, transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "inputs", "load", "reader", "transform"]


class Options(list_files.Options):
    """`val: ImageNet_LT_val.txt` (20 images a class) exists in some of the published codes only."""

    train: str = "ImageNet_LT_train.txt"
    test: str | None = "ImageNet_LT_test.txt"
    transform: Transform = IMAGENET

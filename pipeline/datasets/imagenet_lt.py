"""ImageNet-LT: 115,846 training images in 1,000 classes (1,280 to 5 each), 50,000 for testing; by list files.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019. Its lists name
`train/n01440764/n01440764_10026.JPEG 0` and `val/n01440764/ILSVRC2012_val_00000293.JPEG 0`: ImageNet's two folders, the
validation images sorted into folders by class. The published validation list, if you have it, goes under `val`.
"""

from collections.abc import Callable

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.transforms import IMAGENET

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(list_files.Options):
    """`val: ImageNet_LT_val.txt` (20 images a class) exists in some of the published codes only."""

    train: str = "ImageNet_LT_train.txt"
    test: str | None = "ImageNet_LT_test.txt"
    transform: Transform = IMAGENET


def transform(options: Options) -> Transform:
    """As given in the options; by default MiSLAS's: 224 pixels, with colour jitter."""
    return options.transform


def class_name(source: str) -> str:
    """The WordNet number: `train/n01440764/x.JPEG` -> `n01440764`."""
    return "/".join(list_files.folders(source))


def load(options: Options) -> Collection:
    """Every image of the lists, in their order."""
    return list_files.load(options, class_name)


def inputs(options: Options) -> dict[str, str]:
    """The images and the lists."""
    return list_files.inputs(options)


def reader(options: Options) -> Callable[[str], bytes]:
    """The bytes of an image file under `root`."""
    return list_files.image_reader(options.root, options.follow_links)

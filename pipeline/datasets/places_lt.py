"""Places-LT: 62,500 training images in 365 classes (4,980 to 5 each), 36,500 for testing; by list files.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019. The lists exist in two styles,
both read: `data_256/a/airfield/00000001.jpg` with `val_256/Places365_val_00000001.jpg` (MiSLAS, GCL, H2T), and
`train/airfield/00000001.jpg` with `val/airfield/...` (classifier-balancing). Images lie as the lists name them.
"""

from collections.abc import Callable

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.transforms import IMAGENET

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(list_files.Options):
    """`val: Places_LT_val.txt` (20 images a class) exists in some of the published codes only."""

    train: str = "Places_LT_train.txt"
    test: str | None = "Places_LT_test.txt"
    transform: Transform = IMAGENET


def transform(options: Options) -> Transform:
    """As given in the options; by default MiSLAS's: 224 pixels, with colour jitter."""
    return options.transform


def class_name(source: str) -> str:
    """The same in both styles: `data_256/b/bow_window/indoor/x.jpg`, `train/bow_window-indoor/x.jpg`."""
    found = list_files.folders(source)
    return "-".join(found[1:] if len(found) > 1 and len(found[0]) == 1 else found)


def load(options: Options) -> Collection:
    """Every image of the lists, in their order."""
    return list_files.load(options, class_name)


def inputs(options: Options) -> dict[str, str]:
    """The images and the lists."""
    return list_files.inputs(options)


def reader(options: Options) -> Callable[[str], bytes]:
    """The bytes of an image file under `root`."""
    return list_files.image_reader(options.root, options.follow_links)

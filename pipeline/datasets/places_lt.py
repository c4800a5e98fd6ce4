"""Places-LT: 62,500 training images in 365 classes (4,980 to 5 each), 36,500 for testing; by list files.

Source: Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019. The lists exist in two styles.
Both can be read: `data_256/a/airfield/00000001.jpg` with `val_256/Places365_val_00000001.jpg` (MiSLAS, GCL, H2T), and
`train/airfield/00000001.jpg` with `val/airfield/...` (classifier-balancing). The folders must match the lists.
"""

from functools import partial

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Transform
from h2t.pipeline.data.list_files import inputs, reader
from h2t.pipeline.data.transforms import IMAGENET, transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "inputs", "load", "reader", "transform"]


class Options(list_files.Options):
    """`val: Places_LT_val.txt` (20 images a class) exists in some of the published codes only."""

    train: str = "Places_LT_train.txt"
    test: str | None = "Places_LT_test.txt"
    transform: Transform = IMAGENET


def class_name(source: str) -> str:
    """`bow_window-indoor`, from `data_256/b/bow_window/indoor/x.jpg` or from `train/bow_window-indoor/x.jpg`."""
    folders = list_files.folders(source)
    return "-".join(folders[1:] if len(folders) > 1 and len(folders[0]) == 1 else folders)


load = partial(list_files.load, class_of=class_name)

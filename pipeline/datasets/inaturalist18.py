"""iNaturalist 2018: 437,513 training images in 8,142 species (1,000 to 2 each), 24,426 for testing; by list files.

Source: Van Horn et al., "The iNaturalist Species Classification and Detection Dataset", CVPR 2018. The lists name
`train_val2018/Aves/2761/<id>.jpg 2761`. The published validation list, 3 images a species, is what everybody tests on.
"""

from collections.abc import Callable

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.transforms import INATURALIST

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(list_files.Options):
    """There is no published validation list; `prepare.validation_per_class` can carve one from training images."""

    train: str = "iNaturalist18_train.txt"
    test: str | None = "iNaturalist18_val.txt"
    transform: Transform = INATURALIST


def transform(options: Options) -> Transform:
    """As given in the options; by default MiSLAS's: 224 pixels, with colour jitter."""
    return options.transform


def class_name(source: str) -> str:
    """Kingdom and number: `train_val2018/Aves/2761/x.jpg` -> `Aves/2761`."""
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

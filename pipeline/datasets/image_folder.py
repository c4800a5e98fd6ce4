"""Any folder of images sorted by class: `<train>/<class>/.../<image>`, and the same for validation and test images.

The layout of torchvision's ImageFolder. Without `test`, prepare holds test samples out (`test_per_class`).
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from PIL import Image

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.params import Section
from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import FORMATS, Collection, Transform
from h2t.pipeline.data.transforms import IMAGENET

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Options(Section):
    """Keys of `prepare.options`."""

    root: str
    """Folder that holds all images."""
    train: str = "train"
    """Folder of the training images inside `root`; `.` where the class folders lie in `root` itself."""
    val: str | None = None
    """Folder of the validation images inside `root`; null for none."""
    test: str | None = None
    """Folder of the test images inside `root`; null for none."""
    follow_links: bool = False
    """Allow links that lead out of `root`."""
    transform: Transform = IMAGENET
    """Size, augmentation and normalisation."""


def transform(options: Options) -> Transform:
    """As given in the options; by default that of ImageNet, 224 pixels, with colour jitter."""
    return options.transform


def _images(options: Options, part: str) -> list[tuple[str, str]]:
    """(class, source) of every image in the folder `part`, sorted by class name, then by path."""
    root = Path(options.root)
    if not (root / part).is_dir():
        raise UserError(f"prepare.options: no folder {root / part}; it must hold a folder for each class")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = []
    for source in list_files.walk(root, part, options.follow_links):
        inside = PurePosixPath(source).relative_to(PurePosixPath(part)).parts
        if PurePosixPath(source).suffix.lower() in endings and len(inside) > 1:
            found.append((inside[0], source))
    if not found:
        raise UserError(f"{root / part}: no images in class folders here; set prepare.options.train, val and test")
    return sorted(found)


def load(options: Options) -> Collection:
    """Every image, classes in the order of their names. Files that are no images by their ending are left out."""
    classes = sorted({name for name, _ in _images(options, options.train)})
    number = {name: j for j, name in enumerate(classes)}
    source: list[str] = []
    label: list[int] = []
    split: list[str] = []
    for part in ("train", "val", "test"):
        folder = getattr(options, part)
        for name, path in _images(options, folder) if folder is not None else ():
            if name not in number:
                raise UserError(f"{path}: no training folder for class {name!r}{nearest(name, classes)}")
            list_files.locate(Path(options.root), path, options.follow_links)
            source.append(path)
            label.append(number[name])
            split.append(part)
    return Collection(classes, source, label, split)


def inputs(options: Options) -> dict[str, str]:
    """The folder of each part."""
    given = {part: getattr(options, part) for part in ("train", "val", "test")}
    return {part: str(Path(options.root) / folder) for part, folder in given.items() if folder is not None}


def reader(options: Options) -> Callable[[str], bytes]:
    """The bytes of an image file under `root`."""
    return list_files.image_reader(options.root, options.follow_links)

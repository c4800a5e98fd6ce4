"""Any folder of images sorted by class: `<train>/<class>/.../<image>`, and the same for validation and test images.

This is the layout of torchvision's ImageFolder. Without `test`, `prepare` holds out test samples (`test_per_class`).
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
    """The transform in the options; by default that of ImageNet, 224 pixels, with colour jitter."""
    return options.transform


def _images(options: Options, part: str) -> list[tuple[str, str]]:
    """(class, source) of each image in the folder `part`, sorted by class name, then by path."""
    root = Path(options.root)
    if not (root / part).is_dir():
        raise UserError(
            f"prepare.options: no folder {root / part}; set root, train, val and test to folders that hold one folder "
            "per class"
        )
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    images = []
    for source in list_files.walk(root, part, options.follow_links):
        inside = PurePosixPath(source).relative_to(PurePosixPath(part)).parts
        if PurePosixPath(source).suffix.lower() in endings and len(inside) > 1:
            images.append((inside[0], source))
    if not images:
        raise UserError(
            f"{root / part}: must hold a folder of images per class; got no images; "
            "set prepare.options.train, val and test"
        )
    return sorted(images)


def load(options: Options) -> Collection:
    """All images, with classes in alphabetical order. Files without the ending of an image format are ignored.

    Raises UserError for a missing folder, a folder without images, and a class without a training folder.
    """
    classes = sorted({name for name, _ in _images(options, options.train)})
    number = {name: j for j, name in enumerate(classes)}
    source: list[str] = []
    label: list[int] = []
    split: list[str] = []
    for part in ("train", "val", "test"):
        folder = getattr(options, part)
        for name, path in _images(options, folder) if folder is not None else ():
            if name not in number:
                raise UserError(
                    f"{path}: no training folder for class {name!r}{nearest(name, classes)}; add it or remove the image"
                )
            list_files.locate(Path(options.root), path, options.follow_links)
            source.append(path)
            label.append(number[name])
            split.append(part)
    return Collection(classes, source, label, split)


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: the folder of each split."""
    given = {part: getattr(options, part) for part in ("train", "val", "test")}
    return {part: str(Path(options.root) / folder) for part, folder in given.items() if folder is not None}


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the bytes of a source under `root`."""
    return list_files.image_reader(options.root, options.follow_links)

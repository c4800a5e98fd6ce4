"""Any folder of images sorted by class: `<train>/<class>/.../<image>`, and the same for validation and test images.

This is the layout of torchvision's ImageFolder. Validation and test folders of the usual names are found. Without test
images `prepare` holds some out (`prepare.test`). A `metadata.csv` of Hugging Face is read by the dataset `table`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.text import counted, some
from h2t.pipeline.data import decoding, list_files, tables
from h2t.pipeline.data.images import Collection
from h2t.pipeline.data.labels import USUAL, split_of
from h2t.pipeline.data.texts import Texts
from h2t.pipeline.data.transforms import OwnImages
from h2t.pipeline.data.transforms import transform as transform

NUMBER = 2026112801  # other results, another number: docs/numbers.md


class Options(OwnImages):
    root: str
    """Folder that holds all images."""
    train: str = "train"
    """Folder of the training images inside `root`; `.` where the class folders lie in `root` itself."""
    val: str | None = None
    """Folder of the validation images inside `root`; null looks for val, valid, validation and dev."""
    test: str | None = None
    """Folder of the test images inside `root`; null looks for test, testing and eval."""
    follow_links: bool = False
    """Allow links that lead out of `root`."""


def _folders(options: Options) -> dict[str, str]:
    """Split -> its folder inside `root`, with validation and test folders of the usual names."""
    root = Path(options.root)
    given = {part: getattr(options, part) for part in USUAL}
    if options.train != "." and root.is_dir():
        for folder in sorted(path.name for path in root.iterdir() if path.is_dir()):
            part = split_of(folder)
            if part is not None and given[part] is None:
                given[part] = folder
    return {part: folder for part, folder in given.items() if folder is not None}


def _images(options: Options, part: str) -> tuple[list[str], Texts, list[str]]:
    """(class and source of each image in the folder `part`, sorted by class, then by path; notes on other files).

    Raises UserError if there are none, or if the folder is of another layout.
    """
    root = Path(options.root)
    if part.startswith("/") or ".." in part.split("/"):
        raise UserError(
            f"prepare.options: train, val and test must be folders inside root, relative to it and without '..'; got "
            f"{part}; set root to a folder above all of them"
        )
    if not (root / part).is_dir():
        inside = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        here = f" (root holds {', '.join(inside[:5])}; where these are the classes, set train to .)" if inside else ""
        raise UserError(
            f"prepare.options: no folder {root / part}{here}; set root, train, val and test to folders that hold one "
            "folder per class"
        )
    endings = decoding.endings()
    number: dict[str, int] = {}
    inner: dict[str, set[str]] = {}  # the folders inside those of each class
    loose: list[str] = []
    others: Counter[str] = Counter()
    system: Counter[str] = Counter()
    class_of: list[int] = []

    depth = len(PurePosixPath(part).parts)  # the folder of the class comes after them

    def images() -> Iterator[str]:
        for source in list_files.walk(root, part, options.follow_links, system):
            inside_part = source.split("/")[depth:]
            stem, ending = list_files.stem_and_ending(inside_part[-1])
            if len(inside_part) < 3 and stem == "metadata" and ending in tables.ENDINGS:
                raise UserError(
                    f"{root / source}: this folder has its labels in a table; set prepare.dataset=table and "
                    f"prepare.options={{table: {root / source}, path: file_name, label: COLUMN}}, or remove the table"
                )
            if ending not in endings:
                others[ending or inside_part[-1]] += 1
            elif len(inside_part) > 1:
                name, *between = inside_part[:-1]
                class_of.append(number.setdefault(name, len(number)))
                inner.setdefault(name, set()).add(between[0] if between else "")
                yield source
            else:
                loose.append(source)

    found = Texts.of(images())
    if not class_of:
        raise UserError(
            f"{root / part}: must hold a folder of images per class; got "
            + (f"{counted(len(loose), 'image')} and no folders of images" if loose else "no images")
            + (f", but {list_files.kinds(others)} (convert photos of other kinds to JPEG or PNG)" if others else "")
            + "; set prepare.options.train, val and test, or list labels in a table (prepare.dataset=table)"
        )
    if all(split_of(name) for name in number):
        raise UserError(
            f"{root / part}: holds the splits {', '.join(sorted(number))}, not classes; set prepare.options.root to "
            "this folder and prepare.options.train to its training folder"
        )
    names, rank = list(number), np.argsort(np.argsort(list(number)))
    order = found.order()  # by path, and then by class
    order = order[np.argsort(rank[class_of][order], kind="stable")]
    notes = [
        *_left_out(root / part, loose, others),
        *_of_the_system(root / part, system),
        *_without_images(root / part, set(number)),
        *_same_folders(root / part, inner),
    ]
    return [names[class_of[i]] for i in order], found.take(order), notes


def _left_out(folder: Path, loose: list[str], others: Counter[str]) -> list[str]:
    """Notes on the files that are not used."""
    notes = []
    if loose:
        notes.append(
            f"note: {folder}: {counted(len(loose), 'image')} in no class folder, left out; first: {min(loose)}"
        )
    return notes + list_files.kinds_left_out(folder, others)


def _of_the_system(folder: Path, names: Counter[str]) -> list[str]:
    """A note on folders that an operating system or a file server made."""
    if not names:
        return []
    named = ", ".join(sorted(names))
    return [f"note: {folder}: {counted(names.total(), 'folder')} of the operating system left out: {named}"]


def _beside_splits(options: Options, parts: Iterable[str]) -> list[str]:
    """Notes on what lies beside the folders of the splits, as `test` beside `testing`, and is not read."""
    root = Path(options.root)
    if options.train == "." or not root.is_dir():
        return []
    read = {"".join(PurePosixPath(part).parts[:1]) for part in parts}
    if "" in read:
        return []
    beside = sorted(p for p in root.iterdir() if p.name not in read and not list_files.of_the_system(p.name))
    folders = [path.name for path in beside if path.is_dir()]
    loose = [p.name for p in beside if p.is_file() and list_files.stem_and_ending(p.name)[1] in decoding.endings()]
    notes = []
    if folders:
        where = f"beside {', '.join(sorted(read))}"
        notes.append(f"note: {root}: {counted(len(folders), 'folder')} {where} left out: {some(folders, 5)}")
    if loose:
        what = counted(len(loose), "image")
        notes.append(f"note: {root}: {what} in no folder of a split, left out; first: {loose[0]}")
    return notes


def _without_images(folder: Path, classes: set[str]) -> list[str]:
    """A note on class folders without an image."""
    empty = sorted(
        p.name
        for p in folder.iterdir()
        if p.is_dir() and p.name not in classes and not list_files.of_the_system(p.name)
    )
    if not empty:
        return []
    named = ", ".join(empty[:5])
    return [f"note: {folder}: {counted(len(empty), 'folder')} without images, so no class: {named}"]


def _same_folders(folder: Path, inner: dict[str, set[str]]) -> list[str]:
    """A note if all images lie in sub-folders of equal names, which may be the classes: site_A/cat, site_B/cat.

    `inner`: the folders inside those of each class, with "" for images that lie beside them.
    """
    shared = set.intersection(*inner.values()) - {""} if len(inner) > 1 else set()
    if not shared or any("" in names for names in inner.values()):
        return []
    return [
        f"note: {folder}: the classes are {', '.join(sorted(inner)[:3])}, which all have the folders "
        f"{', '.join(sorted(shared)[:3])}; if these are the classes, list the images in a table (prepare.dataset=table)"
    ]


def load(options: Options) -> Collection:
    """All images, with classes in alphabetical order. Files without the ending of an image format are left out.

    Raises UserError for a missing folder, a folder without images, and a class without a training folder.
    """
    folders = _folders(options)
    found = {part: _images(options, folder) for part, folder in folders.items()}
    classes = sorted(set(found["train"][0]))
    number = {name: j for j, name in enumerate(classes)}
    root = list_files.Root(options.root, options.follow_links)
    label: list[int] = []
    split: list[str] = []
    for part, (names, source, _) in found.items():
        for name, path in zip(names, source, strict=True):
            if name not in number:
                raise UserError(
                    f"{path}: no training folder for class {name!r}{nearest(name, classes)}; add it or remove the image"
                )
            root.locate(path)
            label.append(number[name])
        split += [part] * len(names)
    sources = Texts.joined(source for _, source, _ in found.values())
    notes = [note for *_, notes in found.values() for note in notes] + _beside_splits(options, folders.values())
    return Collection(classes, sources, label, split, notes=notes)


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: the folder of each split."""
    return {part: str(Path(options.root) / folder) for part, folder in _folders(options).items()}


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the bytes of a source under `root`."""
    return list_files.image_reader(options.root, options.follow_links)

"""Images in a folder, named by paths relative to it: what list-file datasets and image folders share.

A list has one image a line, `relative/path label`, as ImageNet-LT, Places-LT and iNaturalist 2018 were published
(Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019). A path is a source, so it must stay
the same wherever the folder lies, and nothing outside of the folder can be named.
"""

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.images import Collection, Transform

LABEL_DIGITS = 9


class Options(Section):
    """Keys of `prepare.options` that list-file datasets share."""

    root: str
    """Folder that holds the images."""
    lists: str | None = None
    """Folder of the list files; null is `root`."""
    train: str
    """List file of the training images, absolute or relative to `lists`."""
    val: str | None = None
    """List file of the validation images; null for none."""
    test: str | None = None
    """List file of the test images; null for none."""
    follow_links: bool = False
    """Allow links that lead out of `root`."""
    transform: Transform
    """Size, augmentation and normalisation."""


@lru_cache(maxsize=65536)
def _leaves(root: str, folder: str) -> bool:
    """Whether the directory `folder` lies outside of `root` once links are followed."""
    return not Path(folder).resolve().is_relative_to(Path(root).resolve())


def locate(root: Path, source: str, follow_links: bool) -> Path:
    """The file that `source` names under `root`. Raises UserError for a path that leaves it."""
    parts = PurePosixPath(source).parts
    if not parts or source.startswith(("/", "~")) or ".." in parts or "\\" in source or "\0" in source:
        raise UserError(f"path {source!r}: must be relative, with forward slashes and without '..'")
    path = root / source
    if follow_links:
        return path
    try:
        leaves = _leaves(str(root), str(path.parent)) or (path.is_symlink() and _leaves(str(root), str(path)))
    except (OSError, RuntimeError) as error:  # too long a name, or links in a circle
        raise UserError(f"path {source!r}: cannot be looked up ({getattr(error, 'strerror', None) or error})") from None
    if leaves:
        raise UserError(
            f"path {source!r}: a link leads out of the root; set prepare.options.root to where it leads, "
            "or prepare.options.follow_links to true"
        )
    return path


def read_image(root: Path, source: str, follow_links: bool) -> bytes:
    """The bytes of an image. Raises OSError where there is no plain file to read, UserError for an unsafe path."""
    path = locate(root, source, follow_links)
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise OSError("not a plain file")
    return path.read_bytes()


def image_reader(root: str, follow_links: bool) -> Callable[[str], bytes]:
    """`read_image` of one root."""
    return lambda source: read_image(Path(root), source, follow_links)


def read_list(path: Path, root: Path, follow_links: bool) -> tuple[list[str], list[int]]:
    """(sources, labels) of a list file. Raises UserError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such list file; set prepare.options.lists to the folder that holds it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list file ({error}); it must be UTF-8 text") from None
    sources: list[str] = []
    labels: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source, label = [*line.rsplit(None, 1), ""][:2]
        if not (label.isascii() and label.isdigit() and len(label) <= LABEL_DIGITS):
            raise UserError(f"{path}:{number}: must read 'relative/path label', the label from 0 on; got {line!r}")
        try:
            locate(root, source.strip(), follow_links)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        sources.append(source.strip())
        labels.append(int(label))
    if not sources:
        raise UserError(f"{path}: an empty list file; it must name at least one image")
    return sources, labels


def load(options: Options, class_of: Callable[[str], str]) -> Collection:
    """Every image that the lists name. `class_of` gives the class name that a training path speaks of."""
    root, lists = Path(options.root), Path(options.lists or options.root)
    if not root.is_dir():
        raise UserError(f"prepare.options.root: no folder {options.root}; set it to where the images lie")
    source: list[str] = []
    label: list[int] = []
    split: list[str] = []
    for name in ("train", "val", "test"):
        given = getattr(options, name)
        if given is not None:
            paths, labels = read_list(lists / given, root, options.follow_links)
            source += paths
            label += labels
            split += [name] * len(paths)
    _refuse_repeats(source)
    train = [i for i, part in enumerate(split) if part == "train"]
    highest = max(train, key=label.__getitem__)
    if label[highest] >= len(train):
        raise UserError(
            f"{options.train}: label {label[highest]} of {source[highest]!r}: labels count the classes from 0 on and "
            f"every class needs an image, so those of {len(train)} images lie below {len(train)}"
        )
    classes = class_names([source[i] for i in train], [label[i] for i in train], class_of)
    worst = max(range(len(label)), key=label.__getitem__)
    if label[worst] >= len(classes):
        raise UserError(
            f"{getattr(options, split[worst])}: label {label[worst]} of {source[worst]!r} is not among the "
            f"{len(classes)} classes of the training list"
        )
    return Collection(classes, source, label, split)


def inputs(options: Options) -> dict[str, str]:
    """The folder of the images and each list."""
    lists = Path(options.lists or options.root)
    given = {part: getattr(options, part) for part in ("train", "val", "test")}
    return {"root": options.root, **{part: str(lists / name) for part, name in given.items() if name is not None}}


def _refuse_repeats(sources: Sequence[str]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source in seen:
            raise UserError(f"list files: {source!r} is named twice; an image must be in one split, once")
        seen.add(source)


def class_names(sources: Sequence[str], labels: Sequence[int], class_of: Callable[[str], str]) -> list[str]:
    """The name of each label; the numbers, if the paths do not give every label a name of its own."""
    found: dict[int, set[str]] = {}
    for source, label in zip(sources, labels, strict=True):
        found.setdefault(label, set()).add(class_of(source))
    count = max(labels) + 1
    names = [min(found.get(j, {str(j)})) for j in range(count)]
    if len(set(names)) < count or any(len(one) > 1 for one in found.values()):
        return [str(j) for j in range(count)]
    return names


def folders(source: str) -> list[str]:
    """The folders of a path, without the first, which is the split's: `train/n01440764/x.JPEG` -> `n01440764`."""
    return list(PurePosixPath(source).parts[1:-1])


def walk(root: Path, part: str, follow_links: bool) -> list[str]:
    """Every file under `root/part`, as sorted paths relative to `root`; hidden ones are left out. Raises UserError."""
    found: list[str] = []
    seen: set[str] = set()  # real folders, so that links in a circle end
    for folder, inside, files in os.walk(root / part, followlinks=follow_links):
        real = os.path.realpath(folder)
        inside[:] = [] if real in seen else sorted(d for d in inside if not d.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        where = Path(folder).relative_to(root)
        links = [d for d in inside if not follow_links and (root / where / d).is_symlink()]
        if links:
            raise UserError(
                f"{root / where / links[0]}: a link to a folder; set prepare.options.follow_links to true to go along"
            )
        found += [(where / f).as_posix() for f in files if not f.startswith(".")]
    return sorted(found)

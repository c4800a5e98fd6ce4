"""Images in a folder, named by paths relative to it. Shared by list-file datasets and image folders.

A list has one image per line, `relative/path label`, as ImageNet-LT, Places-LT and iNaturalist 2018 were published
(Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", CVPR 2019). The path is the image's source. It does
not change when the folder is moved, and it cannot name a file outside the folder.
"""

import io
import os
import posixpath
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.text import counted
from h2t.pipeline.data import url_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.texts import Texts, first_repeat
from h2t.pipeline.data.url_files import Place, UrlFile

LABEL_DIGITS = 9
MOST_REMEMBERED = 65536  # paths of which a Root remembers whether they lead out of it

#: Names that are no class and no image, in lower case: what macOS, file servers (Synology, QNAP) and Windows leave.
OF_THE_SYSTEM = {
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}


class Options(Section):
    """Keys of `prepare.options` that list-file datasets share."""

    root: str
    """Folder that holds the images, or its URL."""
    lists: str | None = None
    """Folder of the list files, or its URL; null is `root`."""
    train: str
    """List file of the training images, absolute, at a URL, or relative to `lists`."""
    val: str | None = None
    """List file of the validation images; null for none."""
    test: str | None = None
    """List file of the test images; null for none."""
    follow_links: bool = False
    """Allow links that lead out of `root`."""
    transform: Transform
    """Size, augmentation and normalisation."""


def _check(root: "Root | str", source: str) -> None:
    """Raises UserError for a path that leaves `root`, a folder or URL."""
    if isinstance(root, Root):
        root.locate(source)
    elif url_files.relative(source, root, root) != posixpath.normpath(source) or ".." in source.split("/"):
        raise _not_relative(source)


def _not_relative(source: str) -> UserError:
    return UserError(f"path {source!r}: must be relative, with forward slashes and without '..'; correct it")


class Root:
    """A folder of images. No path of an image leaves it, unless `follow_links` allows links that do.

    It remembers which folders lead out of it, so one is made for each reading: links may change in between.
    """

    def __init__(self, folder: str | Path, follow_links: bool) -> None:
        self._folder, self._follow_links = str(folder), follow_links
        self._leaves: dict[str, bool] = {}

    def locate(self, source: str) -> str:
        """The path of the image `source`. Raises UserError for a path that leaves the folder.

        It is no `Path`: Python keeps the parts of each in one process-wide table, in Python 3.12 for ever, which takes
        88 bytes an image.
        """
        inside = posixpath.normpath(source)
        path = posixpath.join(self._folder, inside)
        foreign = ("\\" in source or source.startswith("~")) and not posixpath.isfile(path)  # both may be in a name
        climbs = ".." in source.split("/")
        if inside == "." or source.startswith("/") or climbs or "\0" in source or foreign:
            raise _not_relative(source)
        if self._follow_links:
            return path
        try:
            leaves = self._leads_out(posixpath.dirname(path))
            leaves = leaves or (stat.S_ISLNK(os.lstat(path).st_mode) and self._leads_out(path))
        except (FileNotFoundError, NotADirectoryError):  # whoever opens it says so
            return path
        except (OSError, RuntimeError) as error:  # a name that is too long, or circular links
            why = getattr(error, "strerror", None) or error
            raise UserError(f"path {source!r}: cannot be opened ({why}); correct the path") from None
        if leaves:
            raise UserError(
                f"path {source!r}: must stay inside prepare.options.root; got a link that leads out of it; "
                "set root to the link's target, or prepare.options.follow_links to true"
            )
        return path

    def read(self, source: str) -> bytes:
        """The bytes of an image. Raises OSError if there is no regular file to read, UserError for an unsafe path."""
        return read_plain(self.locate(source))

    def _leads_out(self, path: str) -> bool:
        """True if `path` lies outside the folder after following links."""
        found = self._leaves.get(path)
        if found is None:
            found = not Path(path).resolve().is_relative_to(Path(self._folder).resolve())
            if len(self._leaves) < MOST_REMEMBERED:
                self._leaves[path] = found
        return found


def read_plain(path: str | Path) -> bytes:
    """The bytes of a file. Raises OSError if it is no regular file."""
    if posixpath.exists(path) and not posixpath.isfile(path):  # opening a pipe would block forever
        raise OSError("not a plain file")
    with open(path, "rb") as file:  # noqa: PTH123 - see `Root.locate`
        return file.read()


def image_reader(root: str, follow_links: bool) -> Callable[[str], bytes]:
    """A function that returns the bytes of a source under the folder or URL `root`: see `Root.read`, `UrlImages`."""
    if url_files.is_url(root):
        return url_files.UrlImages("prepare.options.root", root)
    return Root(root, follow_links).read


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the bytes of a source."""
    return image_reader(options.root, options.follow_links)


def read_list(path: Path | UrlFile, root: Place, follow_links: bool, *, whole: bool = True) -> tuple[Texts, list[str]]:
    """(sources, labels) of a list file, labels as text; with `whole` they must be whole numbers of 0 or more.

    Raises UserError that names the file and the line.
    """
    labels: list[str] = []
    place = Root(root, follow_links) if isinstance(root, Path) else root
    known: dict[str, str] = {}  # each label once, however many images have it

    def sources() -> Iterator[str]:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            source, label = [*line.rsplit(None, 1), ""][:2]
            if not label or (whole and not (label.isascii() and label.isdigit() and len(label) <= LABEL_DIGITS)):
                raise UserError(
                    f"{path}:{number}: must have the form 'relative/path label'"
                    f"{' with a label of 0 or more' if whole else ''}; got {line!r}{_hint(line, whole=whole)}"
                )
            try:
                _check(place, source.strip())
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            labels.append(known.setdefault(label, label))
            yield source.strip()

    found = Texts.of(sources())
    if not labels:
        raise UserError(f"{path}: must name at least one image; got an empty list file")
    return found, labels


def _lines(path: Path | UrlFile) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte order mark. Raises UserError if it cannot be read."""
    number = 0
    try:
        with path.open("rb") if isinstance(path, Path) else io.BytesIO(path.read_bytes()) as file:
            for number, line in enumerate(file, 1):
                yield from line.decode("utf-8-sig" if number == 1 else "utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: no such list file; set prepare.options.lists to the folder that holds it") from None
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: must be a readable UTF-8 text file; got another encoding in line {number}; save the list as UTF-8"
        ) from None
    except OSError as error:
        raise UserError(
            f"{path}: must be a readable UTF-8 text file; got: {error.strerror}; correct the path"
        ) from None


def _hint(line: str, *, whole: bool) -> str:
    """The datasets that may read such lines."""
    if "," in line or ";" in line:
        return "; for a table with columns set prepare.dataset=table"
    if len(line.split()) < 2:
        return "; add the label"
    return "; for labels in words set prepare.dataset=list_file" if whole else ""


def read_lists(options: Options, *, whole: bool = False) -> tuple[Texts, list[str], list[str], dict[str, str]]:
    """(sources, labels and splits, training images first; the sha256 of lists at URLs).

    Raises UserError like `read_list`.
    """
    root: Place = options.root if url_files.is_url(options.root) else Path(options.root)
    if isinstance(root, Path) and not root.is_dir():
        raise UserError(f"prepare.options.root: no folder {options.root}; set it to the folder of the images")
    parts: list[Texts] = []
    label: list[str] = []
    split: list[str] = []
    read: dict[str, str] = {}
    for name in ("train", "val", "test"):
        if (place := _place_of(options, name)) is not None:
            file = UrlFile(f"prepare.options.{name}", place) if url_files.is_url(place) else Path(place)
            paths, labels = read_list(file, root, options.follow_links, whole=whole)
            parts.append(paths)
            label += labels
            split += [name] * len(paths)
            if isinstance(file, UrlFile):
                read[str(file)] = file.digest
    source = Texts.joined(parts)
    if (twice := first_repeat(source)) is not None:
        before, again = (_place_of(options, split[place]) for place in twice)
        raise UserError(
            f"{again}: {source[twice[1]]!r}: must be listed once, in one split; got a second entry, after one in "
            f"{before}; remove one of them"
        )
    return source, label, split, read


def _place_of(options: Options, name: str) -> str | None:
    """The path or URL of the list file of a split, if there is one."""
    given: str | None = getattr(options, name)
    lists = options.lists or options.root
    if given is None or url_files.is_url(given) or Path(given).is_absolute():
        return given
    return url_files.inside(lists, given) if url_files.is_url(lists) else str(Path(lists) / given)


def by_folders(source: str) -> str:
    """The name of a class from its folders, without that of the split: `n01440764` of ImageNet, `Aves/2761`."""
    return "/".join(folders(source))


def load(options: Options, class_of: Callable[[str], str] = by_folders) -> Collection:
    """All images of the lists, in their order. `class_of` derives the class name from the path of a training image.

    Raises UserError for a list that cannot be read, a label that is no whole number or out of range, and an image that
    is named twice.
    """
    source, texts, split, read = read_lists(options, whole=True)
    number = {text: int(text) for text in set(texts)}
    label = [number[text] for text in texts]
    if min(label) > 0:
        raise UserError(
            f"{options.train}: labels must start at 0; got {min(label)} as the lowest; subtract {min(label)}, or set "
            "prepare.dataset=list_file, which takes any labels"
        )
    train = split.count("train")
    highest = max(range(train), key=label.__getitem__)
    if label[highest] >= train:
        raise UserError(
            f"{options.train}: {source[highest]!r}: label {label[highest]} is out of range: with "
            f"{counted(train, 'training image')} labels are 0 to {train - 1}, as every class needs an image"
        )
    classes = class_names(islice(source, train), label[:train], class_of)
    worst = max(range(len(label)), key=label.__getitem__)
    if label[worst] >= len(classes):
        raise UserError(
            f"{getattr(options, split[worst])}: {source[worst]!r}: label {label[worst]} is out of range: the training "
            f"list has {counted(len(classes), 'class', 'classes')}, labels 0 to {len(classes) - 1}"
        )
    return Collection(classes, source, label, split, read=read)


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: the folder of the images and the list files, except those at URLs, which DVC cannot watch."""
    places = {"root": options.root, **{part: _place_of(options, part) for part in ("train", "val", "test")}}
    return {option: place for option, place in places.items() if place is not None and not url_files.is_url(place)}


def class_names(sources: Iterable[str], labels: Sequence[int], class_of: Callable[[str], str]) -> list[str]:
    """The name of each class. These are the labels as text, unless the paths give each label one name of its own."""
    names_of: dict[int, set[str]] = {}
    for source, label in zip(sources, labels, strict=True):
        names_of.setdefault(label, set()).add(class_of(source))
    count = max(labels) + 1
    names = [min(names_of.get(j, {str(j)})) for j in range(count)]
    if len(set(names)) < count or any(len(one) > 1 for one in names_of.values()):
        return [str(j) for j in range(count)]
    return names


def folders(source: str) -> list[str]:
    """The folders in a path without the first, the split's: `train/n01440764/x.JPEG` -> [`n01440764`]."""
    return posixpath.normpath(source).split("/")[1:-1]


def stem_and_ending(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending in lower case, with its dot; "" if there is none."""
    stem, ending = posixpath.splitext(name)
    return (name, "") if ending == "." else (stem, ending.lower())


def kinds_left_out(folder: Path, endings: Counter[str]) -> list[str]:
    """A note on the files in `folder` that are no images, by their endings, as a list; empty if there are none."""
    if not endings:
        return []
    return [f"note: {folder}: {counted(endings.total(), 'file')} of other kinds left out: {kinds(endings)}"]


def kinds(endings: Counter[str]) -> str:
    """The five most frequent endings and how many files have them."""
    most = sorted(endings.items(), key=lambda item: (-item[1], item[0]))[:5]
    return ", ".join(f"{kind} {count:,}" for kind, count in most)


def of_the_system(name: str) -> bool:
    """True for what an operating system or a file server put beside images: previews, waste, settings."""
    return name.startswith(".") or name.lower() in OF_THE_SYSTEM


def visible(
    root: Path, follow_links: bool, left_out: Counter[str] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields each visible folder from `root` on, and the names of the visible folders and files in it.

    Folders of the operating system are no visible ones; `left_out` counts those that are not hidden by a dot.
    """
    seen: set[str] = set()  # real paths of visited folders, so that circular links end
    for folder, inside, files in os.walk(root, followlinks=follow_links):
        real = os.path.realpath(folder)
        if left_out is not None and real not in seen:
            left_out.update(d for d in inside if d.lower() in OF_THE_SYSTEM)
        inside[:] = [] if real in seen else sorted(d for d in inside if not of_the_system(d))
        if real not in seen:
            seen.add(real)
            yield Path(folder), inside, [f for f in files if not f.startswith(".")]


def walk(root: Path, part: str, follow_links: bool, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Yields all files under `root/part` as paths relative to `root`, without hidden ones (see `visible`), in no order.

    Raises UserError for a link to a folder, unless `follow_links` is set, and at the end for names that are not UTF-8.
    """
    foreign: list[str] = []
    for folder, inside, files in visible(root / part, follow_links, left_out):
        where = folder.relative_to(root).as_posix()
        links = [d for d in inside if not follow_links and posixpath.islink(posixpath.join(folder, d))]
        if links:
            raise UserError(
                f"{Path(folder, links[0])}: must not be a link to a folder; set prepare.options.follow_links to true "
                "to follow it"
            )
        for path in (f if where == "." else f"{where}/{f}" for f in files):
            if any("\udc80" <= sign <= "\udcff" for sign in path):  # neither DVC nor a Parquet file can hold it
                foreign.append(path)
            else:
                yield path
    if foreign:
        first = os.fsencode(foreign[0]).decode(errors="backslashreplace")
        others = f" and {counted(len(foreign) - 1, 'other')}" if len(foreign) > 1 else ""
        raise UserError(f"{root}: file names must be UTF-8; got {first}{others}; rename them, for example with convmv")

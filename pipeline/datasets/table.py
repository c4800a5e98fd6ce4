"""Images named in a table, or stored in it: CSV, TSV, JSON Lines or Parquet, with labels of text or whole numbers.

`prepare.options: {table: photos/labels.csv, path: file_name, label: species}`. An image's source is its path relative
to `root`, or the Parquet file's name and the row number. This also reads Hugging Face folders by their `metadata.csv`.
Tables and images may lie at URLs.
"""

import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data import labels, list_files, parquet_files, tables, url_files
from h2t.pipeline.data.images import Collection
from h2t.pipeline.data.texts import Texts, first_repeat
from h2t.pipeline.data.transforms import OwnImages
from h2t.pipeline.data.transforms import transform as transform
from h2t.pipeline.data.url_files import Place

NUMBER = 2026112801  # other results, another number: docs/numbers.md

STRAY = "a stray quotation mark joins lines: correct the table"


class Options(OwnImages):
    table: str | dict[Literal["train", "val", "test"], str]
    """The table, or tables of train, val and test, at paths or URLs. A pattern such as `part-*.parquet` names several
    files."""
    root: str | None = None
    """Folder that the paths in the table start from, or its URL; null is the folder of each table."""
    path: str | None = None
    """Column of image paths; exactly one of `path` and `bytes` is set."""
    bytes: str | None = None
    """Column of encoded images in Parquet files: bytes, or structs with a field `bytes`."""
    label: str = "label"
    """Column of class names, or of whole numbers."""
    split: str | None = None
    """Column that says train, val or test; null: all images are for training, or as `table` says."""
    group: str | None = None
    """Column of what must not be divided among splits, such as the patient, the camera or the plant."""
    follow_links: bool = False
    """Allow links that lead out of `root`."""

    @pydantic.model_validator(mode="after")
    def _one_source(self) -> "Options":
        if (self.path is None) == (self.bytes is None):
            raise ValueError("set exactly one of path, the column of image paths, and bytes, the column of images")
        return self


def _tables(options: Options) -> list[tuple[str, Place]]:
    """(split, or "" where the table does not say, path or URL) of each table."""
    given = options.table if isinstance(options.table, dict) else {"": options.table}
    keys = {split: f"prepare.options.table{split and '.'}{split}" for split in given}
    found = [(split, path) for split, text in given.items() for path in parquet_files.places(keys[split], text)]
    for split, path in found:
        ending = Path(url_files.name_of(path) if isinstance(path, str) else path).suffix.lower()
        if ending not in tables.ENDINGS:
            raise UserError(
                f"{keys[split]}: {path}: must end in one of {', '.join(tables.ENDINGS)}; "
                "save the table in one of these formats"
            )
        if options.bytes and ending != ".parquet":
            raise UserError(f"prepare.options.bytes: only Parquet files hold images; got {path}; set path in its place")
    return found


def folder(options: Options) -> Place:
    """The folder that the paths of images are relative to. Raises UserError for a path that does not exist."""
    if options.root is not None:
        if url_files.is_url(options.root):
            return options.root
        root = Path(options.root).expanduser()
    else:
        found = [path for _, path in _tables(options)]
        urls = [path for path in found if isinstance(path, str)]
        if urls:
            common = url_files.common_folder(urls) if len(urls) == len(found) else None
            if common is None:
                raise UserError(
                    "prepare.options.table: tables must lie on one server, with equal queries in their URLs; got "
                    "several; set prepare.options.root to the folder that all paths start from"
                )
            return common
        folders = [os.path.abspath(path.parent) for path in found if isinstance(path, Path)]  # noqa: PTH100 - keeps links
        root = Path(os.path.commonpath(folders))
    if not root.is_dir():
        raise UserError(f"prepare.options.root: no folder {root}; set it to the folder that the paths start from")
    return root


def load(options: Options) -> Collection:
    """All rows of all tables, in order. Raises UserError that names the table, the row and the value."""
    found = _tables(options)
    wanted = [name for name in (options.path, options.label, options.split, options.group) if name is not None]
    root = None if options.path is None else folder(options)
    sources: list[Texts] = []
    known: dict[str, str] = {}  # each label once, however many images have it
    texts: list[str] = []
    split: list[str] = []
    groups: list[Texts] = []
    notes: list[str] = []
    read: dict[str, str] = {}
    places = [place for _, place in found]
    parquet_files.named_once(places)
    names = [""] * len(found) if options.bytes is None else parquet_files.short_names(places)
    for (part, place), short in zip(found, names, strict=True):
        path: tables.Table
        if isinstance(place, str):
            path = url_files.UrlFile("prepare.options.table", place, whole=options.path is not None)
        else:
            path = place
        columns = tables.columns(path, wanted, options.label)
        text = [known.setdefault(name, name) for name in tables.texts(path, options.label, columns[options.label])]
        _check_lines(path, "label", text)
        notes += tables.joined_lines(path, len(text))
        if root is not None and options.path is not None:
            given = tables.texts(path, options.path, columns[options.path])
            own = Texts.of(_sources(given, place, root, path, options))
            _check_that_some_exist(path, root, own)
            if isinstance(path, url_files.UrlFile):
                read[str(path)] = path.digest
        else:
            own = Texts.of(f"{short}:{row:09d}" for row in range(len(text)))
        sources.append(own)
        texts += text
        split += list(_splits(part, path, options, columns)) if options.split else [part or "train"] * len(text)
        if options.group:
            named = [None if value is None else str(value).strip() for value in columns[options.group]]
            _check_lines(path, "group", named)
            # An image without a name is a group of its own.
            groups.append(Texts.of(one or source for one, source in zip(named, own, strict=True)))
    if not texts:
        raise UserError(f"{found[0][1]}: must hold at least one row; got none; name another table")
    source = Texts.joined(sources)
    if (twice := first_repeat(source)) is not None:
        starts = np.cumsum([0, *map(len, sources)])
        tables_of = np.searchsorted(starts, twice, side="right") - 1
        before, again = (
            f"{found[table][1]}: row {place - starts[table] + 1}" for table, place in zip(tables_of, twice, strict=True)
        )
        raise UserError(
            f"{again}: {source[twice[1]]!r} ({texts[twice[1]]}): must be named once; got it before at {before} "
            f"({texts[twice[0]]}); remove one of the rows"
        )
    classes, label = labels.numbered(texts)
    grouped = Texts.joined(groups) if options.group else None
    return Collection(classes, source, label, split, grouped, notes, read=read)


def _check_lines(path: tables.Table, what: str, values: Sequence[str | None]) -> None:
    """Raises UserError for a label or group of several lines: a stray quotation mark makes one value of them."""
    if path.suffix.lower() not in tables.DELIMITED:
        return
    for row, value in enumerate(values, 1):
        if value and ("\n" in value or "\r" in value):
            raise UserError(f"{path}: row {row}: a {what} must be one line; got {value!r:.60}; {STRAY}")


def _splits(part: str, path: tables.Table, options: Options, columns: Mapping[str, Sequence[object]]) -> Iterator[str]:
    """The split of each row."""
    for row, value in enumerate(columns[str(options.split)], 1):
        split = labels.split_of(str(value))
        if split is None or part not in ("", split):
            known = ", ".join(name for names in labels.USUAL.values() for name in names)
            raise UserError(
                f"{path}: row {row}, column {options.split!r}: must be {part or f'one of {known}'}; got {value!r:.60}; "
                "correct it, or leave prepare.options.split out"
            )
        yield split


def _sources(given: Iterable[str], table: Place, root: Place, named: tables.Table, options: Options) -> Iterator[str]:
    """Yields the paths `given` in `table`, relative to `root`. Raises UserError that begins with `named`, the table."""
    if isinstance(root, Path):
        base = root if options.root is not None else Path(table).parent
        images = list_files.Root(root, options.follow_links)
        for row, text in enumerate(given, 1):
            yield _source(text, base, root, images, f"{named}: row {row}")
        return
    start = root if options.root is not None else url_files.folder(str(table))
    for row, text in enumerate(given, 1):
        source = url_files.relative(text, root, start)
        if source is None:
            raise UserError(
                f"{named}: row {row}: {text!r}: must be a path below {root}, or a URL below it "
                "without a query; correct it, or set prepare.options.root"
            )
        yield source


def _source(text: str, base: Path, root: Path, images: list_files.Root, where: str) -> str:
    """The path `text`, relative to `base`, absolute or in the home folder (~), as a path relative to `root`.

    Back-slashes separate folders, as in tables from Windows, unless a file has that name.
    """
    if "\\" in text and not posixpath.isfile(base / text):
        text = text.replace("\\", "/")
    if "\n" in text and not posixpath.isfile(base / text):
        raise UserError(f"{where}: must be the path of an image; got {text!r:.60}; {STRAY}")
    path = posixpath.normpath(posixpath.join(base, posixpath.expanduser(text)))
    source = posixpath.relpath(path, root)
    if source == ".." or source.startswith("../"):
        raise UserError(
            f"{where}: {text!r}: must lie in {root}; set prepare.options.root to a folder that holds all images"
        )
    try:
        images.locate(source)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return source


def _check_that_some_exist(table: tables.Table, root: Place, sources: Texts) -> None:
    """Raises UserError if none of the first images exists: then the paths start from another folder."""
    if isinstance(root, Path):
        exists = [(root / source).exists for source in sources[:100]]
    else:
        images = url_files.UrlImages("prepare.options.root", root)
        exists = [partial(images.exists, source) for source in sources[:100]]
    if sources and not any(one() for one in exists):
        place = root if isinstance(root, Path) else root.partition("?")[0].rstrip("/")  # a query may hold a signature
        raise UserError(
            f"{table}: row 1: no file {place}/{sources[0]}; set prepare.options.root to the folder that the paths in "
            "the table start from"
        )


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: the tables and the folder of the images, except those at URLs, which DVC cannot watch."""
    given = options.table if isinstance(options.table, dict) else {"": options.table}
    named = {f"table{split and '.'}{split}": path for split, path in given.items()}
    if options.root is not None:
        named["root"] = options.root
    return {option: path for option, path in named.items() if not url_files.is_url(path)}


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the bytes of a source."""
    if options.bytes is None:
        return list_files.image_reader(str(folder(options)), options.follow_links)
    paths = [path for _, path in _tables(options)]
    files = {
        name: parquet_files.opened("prepare.options.table", path)
        for name, path in zip(parquet_files.short_names(paths), paths, strict=True)
    }
    for name, file in files.items():
        if options.bytes not in file.schema_arrow.names:
            raise UserError(
                f"{name}: no column {options.bytes!r} (there are: {', '.join(file.schema_arrow.names)}); "
                "set prepare.options.bytes"
            )
    return parquet_files.row_reader(files, options.bytes, "prepare.options.bytes")

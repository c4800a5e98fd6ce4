"""Finds out how a file or folder of images names its classes: which dataset reads it, with which options.

Looked for, in this order: a table file; Hugging Face's metadata.csv, .jsonl or .parquet; Parquet files with images; a
CSV, TSV or JSON Lines table beside images; a folder per class, under folders of splits or without.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import INPUTS, build
from h2t.pipeline.data import list_files, parquet_files, tables
from h2t.pipeline.data.images import Collection
from h2t.pipeline.data.labels import USUAL, split_of

#: Usual names of columns, most usual first.
LABELS = (
    "label",
    "labels",
    "class",
    "class_name",
    "species",
    "category",
    "target",
    "diagnosis",
    "finding",
    "defect",
    "kind",
    "y",
)
SPLITS = ("split", "subset", "partition", "set")
GROUPS = (
    *("group", "patient", "patient_id", "subject", "subject_id", "camera", "camera_id", "site", "site_id"),
    *("location", "location_id", "plant", "plant_id", "individual", "specimen", "sequence", "seq_id"),
)
LOOK = 100  # so many rows of a table must name at least one file that exists


@dataclass(frozen=True)
class Found:
    """How images are read: the dataset, its options, and the collection that they give.

    Paths in `options` are absolute; `inputs` holds the files and folders that they lie in, by the names that
    params.yaml gives them.
    """

    dataset: str
    options: dict[str, Any]
    inputs: dict[str, Path]
    collection: Collection

    def written(self) -> dict[str, Any]:
        """The options as they stand in params.yaml: `inputs/NAME/...` in place of absolute paths."""
        return {key: self._referring(value) for key, value in self.options.items()}

    def _referring(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._referring(part) for key, part in value.items()}
        if isinstance(value, str) and value.startswith("/"):
            for name, place in self.inputs.items():
                if value == str(place) or value.startswith(f"{place}/"):
                    inside = value.removeprefix(str(place)).lstrip("/")
                    return f"{INPUTS}{name}" + (f"/{inside}" if inside else "")
        return value


def detect(data: Path, label: str | None = None) -> Found:
    """How the images at `data`, a folder or a table, are read. `label` names the column of labels.

    Raises UserError if there are no images, or no labels are found.
    """
    data = Path(os.path.abspath(data.expanduser()))  # noqa: PTH100 - keeps links
    if not data.exists():
        raise UserError(f"--data {data}: no such file or folder; correct the path")
    if data.is_file():
        if data.suffix.lower() not in tables.ENDINGS:
            raise UserError(
                f"--data {data}: must be a folder of images or a table that ends in {', '.join(tables.ENDINGS)}"
            )
        return _table({"": data}, data.parent, label)
    return _by_metadata(data, label) or _by_parquet(data, label) or _by_table(data, label) or _by_folders(data, label)


def _label_column(table: Path, known: Sequence[str], label: str | None) -> str:
    chosen = label or tables.usual_column(known, LABELS)
    if chosen is None or chosen not in known:
        raise UserError(
            f"{table}: which column holds the labels? There are: {', '.join(known)}; add --label COLUMN to the command"
            + (f" (no column {label!r})" if label else "")
        )
    return chosen


def _table(by_split: Mapping[str, Path], folder: Path, label: str | None, named: str | None = None) -> Found:
    """Images named in tables, or stored in Parquet files; `by_split` holds one table, or one for each split."""
    by_split = {split: by_split[split] for split in ("", *USUAL) if split in by_split}
    first = next(iter(by_split.values()))
    sample = parquet_files.found("--data", str(first))[0]
    known = tables.column_names(sample)
    options: dict[str, Any] = {
        "table": str(first) if "" in by_split else {split: str(path) for split, path in by_split.items()}
    }
    inputs = {"images": folder}
    stored = tables.bytes_column(sample)
    if stored is not None:
        options["bytes"] = stored
        inputs = {"images": folder if len(by_split) > 1 or first != sample or folder != first.parent else first}
    else:
        path = named if named in known else tables.usual_column(known, tables.PATHS)
        if path is None:
            raise UserError(
                f"{sample}: no column of image paths found; there are: {', '.join(known)}; rename it to file_name, or "
                "write params.yaml by hand (docs/own-data.md)"
            )
        root = _root(sample, path)
        options["path"] = path
        if root != sample.parent:
            options["root"] = str(root)
            inputs = {"images": root}
            if not sample.is_relative_to(root):
                inputs["table"] = first if "" in by_split else folder
    options["label"] = _label_column(sample, known, label)
    unused = None
    if "" in by_split and (split := tables.usual_column(known, SPLITS)):
        unused = _no_split(parquet_files.found("--data", str(first)), split)
        if unused is None:
            options["split"] = split
    if group := tables.usual_column([name for name in known if name not in options.values()], GROUPS):
        options["group"] = group
    found = _loaded("table", options, inputs)
    if unused is not None:
        found.collection.notes.append(f"column {split!r} is not used: it names no training images; got {unused!r}")
    return found


def _loaded(dataset: str, options: dict[str, Any], inputs: dict[str, Path]) -> Found:
    module = plugins.load("datasets", dataset)
    collection = module.load(build(module.Options, "prepare.options", options))
    return Found(dataset, options, inputs, collection)


def _root(table: Path, column: str) -> Path:
    """The folder that the paths in `column` start from: that of the table, one inside it, or what absolute ones share.

    Raises UserError if none of the first paths exists.
    """
    first = tables.columns(table, [column])[column][:LOOK]
    if other := next((value for value in first if not isinstance(value, str | int)), None):
        raise UserError(
            f"{table}: column {column!r}: must hold paths or encoded images; got {type(other).__name__}; "
            "correct the file"
        )
    given = [str(text).replace("\\", "/") for text in first]
    if not given:
        raise UserError(f"{table}: has no rows; add a row for each image")
    absolute = [str(Path(text).expanduser()) for text in given if text.startswith(("/", "~"))]
    if absolute:
        everything = [str(Path(str(text)).expanduser()) for text in tables.columns(table, [column])[column]]
        if beside := next((path for path in everything if not Path(path).is_absolute()), None):
            raise UserError(
                f"{table}: column {column!r}: paths must all be absolute, or all relative; got {absolute[0]} and "
                f"{beside}; correct the paths"
            )
        shared = Path(os.path.commonpath([os.path.dirname(path) for path in everything]))  # noqa: PTH120
        if shared == Path(shared.anchor):
            other = next((p for p in everything if Path(p).parts[:2] != Path(absolute[0]).parts[:2]), everything[-1])
            raise UserError(
                f"{table}: column {column!r}: images must lie in one folder, which DVC watches; got {absolute[0]} and "
                f"{other}; correct the paths, or move the images"
            )
        return shared
    if outside := next((text for text in given if os.path.normpath(text).split("/")[0] == ".."), None):
        raise UserError(
            f"{table}: column {column!r}: relative paths must stay in the folder of the table; got {outside}; write "
            "absolute paths, or move the table above the images"
        )
    inside = [path for path in _visible(table.parent) if path.is_dir()]
    for folder in (table.parent, *inside):
        if any(os.path.isfile(folder / text) for text in given):  # noqa: PTH113 - False for a name that is too long
            return folder
    raise UserError(
        f"{table}: column {column!r}: no file {table.parent / given[0]}, nor in a folder beside "
        "the table; correct the paths, or write params.yaml by hand (docs/own-data.md)"
    )


def _no_split(files: Sequence[Path], column: str) -> str | None:
    """A value in `column` that is no split, if there are no training images either; None if all values are splits.

    `files` are one table. Raises UserError if it has no rows, and if some images are for training and others in no
    known split: those would be trained on.
    """
    table = files[0]
    values = sorted({str(value) for file in files for value in tables.columns(file, [column])[column]})
    if not values:
        raise UserError(f"{table}: has no rows; add a row for each image")
    other = next((value for value in values if not split_of(value)), None)
    if not any(split_of(value) == "train" for value in values):
        return values[0] if other is None else other
    if other is not None:
        raise UserError(
            f"{table}: column {column!r}: must be train, val or test for each image; got {other!r}; correct the value "
            "or remove these rows, or rename the column if it is about something else"
        )
    return None


def _folders_of_splits(data: Path) -> dict[str, Path]:
    """Split -> the sub-folder of `data` that is named like it."""
    found: dict[str, Path] = {}
    for path in sorted(data.iterdir()):
        split = split_of(path.name) if path.is_dir() else None
        if split is not None:
            found.setdefault(split, path)
    return found


def _by_metadata(data: Path, label: str | None) -> Found | None:
    """A Hugging Face folder: metadata.csv, .jsonl or .parquet in the folder or in each split's."""

    def metadata(folder: Path) -> Path | None:
        paths = [folder / f"metadata{ending}" for ending in tables.ENDINGS]
        return next((path for path in paths if path.is_file()), None)

    if own := metadata(data):
        return _table({"": own}, data, label, "file_name")
    by_split = {split: path for split, folder in _folders_of_splits(data).items() if (path := metadata(folder))}
    return _table(by_split, data, label, "file_name") if "train" in by_split else None


def _by_parquet(data: Path, label: str | None) -> Found | None:
    """Parquet files with images, of splits that their names or folders tell: data/train-00000-of-00002.parquet."""
    paths = sorted(path for depth in ("*", "*/*", "*/*/*") for path in data.glob(f"{depth}.parquet"))
    paths = [path for path in paths if not any(map(list_files.of_the_system, path.relative_to(data).parts))]
    paths = [path for path in paths if tables.bytes_column(path)]
    if not paths:
        return None
    patterns: dict[str, set[str]] = {}
    for path in paths:
        prefix = path.stem.partition("-")[0]
        by_name, by_folder = split_of(prefix), split_of(path.parent.name)
        pattern = f"{prefix}*" if by_name and prefix != path.stem else path.stem if by_name else "*"
        patterns.setdefault(by_name or by_folder or "", set()).add(f"{path.parent}/{pattern}.parquet")
    several = next((found for found in patterns.values() if len(found) > 1), None)
    if several or ("" in patterns and len(patterns) > 1):
        raise UserError(
            f"--data {data}: Parquet files whose splits their names do not tell, such as {paths[0].name}; name them "
            "train-*.parquet and test-*.parquet, or write params.yaml by hand (docs/own-data.md)"
        )
    return _table({split: Path(next(iter(found))) for split, found in patterns.items()}, data, label)


def _by_table(data: Path, label: str | None) -> Found | None:
    """A table in the folder that names images, or one for each split: labels.csv, or train.csv and test.csv."""
    paths = sorted(path for path in _visible(data) if path.suffix.lower() in tables.ENDINGS and path.is_file())
    known = {path: tables.column_names(path) for path in paths}
    usable = [
        p
        for p in paths
        if tables.usual_column(known[p], tables.PATHS) and (label in known[p] or tables.usual_column(known[p], LABELS))
    ]
    by_split = {split: path for path in usable if (split := split_of(path.stem))}
    if "train" in by_split:
        return _table(by_split, data, label)
    if len(usable) > 1:
        raise UserError(f"--data {data}: several tables ({', '.join(p.name for p in usable)}); name one of them")
    if usable:
        return _table({"": usable[0]}, data, label)
    named = [path for path in paths if tables.usual_column(known[path], tables.PATHS)]
    if named and label is not None:
        _label_column(named[0], known[named[0]], label)
    if paths and not _has_class_folders(data):
        path = paths[0]
        if tables.usual_column(known[path], tables.PATHS) is None:
            raise UserError(
                f"{path}: no column of image paths found; there are: {', '.join(known[path])}; rename it to file_name"
            )
        _label_column(path, known[path], label)
    return None


def _has_class_folders(data: Path) -> bool:
    return any(path.is_dir() for path in _visible(data))


def _visible(folder: Path) -> list[Path]:
    """What lies in `folder`, without what an operating system put there: `__MACOSX`, `._labels.csv`, `Thumbs.db`."""
    return sorted(path for path in folder.iterdir() if not list_files.of_the_system(path.name))


def _by_folders(data: Path, label: str | None) -> Found:
    """A folder for each class, below folders of splits or without them. Raises UserError if a `label` is named."""
    by_split = _folders_of_splits(data)
    inside = _visible(data)
    wrapped = len(inside) == 1 and inside[0].is_dir() and _has_class_folders(inside[0])  # as archives unpack
    if wrapped and "train" not in by_split:
        return detect(inside[0], label)
    if label is not None:
        raise UserError(
            f"--label {label}: no table of images was found in {data}; leave --label out, or name the table"
        )
    if "train" in by_split:
        options = {"root": str(data), **{s: by_split[s].name for s in USUAL if s in by_split}}
        return _loaded("image_folder", options, {"images": data})
    if not _has_class_folders(data):
        raise UserError(
            f"--data {data}: no labels found: neither a folder for each class nor a table; sort the images into "
            "folders, or add a table with the columns file_name and label"
        )
    return _loaded("image_folder", {"root": str(data), "train": "."}, {"images": data})

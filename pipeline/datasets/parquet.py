"""Parquet files in the Hugging Face layout: `image: struct<bytes, path>`, `label: int64`, class names in the metadata.

Layout: https://huggingface.co/docs/datasets/image_dataset. An image's source is the file name and the row number, so it
does not change when the files are moved.
"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.data import labels, parquet_files, tables, url_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.texts import Texts
from h2t.pipeline.data.transforms import CIFAR, OwnImages
from h2t.pipeline.data.transforms import transform as transform

NUMBER = 2026112602  # other results, another number: docs/numbers.md


class Options(OwnImages):
    train: list[str]
    """Parquet files of the training images, at paths or URLs; a pattern such as `train-*.parquet` names several."""
    val: list[str] = []
    """Parquet files of the validation images."""
    test: list[str] = []
    """Parquet files of the test images."""
    image_column: str = "image"
    """Column of the images: bytes, or a struct with a field `bytes`."""
    label_column: str = "label"
    """Column of the labels: whole numbers, or text."""
    transform: Transform = CIFAR


def _files(options: Options) -> dict[str, tuple[str, pq.ParquetFile]]:
    """Name of a file in sources -> (split, open file)."""
    found = [
        (f"prepare.options.{split}", split, path)
        for split in ("train", "val", "test")
        for text in getattr(options, split)
        for path in parquet_files.places(f"prepare.options.{split}", text)
    ]
    names = parquet_files.short_names([path for _, _, path in found])
    files = {
        name: (split, parquet_files.opened(key, path)) for name, (key, split, path) in zip(names, found, strict=True)
    }
    for name, (_, file) in files.items():
        for column in (options.image_column, options.label_column):
            if column not in (there := file.schema_arrow.names):
                raise UserError(
                    f"{name}: no column {column!r} (there are: {', '.join(there)}); "
                    "set prepare.options.image_column and label_column"
                )
    return files


def _whole_number_names(names: list[str] | None, label: list[int]) -> list[str]:
    """The class names of whole-number labels: `names` from the metadata, else the numbers as text.

    Raises UserError if there are no names and the labels leave classes without an image for certain.
    """
    if names is not None:
        return names
    if max(label) >= len(label):
        raise UserError(
            f"prepare.options.label_column: label {max(label)} is out of range: with {counted(len(label), 'image')} "
            f"labels are 0 to {len(label) - 1}, as every class needs an image; number the classes from 0"
        )
    return [str(i) for i in range(max(label) + 1)]


def load(options: Options) -> Collection:
    """All rows of all files, in order. Raises UserError for an unreadable file and for labels that are not valid."""
    sources: list[Texts] = []
    values: list[object] = []
    split: list[str] = []
    files = _files(options)
    for name, (part, file) in files.items():
        try:
            column = tables.Values(file.read([options.label_column])[options.label_column])
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(
                f"{name}: column {options.label_column!r} cannot be read ({error}); replace the file"
            ) from None
        for row, value in enumerate(column):
            if type(value) is int and value < 0:
                raise UserError(
                    f"{name}: row {row}: a label must be a whole number of 0 or more; got {value}; correct the file"
                )
            labels.check_text(value, f"{name}: row {row}")
        sources.append(Texts.of(f"{name}:{row:09d}" for row in range(len(column))))
        known: dict[object, object] = {}  # each label once, however many images have it
        values += (known.setdefault(value, value) for value in column)
        split += [part] * len(column)
    if not values:
        raise UserError("prepare.options.train: must name files with rows; got none; name others")
    source = Texts.joined(sources)
    if not all(type(value) is int for value in values):
        classes, label = labels.numbered([str(value).strip() for value in values])
        return Collection(classes, source, label, split)
    label = [value for value in values if isinstance(value, int)]
    first_name, (_, first) = next(iter(files.items()))
    classes = _whole_number_names(parquet_files.class_names(first.schema_arrow, options.label_column), label)
    if max(label) >= len(classes):
        raise UserError(
            f"label {max(label)} has no name: the metadata of {first_name} names "
            f"{counted(len(classes), 'class', 'classes')}; correct the metadata or the labels"
        )
    return Collection(classes, source, label, split)


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: each file, except those at URLs, which DVC cannot watch."""
    files = {f"{part}[{i}]": path for part in ("train", "val", "test") for i, path in enumerate(getattr(options, part))}
    return {key: path for key, path in files.items() if not url_files.is_url(path)}


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the image bytes of a source. It keeps the most recently used row groups in memory."""
    files = {name: file for name, (_, file) in _files(options).items()}
    return parquet_files.row_reader(files, options.image_column, "prepare.options.image_column")

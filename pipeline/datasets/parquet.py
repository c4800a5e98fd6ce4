"""Parquet files in the Hugging Face layout: `image: struct<bytes, path>`, `label: int64`, class names in the metadata.

Layout: https://huggingface.co/docs/datasets/image_dataset. An image's source is the file name and the row number, so it
does not change when the files are moved.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.transforms import CIFAR

NUMBER = 2026112601  # other results, another number: docs/numbers.md

KEEP_BYTES = 512 * 1024**2  # memory for the encoded images of the most recently used row groups


class Options(Section):
    """Keys of `prepare.options`."""

    train: list[str]
    """Parquet files of the training images."""
    val: list[str] = []
    """Parquet files of the validation images."""
    test: list[str] = []
    """Parquet files of the test images."""
    image_column: str = "image"
    """Column of the images: bytes, or a struct with a field `bytes`."""
    label_column: str = "label"
    """Column of the labels."""
    transform: Transform = CIFAR
    """Size, augmentation and normalisation."""


def transform(options: Options) -> Transform:
    """The transform in the options; by default that of CIFAR."""
    return options.transform


def _files(options: Options) -> dict[str, tuple[str, pq.ParquetFile]]:
    """File name -> (split, open file)."""
    files: dict[str, tuple[str, pq.ParquetFile]] = {}
    for split in ("train", "val", "test"):
        for text in getattr(options, split):
            path = Path(text)
            if path.name in files:
                raise UserError(f"prepare.options.{split}: file names must differ; got {path.name!r} twice; rename one")
            try:
                file = pq.ParquetFile(path)
                names = file.schema_arrow.names
                if file.metadata.num_rows > path.stat().st_size:  # a few bytes can claim billions of rows
                    raise ValueError(f"{file.metadata.num_rows} rows in {path.stat().st_size} bytes hold no images")
            except (OSError, pa.ArrowException, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"prepare.options.{split}: {text}: must be a readable Parquet file ({reason}); "
                    "replace the file or correct the path"
                ) from None
            files[path.name] = (split, file)
            for column in (options.image_column, options.label_column):
                if column not in names:
                    raise UserError(
                        f"{text}: no column {column!r} (there are: {', '.join(names)}); "
                        "set prepare.options.image_column and label_column"
                    )
    return files


def _class_names(file: pq.ParquetFile, column: str, labels: list[int]) -> list[str]:
    """The class names in the metadata (`huggingface` JSON, or `classes` separated by commas), else the labels as text.

    Raises UserError if there are no names and the labels leave classes without an image for certain.
    """
    metadata = file.schema_arrow.metadata or {}
    with suppress(KeyError, ValueError, TypeError):
        return [str(n) for n in json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]]
    if b"classes" in metadata:
        return metadata[b"classes"].decode(errors="replace").split(",")
    if max(labels) >= len(labels):
        raise UserError(
            f"label {max(labels)} is out of range: with {counted(len(labels), 'image')} labels are 0 to "
            f"{len(labels) - 1}, as every class needs an image; number the classes from 0"
        )
    return [str(i) for i in range(max(labels) + 1)]


def load(options: Options) -> Collection:
    """All rows of all files, in order. Raises UserError for an unreadable file and for labels that are not valid."""
    source: list[str] = []
    label: list[int] = []
    split: list[str] = []
    files = _files(options)
    for name, (part, file) in files.items():
        try:
            labels = file.read([options.label_column])[options.label_column].to_pylist()
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(
                f"{name}: column {options.label_column!r} cannot be read ({error}); replace the file"
            ) from None
        bad = next((i for i, y in enumerate(labels) if not isinstance(y, int) or y < 0), None)
        if bad is not None:
            raise UserError(
                f"{name}: row {bad}: a label must be a whole number of 0 or more; got {labels[bad]!r}; correct the file"
            )
        source += [f"{name}:{row:09d}" for row in range(len(labels))]
        label += labels
        split += [part] * len(labels)
    if not label:
        raise UserError("prepare.options.train: must name files with rows; got none; name others")
    first_name, (_, first) = next(iter(files.items()))
    classes = _class_names(first, options.label_column, label)
    if max(label) >= len(classes):
        raise UserError(
            f"label {max(label)} has no name: the metadata of {first_name} names "
            f"{counted(len(classes), 'class', 'classes')}; correct the metadata or the labels"
        )
    return Collection(classes, source, label, split)


def inputs(options: Options) -> dict[str, str]:
    """Option -> path: each file."""
    return {f"{part}[{i}]": path for part in ("train", "val", "test") for i, path in enumerate(getattr(options, part))}


def reader(options: Options) -> Callable[[str], bytes]:
    """A function that returns the image bytes of a source. It keeps the most recently used row groups in memory."""
    files = {name: file for name, (_, file) in _files(options).items()}
    starts = {
        name: np.cumsum([0] + [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)])
        for name, file in files.items()
    }
    groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
    lock = Lock()

    def read(source: str) -> bytes:
        name, _, row = source.rpartition(":")
        if name not in starts or not row.isdecimal() or int(row) >= starts[name][-1]:
            raise UserError(f"{source}: no such row in the files of prepare.options; prepare again")
        number = int(row)
        group = int(np.searchsorted(starts[name], number, side="right")) - 1
        key = (name, group)
        with lock:
            column = groups.get(key)
            if column is None:
                try:
                    table = files[name].read_row_group(group, [options.image_column])
                except pa.ArrowException as error:
                    raise OSError(str(error)) from None
                column = groups[key] = table[options.image_column].combine_chunks()
            groups.move_to_end(key)
            while len(groups) > 1 and sum(c.nbytes for c in groups.values()) > KEEP_BYTES:
                groups.popitem(last=False)
        image = column[number - int(starts[name][group])].as_py()
        data = image["bytes"] if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise UserError(
                f"{source}: column {options.image_column!r} must hold encoded images as bytes; got "
                f"{type(data).__name__}; set prepare.options.image_column"
            )
        return data

    return read

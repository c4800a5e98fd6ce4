"""Encoded images in Parquet files. An image's source is the file's name and the row: `train-0.parquet:000000042`.

So a source does not change when the files are moved. Files of equal names are told apart by their folders.
"""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from glob import glob
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.cache.errors import CacheError
from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data import url_files
from h2t.pipeline.data.url_files import Place

KEEP_BYTES = 512 * 1024**2  # memory for the encoded images of the most recently used row groups


def places(key: str, pattern: str) -> Sequence[Place]:
    """The files that `pattern`, a path or URL, names: see `found` here and in `url_files`."""
    return url_files.found(key, pattern) if url_files.is_url(pattern) else found(key, pattern)


def found(key: str, pattern: str) -> list[Path]:
    """The files that `pattern`, the value of the parameter `key`, names: one file, or those that match *, ? and [].

    A leading ~ is the home folder. Raises UserError if nothing matches.
    """
    path = Path(pattern).expanduser()
    if path.exists() or not any(sign in pattern for sign in "*?["):
        return [path]
    matches = sorted(glob(str(path), recursive=True))  # noqa: PTH207 - patterns may be absolute
    if not matches:
        raise UserError(f"{key}: no file matches {pattern}; correct the pattern")
    return [Path(match) for match in matches]


def named_once(paths: Sequence[Place]) -> list[str]:
    """The files with their folders, absolute, for messages. Raises UserError for one that is named twice."""
    whole = [redacted(p) if isinstance(p, str) else os.path.abspath(p) for p in paths]  # noqa: PTH100 - keeps links
    if twice := [path for i, path in enumerate(whole) if path in whole[:i]]:
        raise UserError(f"prepare.options: {twice[0]}: must be named once; got it twice; remove one of them")
    return whole


def short_names(paths: Sequence[Place]) -> list[str]:
    """A name for each file: its file name, or where these repeat, its path below the common parent folder.

    Raises UserError for a file that is named twice, and for equal names both at a path and at a URL.
    """
    whole = named_once(paths)
    names = [url_files.name_of(path) if isinstance(path, str) else path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    if len({path.partition("://")[0] if "://" in path else "" for path in whole}) > 1:
        raise UserError("prepare.options: files of equal names must lie in one place; got paths and URLs; rename them")
    top = os.path.commonpath([os.path.dirname(path) for path in whole])  # noqa: PTH120
    return [Path(os.path.relpath(path, top)).as_posix() for path in whole]


def opened(key: str, path: Place) -> pq.ParquetFile:
    """The open Parquet file. Raises UserError, with the parameter `key`, if it cannot be read."""
    try:
        if isinstance(path, str):
            url, path = path, redacted(path)
            there, size = url_files.opened(key, url)
            file = pq.ParquetFile(there)
        else:
            file, size = pq.ParquetFile(path), path.stat().st_size
        if file.metadata.num_rows > size:  # a few bytes can claim billions of rows
            raise ValueError(f"{file.metadata.num_rows} rows in {size} bytes hold no images")
    except CacheError as error:
        raise UserError(f"{key}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{key}: {path}: no such file; correct the path") from None
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {path}: must be a readable Parquet file ({reason}); replace the file or correct the path"
        ) from None
    return file


def class_names(schema: pa.Schema, column: str, *, labels: bool = True) -> list[str] | None:
    """The names of whole-number labels in the file's metadata, or None.

    They stand in the `huggingface` JSON, or, for the column of `labels`, separated by commas under `classes`. Layout:
    https://huggingface.co/docs/datasets/image_dataset
    """
    metadata = schema.metadata or {}
    with suppress(KeyError, ValueError, TypeError):
        return [str(n) for n in json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]]
    if labels and b"classes" in metadata:
        return str(metadata[b"classes"].decode(errors="replace")).split(",")
    return None


def row_reader(files: Mapping[str, pq.ParquetFile], column: str, key: str) -> Callable[[str], bytes]:
    """A function that returns the image bytes of a source. It keeps the most recently used row groups in memory.

    `column` holds bytes, or structs with a field `bytes`; the parameter `key` names it. The function raises UserError
    for a row that does not exist or holds something else, ValueError for one without bytes, OSError for a damaged file.
    """
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
        with lock:
            values = groups.get((name, group))
            if values is None:
                try:
                    table = files[name].read_row_group(group, [column])
                except pa.ArrowException as error:
                    raise OSError(str(error)) from None
                except CacheError as error:
                    if error.reason != "replaced":
                        raise
                    raise UserError(f"{name}: changed at its URL after it was opened; prepare again") from None
                values = groups[name, group] = table[column].combine_chunks()
            groups.move_to_end((name, group))
            while len(groups) > 1 and sum(c.nbytes for c in groups.values()) > KEEP_BYTES:
                groups.popitem(last=False)
        image = values[number - int(starts[name][group])].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        if data is None:
            raise ValueError("is missing: its row holds no bytes")
        if not isinstance(data, bytes):
            raise UserError(
                f"{source}: column {column!r} must hold encoded images as bytes; got {type(data).__name__}; set {key}"
            )
        return data

    return read

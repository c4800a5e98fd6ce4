"""Reads features and labels that other programs wrote: arrays in files of many formats. Nothing in a file is run.

Features: .npy, .npz, .safetensors, .pt, HDF5, and Parquet with a column of lists or a column for each number. Labels
may lie in the same file, or beside it in one of these formats, as a table, or as text with one label a line.
"""

import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from h2t.cache.memory import available_memory
from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError, in_brief
from h2t.pipeline.base.text import counted
from h2t.pipeline.data import tables

FEATURES = ("features", "embeddings", "embedding", "feature", "x")
LABELS = ("labels", "label", "targets", "target", "class", "y")
SOURCES = ("source", "path", "file_name", "filename", "id", "key")
AXES = {"NC": "NC", "NCHW": "NCHW", "NCT": "NCT"}  # the letters of an array's axes in any order -> in a cache's order
NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)


@dataclass(frozen=True)
class Keys:
    """Names of the arrays or columns in a file; for None, the usual names are tried.

    `axes`: letters of the features' axes: N rows, C channels, H and W of a map, T tokens; None is NC or NCHW.
    """

    features: str | None = None
    labels: str | None = None
    axes: str | None = None


@dataclass(frozen=True)
class Part:
    """One split: features (n, C, H, W) or (n, C), the n labels as they were given, and a distinct source for each.

    `where` says in messages which features these are.
    """

    features: np.ndarray
    labels: list[Any]
    sources: list[str]
    where: str = "features"


def read_part(path: Path, labels: Path | None, keys: Keys) -> Part:
    """Reads a split from `path`, with its labels from the same file or from `labels`.

    Raises UserError, which names the file, for one that cannot be read, or that holds no features with one label each.
    """
    with _naming(path):
        arrays = _opened(path, FORMATS)
        if labels is None and arrays.one:
            raise UserError(f"{path}: holds no labels; give them by --train-labels, --val-labels or --test-labels FILE")
        features = _in_order(path, arrays.pick(FEATURES, keys.features, "features"), keys.axes)
        sources = arrays.texts(SOURCES)
        if labels is None:
            return checked(path, features, arrays.pick(LABELS, keys.labels, "labels"), sources)
    with _naming(labels):
        beside = _opened(labels, LABEL_FORMATS)
        alone = next(iter(beside.readers)) if len(beside.readers) == 1 else None
        given = beside.pick(LABELS, keys.labels or alone, "labels")
        return checked(path, features, given, sources or beside.texts(SOURCES), labels)


def read_names(path: Path) -> list[str]:
    """Class names from a text file, one per line. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a readable list of class names ({error}); it must be UTF-8 text, one name per line"
        ) from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns errors of the formats' readers into one UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except Exception as error:  # noqa: BLE001 - each format's reader has its own classes of errors
        # Readers advise to allow pickles, which could run code.
        reason = "it holds Python objects or is damaged" if "pickle" in str(error).lower() else in_brief(error)
        raise UserError(
            f"{path}: cannot be read ({reason}); write the file again, with numbers, and texts for labels"
        ) from None


def _opened(path: Path, formats: Mapping[str, Callable[[Path], "_Arrays"]]) -> "_Arrays":
    if path.suffix.lower() not in formats:
        raise UserError(f"{path}: must be one of {', '.join(formats)}; got {path.suffix or 'no suffix'!r}")
    return formats[path.suffix.lower()](path)


def _in_order(path: Path, features: np.ndarray, axes: str | None) -> np.ndarray:
    """The features as (n, C) or (n, C, H, W), without a copy; tokens (n, T, C) become maps (n, C, T, 1).

    Raises UserError if `axes` are not those of the array, or are not given and may be others than NCHW.
    """
    if axes is None:
        if features.ndim == 3:
            raise UserError(
                f"{path}: features have three axes, {features.shape}; name them: --axes NTC where each row has T "
                "tokens of C channels, --axes NCT where channels come first"
            )
        if channels_seem_last(features.shape):
            raise UserError(
                f"{path}: in features of shape {features.shape}, channels seem to come last; name the axes: --axes "
                "NHWC if they do, --axes NCHW if they come first"
            )
        return features
    order = next((known for known in AXES if sorted(known) == sorted(axes.upper())), None)
    if order is None or len(axes) != features.ndim:
        raise UserError(
            f"{path}: --axes must name each of the {features.ndim} axes of {features.shape} once: N and C, with H "
            f"and W for maps or T for tokens; got {axes!r}"
        )
    turned = features.transpose([axes.upper().index(letter) for letter in order])
    return turned[..., None] if order == "NCT" else turned


def channels_seem_last(shape: Sequence[int]) -> bool:
    """Whether maps of `shape` look like (n, H, W, C): maps are square more often than they have H channels."""
    return len(shape) == 4 and shape[1] == shape[2] != shape[3]


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a file, as functions that read them, by name. `one`: the file holds one array without a name.

    `wide` are names of features that have a column for each number.
    """

    path: Path
    readers: Mapping[str, Callable[[], np.ndarray]]
    one: bool = False
    wide: Sequence[str] = ()

    def pick(self, usual: Sequence[str], name: str | None, what: str) -> np.ndarray:
        """The array called `name`; for None, the first that has a `usual` name. Raises UserError if there is none.

        Features are also looked for in the only group of numbered columns.
        """
        if self.one:
            return next(iter(self.readers.values()))()
        names = [name] if name is not None else [n for n in usual if n in self.readers]
        if not names and what == "features" and len(self.wide) == 1:
            names = list(self.wide)
        if not names or names[0] not in self.readers:
            raise UserError(
                f"{self.path}: no {what} called {name or ' or '.join(usual)}; it holds "
                f"{', '.join(self.readers) or 'nothing'}; name the right one by --{what}-key"
                + (", or give --train-labels, --val-labels or --test-labels FILE" if what == "labels" else "")
            )
        return self.readers[names[0]]()

    def texts(self, usual: Sequence[str]) -> list[str] | None:
        """A column of distinct texts under a `usual` name, to serve as sources of the rows; None if there is none."""
        for name in usual:
            if not self.one and name in self.readers:
                values = self.readers[name]()
                if values.dtype.kind in "UO" and len(set(values.tolist())) == len(values):
                    return [str(v) for v in values]
        return None


def _npy(path: Path) -> _Arrays:
    """One array, memory-mapped. NumPy refuses pickled objects, which could run code."""
    return _Arrays(path, {"array": lambda: np.load(path, mmap_mode="r", allow_pickle=False)}, one=True)


def _npz(path: Path) -> _Arrays:
    """Named arrays, read into memory. Raises ValueError if they do not fit."""
    with zipfile.ZipFile(path) as archive:
        _check_room(sum(entry.file_size for entry in archive.infolist()))
    file = np.load(path, allow_pickle=False)
    return _Arrays(path, {name: partial(_member, file, name) for name in file.files})


def _check_room(need: int) -> None:
    if need > available_memory():
        raise ValueError(f"needs {sized(need)} of memory; save .npy files, which are read in place")


def _member(file: Any, name: str) -> np.ndarray:
    """An array of an .npz file. Raises ValueError for anything else."""
    member = file[name]
    if not isinstance(member, np.ndarray):
        raise ValueError(f"{name!r} is not an array")
    return member


def _safetensors(path: Path) -> _Arrays:
    """Named tensors, each read when it is picked."""
    with safe_open(path, "np") as file:
        return _Arrays(path, {name: partial(_tensor, path, name) for name in file.keys()})  # noqa: SIM118


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "np") as file:
        if file.get_slice(name).get_dtype() != "BF16":
            tensor: np.ndarray = file.get_tensor(name)
            return tensor
    with safe_open(path, "pt") as file:
        return _as_array(file.get_tensor(name))


def _as_array(value: Any) -> np.ndarray:
    """A tensor, or a list of labels, as an array. bfloat16, which NumPy lacks, becomes float32 of the same values."""
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _torch(path: Path) -> _Arrays:
    """A tensor, or a dict of tensors and lists of labels, that torch.save wrote: memory-mapped where torch can."""
    import torch

    def content(*, mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        found = content(mmap=True)
    except RuntimeError:  # the format before torch 1.6
        found = content(mmap=False)
    if isinstance(found, torch.Tensor):
        return _Arrays(path, {"tensor": partial(_as_array, found)}, one=True)
    if not isinstance(found, dict):
        raise ValueError(f"it must hold a tensor or a dict of tensors; it holds a {type(found).__name__}")
    kept = {str(k): v for k, v in found.items() if isinstance(v, torch.Tensor | list | tuple)}
    return _Arrays(path, {name: partial(_as_array, value) for name, value in kept.items()})


def _hdf5(path: Path) -> _Arrays:
    """The datasets of all groups by their path, train/features for example. Links are not followed."""
    try:
        import h5py
    except ImportError:
        raise UserError(f"{path}: needs the package h5py; type: pip install 'h2t[hdf5]'") from None
    found: list[str] = []
    with h5py.File(path, "r") as file:
        file.visititems(lambda name, item: found.append(name) if isinstance(item, h5py.Dataset) else None)
    return _Arrays(path, {name: partial(_dataset, path, name) for name in found})


def _dataset(path: Path, name: str) -> np.ndarray:
    """A dataset, read into memory. Raises ValueError if it does not fit, or lies in other files."""
    import h5py

    with h5py.File(path, "r") as file:
        data = file[name]
        if data.is_virtual or data.external:
            raise ValueError(f"{name} lies in other files; copy it into one")
        _check_room(data.size * data.dtype.itemsize)
        return np.asarray(data.asstr()[()] if h5py.check_string_dtype(data.dtype) else data[()])


def _parquet(path: Path) -> _Arrays:
    """The columns of a table, each read when it is picked; numbered ones (f0, f1, ...) as one array called f*."""
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    numbered: dict[str, dict[int, str]] = defaultdict(dict)
    for field in schema:
        numeric = pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
        if numeric and (match := NUMBERED.fullmatch(field.name)):
            numbered[match[1]][int(match[2])] = field.name
    wide = {f"{name}*": columns for name, columns in numbered.items() if len(columns) > 1 and _gapless(columns)}
    inside = {name for columns in wide.values() for name in columns.values()}
    readers: dict[str, Callable[[], np.ndarray]] = {
        name: partial(_column, file, name) for name in schema.names if name not in inside
    }
    for name, columns in wide.items():
        readers[name] = partial(_columns, file, [columns[i] for i in sorted(columns)])
    return _Arrays(path, readers, wide=tuple(wide))


def _gapless(columns: Mapping[int, str]) -> bool:
    return min(columns) in (0, 1) and max(columns) - min(columns) + 1 == len(columns)


def _columns(file: pq.ParquetFile, names: Sequence[str]) -> np.ndarray:
    """Columns of numbers as one array (n, C), read by row group. Raises ValueError for missing values."""
    kinds = [file.schema_arrow.field(name).type.to_pandas_dtype() for name in names]
    rows = file.metadata.num_rows
    dtype = np.result_type(*kinds)
    _check_room(rows * len(names) * dtype.itemsize)
    values = np.empty((rows, len(names)), dtype)
    first = 0
    for group in range(file.num_row_groups):
        part = file.read_row_group(group, columns=list(names))
        for j, name in enumerate(names):
            column = part[name]
            if column.null_count:
                raise ValueError(f"column {name!r} has {counted(column.null_count, 'missing value')}")
            values[first : first + len(part), j] = column.to_numpy()
        first += len(part)
    return values


def _column(file: pq.ParquetFile, name: str) -> np.ndarray:
    """A column as an array (n,), or (n, C) if it holds lists. Raises ValueError for missing values or ragged lists."""
    column = file.read([name])[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError(f"column {name!r} has {counted(column.null_count, 'missing value')}")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = set(pa.compute.list_value_length(column).to_pylist())
        if len(lengths) != 1:
            raise ValueError(f"column {name!r} has rows of {len(lengths)} different lengths")
        values = column.flatten()
        if values.null_count:
            raise ValueError(f"column {name!r} has missing values inside its rows")
        flat: np.ndarray = values.to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)
    array: np.ndarray = column.to_numpy(zero_copy_only=False)
    return array


def _lines(path: Path) -> _Arrays:
    """A label on each line of a text file."""
    text = path.read_text(encoding="utf-8-sig").splitlines()
    if empty := [number for number, line in enumerate(text, 1) if not line.strip()]:
        raise UserError(f"{path}: each line must hold a label; line {empty[0]} is empty; add the label")
    return _Arrays(path, {"lines": lambda: _labels([line.strip() for line in text])}, one=True)


def _table(path: Path) -> _Arrays:
    """The columns of a CSV, TSV or JSON Lines file."""

    def column(name: str) -> np.ndarray:
        return _labels(list(tables.texts(path, name, tables.columns(path, [name])[name])))

    return _Arrays(path, {name: partial(column, name) for name in tables.column_names(path)})


def _labels(texts: list[str]) -> np.ndarray:
    """Texts as labels: whole numbers if all are, which then mean what they mean in the other formats."""
    whole = all(text.isascii() and text.isdigit() and len(text) < 19 for text in texts)
    return np.array([int(text) for text in texts]) if whole else np.array(texts, object)


FORMATS: dict[str, Callable[[Path], _Arrays]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
    ".pt": _torch,
    ".pth": _torch,
    ".h5": _hdf5,
    ".hdf5": _hdf5,
}
LABEL_FORMATS = {**FORMATS, ".txt": _lines, **dict.fromkeys((*tables.DELIMITED, *tables.LINES), _table)}


def checked(
    path: Path | str, features: np.ndarray, labels: np.ndarray, sources: list[str] | None, beside: Path | None = None
) -> Part:
    """The split of these arrays. Raises UserError if they are not features with one label per row.

    Messages on labels name the file `beside` if it holds them, else `path`.
    """
    where = beside or path
    if features.dtype.kind not in "fiu" or features.ndim not in (2, 4) or 0 in features.shape:
        raise UserError(
            f"{path}: features must be numbers of shape (n, C) or (n, C, H, W); got {features.dtype} {features.shape}"
        )
    if labels.shape != (len(features),):
        raise UserError(
            f"{where}: one label for each of {counted(len(features), 'row')} is needed; got shape {labels.shape}"
        )
    texts = all(isinstance(label, str) for label in labels.tolist())
    if labels.dtype.kind not in "iuUO" or (labels.dtype.kind == "O" and not texts):
        raise UserError(f"{where}: labels must be whole numbers or texts; got dtype {labels.dtype}; convert them")
    if blank := [i for i, v in enumerate(labels.tolist()) if isinstance(v, str) and not v.strip()]:
        raise UserError(f"{where}: a label must not be empty; that of row {blank[0]} is; add it or leave the row out")
    own = sources if len(sources or ()) == len(features) else None
    names = own or [f"{Path(path).name}/{i:09d}" for i in range(len(features))]
    return Part(features, labels.tolist(), names, str(path))

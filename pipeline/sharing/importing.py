"""Features that people bring, as a cache: .npy and .npz, safetensors, Parquet; vectors (n, C) or maps (n, C, H, W).

Nothing is known of the backbone, so there is no stage-I head: hosts that start from one refuse such a cache. Rows stand
under `stage1` statistics. Classes are numbered by descending training count, as everywhere.
"""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save

from h2t.cache.errors import CacheError
from h2t.cache.format.card import card
from h2t.cache.format.rows import SPLITS, make_rows
from h2t.cache.format.spec import CacheSpec, canonical_json, chunk_rows_for, sha256, shard_rows_for
from h2t.cache.memory import available_memory
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter, committed
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.trained import NONE

FEATURES = ("features", "embeddings", "embedding", "feature", "x")
LABELS = ("labels", "label", "targets", "target", "y")
SOURCES = ("source", "path", "id", "key")
SHARD_BYTES = 128 * 1024**2
BLOCK_ROWS = 1024
TEXT_LIMIT = 200


@dataclass(frozen=True)
class Keys:
    """Names of the arrays or columns in a file; None is found by the usual names."""

    features: str | None = None
    labels: str | None = None


@dataclass(frozen=True)
class Part:
    """One split: features (n, C, H, W) or (n, C), their labels as people gave them, and a source for each."""

    features: np.ndarray
    labels: list[Any]
    sources: list[str]


def read_part(path: Path, labels: Path | None, keys: Keys) -> Part:
    """The split in `path`, with its labels from the same file or from `labels`. Raises UserError, in one line."""
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UserError(f"{path}: must be one of {', '.join(readers)}; got {path.suffix or 'no suffix'!r}")
    try:
        arrays = readers[path.suffix](path)
        features = arrays.pick(FEATURES, keys.features, "features")
        if labels is None and arrays.one:
            raise UserError(f"{path}: holds features only; give their labels by --SPLIT-labels FILE")
        if labels is None:
            given = arrays.pick(LABELS, keys.labels, "labels")
        else:
            given = readers.get(labels.suffix, _npy)(labels).pick(LABELS, keys.labels, "labels")
        return _checked(path, features, given, arrays.texts(SOURCES))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the reader of each format fails in ways of its own
        raise UserError(f"{path}: cannot be read ({_short(error)})") from None


def read_names(path: Path) -> list[str]:
    """Class names, one a line. Raises UserError."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable list of class names ({error}); it must be UTF-8 text") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:TEXT_LIMIT] or type(error).__name__


@dataclass(frozen=True)
class _Arrays:
    """The arrays of a file by name; `one` is true for a file that holds just one array, without a name."""

    path: Path
    found: Mapping[str, Callable[[], np.ndarray]]
    one: bool = False

    def pick(self, usual: Sequence[str], name: str | None, what: str) -> np.ndarray:
        """The array called `name`, or by one of the `usual` names."""
        if self.one:
            return next(iter(self.found.values()))()
        names = [name] if name is not None else [n for n in usual if n in self.found]
        if not names or names[0] not in self.found:
            raise UserError(
                f"{self.path}: no {what} ({name or ', '.join(usual)}); it holds {', '.join(self.found) or 'nothing'}; "
                f"name them by --{what}-key" + (" or give --SPLIT-labels FILE" if what == "labels" else "")
            )
        return self.found[names[0]]()

    def texts(self, usual: Sequence[str]) -> list[str] | None:
        """A column of distinct texts that says where each row comes from, if there is one."""
        for name in usual:
            if not self.one and name in self.found:
                values = self.found[name]()
                if values.dtype.kind in "UO" and len(set(values.tolist())) == len(values):
                    return [str(v) for v in values]
        return None


def _npy(path: Path) -> _Arrays:
    """A memory map; a file of pickled objects is refused by NumPy."""
    return _Arrays(path, {"array": lambda: np.load(path, mmap_mode="r", allow_pickle=False)}, one=True)


def _npz(path: Path) -> _Arrays:
    with zipfile.ZipFile(path) as archive:
        need = sum(entry.file_size for entry in archive.infolist())
    if need > available_memory():
        raise ValueError(f"needs {need / 1e9:.1f} GB of memory; save .npy files, they are read in place")
    file = np.load(path, allow_pickle=False)
    return _Arrays(path, {name: partial(_member, file, name) for name in file.files})


def _member(file: Any, name: str) -> np.ndarray:
    found = file[name]
    if not isinstance(found, np.ndarray):
        raise ValueError(f"{name!r} is no array")
    return found


def _safetensors(path: Path) -> _Arrays:
    with safe_open(path, "np") as file:
        return _Arrays(path, {name: partial(_tensor, path, name) for name in file.keys()})  # noqa: SIM118


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "np") as file:
        found: np.ndarray = file.get_tensor(name)
        return found


def _parquet(path: Path) -> _Arrays:
    file = pq.ParquetFile(path)
    return _Arrays(path, {name: partial(_column, file, name) for name in file.schema_arrow.names})


def _column(file: pq.ParquetFile, name: str) -> np.ndarray:
    """A column as an array; a list of numbers as (n, C)."""
    column = file.read([name])[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no rows
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise ValueError(f"column {name!r} has {column.null_count} missing values")
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = set(pa.compute.list_value_length(column).to_pylist())
        if len(lengths) != 1:
            raise ValueError(f"column {name!r} has rows of {len(lengths)} different lengths")
        values = column.flatten()
        if values.null_count:
            raise ValueError(f"column {name!r} has missing values inside its rows")
        flat: np.ndarray = values.to_numpy(zero_copy_only=False)
        return flat.reshape(len(column), -1)
    found: np.ndarray = column.to_numpy(zero_copy_only=False)
    return found


def _checked(path: Path, features: np.ndarray, labels: np.ndarray, sources: list[str] | None) -> Part:
    """Raises UserError for arrays that are no features with labels."""
    if features.dtype.kind not in "fiu" or features.ndim not in (2, 4) or 0 in features.shape:
        raise UserError(
            f"{path}: features must be numbers of shape (n, C) or (n, C, H, W); got {features.dtype} {features.shape}"
        )
    if labels.shape != (len(features),):
        raise UserError(f"{path}: one label for each of {len(features)} rows is needed; got shape {labels.shape}")
    if labels.dtype.kind not in "iuUO" or (
        labels.dtype.kind == "O" and not all(isinstance(v, str) for v in labels.tolist())
    ):
        raise UserError(f"{path}: labels must be whole numbers or texts; got {labels.dtype}")
    names = sources or [f"{path.name}/{i:09d}" for i in range(len(features))]
    return Part(features, labels.tolist(), names)


def _maps(part: Part, which: np.ndarray, dtype: str) -> np.ndarray:
    """Rows `which` as (n, C, H, W) in the stored dtype. Raises UserError for values it cannot hold."""
    with np.errstate(over="ignore"):
        values = np.asarray(part.features[which]).astype(dtype)
    if not np.isfinite(values).all():
        bad = int(which[~np.isfinite(values.reshape(len(values), -1)).all(1)][0])
        raise UserError(f"features: row {bad} ({part.sources[bad]}) holds NaN, infinity or a value beyond {dtype}")
    return values.reshape(*values.shape, 1, 1) if values.ndim == 2 else values


def _blocks(part: Part, dtype: str) -> Iterator[np.ndarray]:
    for first in range(0, len(part.labels), BLOCK_ROWS):
        yield _maps(part, np.arange(first, min(first + BLOCK_ROWS, len(part.labels))), dtype)


def class_order(parts: Mapping[str, Part]) -> tuple[list[Any], list[int]]:
    """Labels in descending order of training count (ties ascending), and the counts. Raises UserError."""
    found, counts = np.unique(np.array(parts["train"].labels), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    labels = found[order].tolist()
    for split, part in parts.items():
        if type(part.labels[0]) is not type(labels[0]):
            raise UserError(f"{split}: labels must be of one kind in all splits; got {part.labels[0]!r}")
        strange = sorted(set(part.labels) - set(labels))
        if strange:
            raise UserError(f"{split}: label {strange[0]!r} has no training row; leave such rows out")
    return labels, counts[order].tolist()


def run(
    parts: Mapping[str, Part],
    out: Path,
    say: Callable[[str], None],
    *,
    names: Sequence[str] | None = None,
    replace: bool = False,
) -> CacheSpec:
    """Writes the cache `out` from the splits `parts` (train is needed) and returns its spec.

    `names` are class names for labels 0, 1, ...; by default a label is its own name. float16 maps stay float16, all
    else is float32. Where `out` holds this very cache nothing is done. Raises UserError and CacheError (`exists`,
    `busy`, `full`).
    """
    parts = {split: parts[split] for split in SPLITS if split in parts}
    if "train" not in parts:
        raise UserError("import: training features are needed; give --train FILE")
    shapes = {split: (*p.features.shape[1:], *(1,) * (4 - p.features.ndim)) for split, p in parts.items()}
    if len(set(shapes.values())) > 1:
        raise UserError(f"import: splits must agree in (C, H, W); got {shapes}")
    labels, counts = class_order(parts)
    if names is not None and not all(isinstance(v, int) and 0 <= v < len(names) for v in labels):
        raise UserError(f"import: {len(names)} class names are for labels 0 to {len(names) - 1}; got others")
    half = all(p.features.dtype == np.float16 and p.features.ndim == 4 for p in parts.values())
    dtype = "float16" if half else "float32"
    rows, order = _rows(parts, labels, dtype)
    shape = shapes["train"]
    row_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    chunk_rows = chunk_rows_for(row_bytes)
    identity = rows.select(["split", "label", "source", "digest"]).to_pydict()
    spec = CacheSpec(
        rows=len(rows),
        maps=(shape,),
        dtype=dtype,
        codec="none",
        chunk_rows=chunk_rows,
        shard_rows=shard_rows_for(row_bytes, chunk_rows, SHARD_BYTES),
        fingerprint_inputs={"backbone": {"weights": NONE}, "imported": sha256(canonical_json(identity))},
        provenance={
            "classes": [str(names[v] if names is not None else v) for v in labels],
            "counts": counts,
            "dataset": "imported",
        },
    )
    with Staging(out) as staging:
        have = committed(out)
        if have and (have.fingerprint, have.layout) == (spec.fingerprint, spec.layout):
            say(f"{out} already holds this cache ({have.rows} rows); nothing to do")
            staging.discard()
            return have
        if have and not replace:
            raise CacheError("exists", f"{out}: holds another cache; remove it or pass --replace")
        writer = CacheWriter(staging, spec, rows, {"import": 1})
        splits = list(parts.values())
        starts = np.cumsum([0, *(len(p.labels) for p in splits)])
        for shard in writer.pending:
            held = spec.shard_range(shard)
            wanted = order[held.start : held.stop]
            maps = np.empty((len(wanted), *shape), dtype)
            for part, start in zip(splits, starts, strict=False):
                mine = np.flatnonzero((wanted >= start) & (wanted < start + len(part.labels)))
                for first in range(0, len(mine), BLOCK_ROWS):
                    at = mine[first : first + BLOCK_ROWS]
                    maps[at] = _maps(part, wanted[at] - start, dtype)
            _check_digests(rows.slice(held.start, len(held)), maps)
            writer.write(shard, [maps])
        writer.commit(save({}), card(spec, rows), replace=replace)
    say(f"{out}: {spec.rows} rows of {' x '.join(map(str, shape))}, {len(labels)} classes, {dtype}")
    return spec


def _check_digests(rows: pa.Table, maps: np.ndarray) -> None:
    """Raises UserError unless `maps` are those that the digests in `rows` were made of: files are read twice."""
    for source, expected, row in zip(rows["source"].to_pylist(), rows["digest"].to_pylist(), maps, strict=True):
        if sha256(row.tobytes()) != expected:
            raise UserError(f"features: {source} changed while it was imported; import again once the file is finished")


def _rows(parts: Mapping[str, Part], labels: list[Any], dtype: str) -> tuple[pa.Table, np.ndarray]:
    """The row table, and which given row (counted over all splits) each of its rows is."""
    number = {label: i for i, label in enumerate(labels)}
    columns: dict[str, list[Any]] = {k: [] for k in ("split", "label", "source", "digest")}
    for split, part in parts.items():
        columns["split"] += [split] * len(part.labels)
        columns["label"] += [number[label] for label in part.labels]
        columns["source"] += part.sources
        columns["digest"] += [sha256(row.tobytes()) for block in _blocks(part, dtype) for row in block]
    count = len(columns["split"])
    given = {**columns, "sample": range(count), "view": [0] * count, "statistics": ["stage1"] * count}
    rows = make_rows(given)
    return rows, rows["sample"].to_numpy()

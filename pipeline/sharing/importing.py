"""`h2t cache import`: makes a cache from features that another program computed.

Features are vectors (n, C) or maps (n, C, H, W). Their backbone is unknown, so there is no stage-I head, and hosts that
start from one refuse such a cache. All rows are recorded under `stage1` statistics. Classes are numbered by descending
training count, as in every cache.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save

from h2t.cache.errors import CacheError
from h2t.cache.format.card import card
from h2t.cache.format.row_index import index_of
from h2t.cache.format.rows import SPLITS, make_rows
from h2t.cache.format.spec import CacheSpec, canonical_json, chunk_rows_for, sha256, shard_rows_for
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter, committed
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.networks.trained import NONE
from h2t.pipeline.sharing.feature_files import Part, checked

SHARD_BYTES = 128 * 1024**2
BLOCK_ROWS = 1024  # rows converted at a time
EXACT = 2**24  # float32 holds every whole number up to this
SMALL = 0.1  # root mean square of features below which the usual learning rates and penalties are far off


def _maps(part: Part, which: np.ndarray, dtype: str) -> np.ndarray:
    """Rows `which`, int (n,), as maps (n, C, H, W) of `dtype`.

    Raises UserError for values not finite in `dtype`, and for whole numbers beyond `EXACT`.
    """
    given = np.asarray(part.features[which])
    if given.dtype.kind in "iu" and (given.max(initial=0) > EXACT or given.min(initial=0) < -EXACT):
        large = (given > EXACT) | (given < -EXACT)
        bad = int(which[large.reshape(len(given), -1).any(1)][0])
        raise UserError(
            f"{part.where}: whole numbers must be at most {EXACT:,}, as float32 rounds larger ones; row {bad} "
            f"({part.sources[bad]}) holds {int(given[large][0])}; scale them, or save them as float32 if rounding is "
            "meant"
        )
    with np.errstate(over="ignore"):
        values = given.astype(dtype)
    if not np.isfinite(values).all():
        bad = int(which[~np.isfinite(values.reshape(len(values), -1)).all(1)][0])
        raise UserError(
            f"{part.where}: row {bad} ({part.sources[bad]}) holds NaN, infinity or a value beyond {dtype}; leave it out"
        )
    return values.reshape(*values.shape, 1, 1) if values.ndim == 2 else values


def _blocks(part: Part, dtype: str) -> Iterator[np.ndarray]:
    """Yields all maps of a split, (n, C, H, W), at most `BLOCK_ROWS` rows at a time."""
    for first in range(0, len(part.labels), BLOCK_ROWS):
        yield _maps(part, np.arange(first, min(first + BLOCK_ROWS, len(part.labels))), dtype)


def scale_note(part: Part) -> str | None:
    """A line if the values of `part` are small, as those of vectors of length 1 are; looks at up to 1,024 rows."""
    rows = np.unique(np.linspace(0, len(part.labels) - 1, BLOCK_ROWS).astype(np.int64))
    size = float(np.sqrt(np.square(_maps(part, rows, "float32"), dtype=np.float64).mean()))
    if not 0 < size < SMALL:
        return None
    return (
        f"features are small: {size:.2g} in root mean square, as of vectors of length 1; learning rates and penalties "
        f"are made for about 1, so classifiers may stay untrained; multiply all features by {1 / size:.3g} first"
    )


def split_parts(
    features: np.ndarray, labels: Sequence[Any], splits: Sequence[str] | None, sources: Sequence[str] | None
) -> dict[str, Part]:
    """The parts of arrays in memory: `splits` says train, val or test for each row; None: all rows are for training.

    Raises UserError for arrays that do not fit each other.
    """
    given = np.asarray(labels)
    names = None if sources is None else [str(source) for source in sources]
    if names is not None and (len(set(names)) != len(names) or given.shape != (len(names),)):
        raise UserError(
            f"source: must be a distinct name for each of {counted(len(given), 'row')}; got {len(set(names))}; "
            "number them"
        )
    whole = checked("arrays", np.asarray(features), given, names)
    if splits is None:
        return {"train": whole}
    of = np.asarray(splits)
    if of.shape != given.shape:
        raise UserError(f"split: must say train, val or test for each of {counted(len(given), 'row')}; got {of.shape}")
    parts = {}
    for split in SPLITS:
        rows = np.flatnonzero(of == split)
        if len(rows):
            kept = [whole.sources[i] for i in rows]
            parts[split] = Part(whole.features[rows], [whole.labels[i] for i in rows], kept, whole.where)
    return parts


def class_order(parts: Mapping[str, Part]) -> tuple[list[Any], list[int]]:
    """Labels in descending order of training count (equal counts: ascending labels), and their counts.

    Raises UserError if splits differ in the type of their labels, or a label occurs in no training row.
    """
    distinct, counts = np.unique(np.array(parts["train"].labels), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    labels = distinct[order].tolist()
    for split, part in parts.items():
        if type(part.labels[0]) is not type(labels[0]):
            raise UserError(
                f"{split}: labels must have one type in all splits; train has {labels[0]!r}, {split} has "
                f"{part.labels[0]!r}; convert them"
            )
        unknown = sorted(set(part.labels) - set(labels))
        if unknown:
            raise UserError(f"{split}: label {unknown[0]!r} occurs in no training row; leave such rows out")
    return labels, counts[order].tolist()


def run(
    parts: Mapping[str, Part],
    out: Path,
    say: Callable[[str], None],
    *,
    names: Sequence[str] | None = None,
    replace: bool = False,
) -> CacheSpec:
    """Writes the cache `out` from the splits `parts` (`train` is required) and returns its spec.

    `names` are the class names of labels 0, 1, ...; by default, a label is its own name. If all splits are float16
    maps, they stay float16; everything else becomes float32. If `out` already holds the same cache, nothing is
    written. Raises UserError, and CacheError (`exists`, `busy`, `full`).
    """
    parts = {split: parts[split] for split in SPLITS if split in parts}
    if "train" not in parts:
        raise UserError("import: no training features; give --train FILE")
    shapes = {split: (*p.features.shape[1:], *(1,) * (4 - p.features.ndim)) for split, p in parts.items()}
    if len(set(shapes.values())) > 1:
        got = ", ".join(f"{split} {shape}" for split, shape in shapes.items())
        raise UserError(f"import: all splits must have the same (C, H, W); got {got}; use one backbone for all")
    labels, counts = class_order(parts)
    wrong = [v for v in labels if not (isinstance(v, int) and 0 <= v < len(names))] if names is not None else []
    if names is not None and wrong:
        raise UserError(
            f"import: {counted(len(names), 'class name')} allow labels 0 to {len(names) - 1}; got {wrong[0]!r}; "
            "name every class"
        )
    if names is not None and (twice := [name for name, count in Counter(names).items() if count > 1]):
        raise UserError(f"import: class names must differ; got {twice[0]!r} twice; rename one")
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
            say(f"{out} already holds this cache ({counted(have.rows, 'row')}); nothing to do")
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
        writer.commit(save({}), card(spec, index_of(rows).counts), replace=replace)
    if copies := _trained_on(identity):
        rows_of = counted(len(copies), "validation or test row")
        equal = "equals a training row" if len(copies) == 1 else "equal training rows"
        say(f"note: {rows_of} {equal} in every value, such as {copies[0]}: accuracy there says little about new data")
    if note := scale_note(parts["train"]):
        say(f"note: {note}")
    classes = counted(len(labels), "class", "classes")
    say(f"{out}: {counted(spec.rows, 'row')} of {' x '.join(map(str, shape))}, {classes}, {dtype}")
    return spec


def _trained_on(rows: Mapping[str, Sequence[Any]]) -> list[str]:
    """The sources of validation and test rows whose values are those of a training row."""
    columns = [rows[name] for name in ("split", "digest", "source")]
    trained = {digest for split, digest, _ in zip(*columns, strict=True) if split == "train"}
    return [source for split, digest, source in zip(*columns, strict=True) if split != "train" and digest in trained]


def _check_digests(rows: pa.Table, maps: np.ndarray) -> None:
    """Raises UserError unless `maps` have the digests in `rows`: a file is read twice and may have changed."""
    for source, expected, row in zip(rows["source"].to_pylist(), rows["digest"].to_pylist(), maps, strict=True):
        if sha256(row.tobytes()) != expected:
            raise UserError(f"features: {source} changed while it was imported; import again once the file is finished")


def _rows(parts: Mapping[str, Part], labels: list[Any], dtype: str) -> tuple[pa.Table, np.ndarray]:
    """The row table, and for each of its rows the index of the given row, counted over all splits, int (n,)."""
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

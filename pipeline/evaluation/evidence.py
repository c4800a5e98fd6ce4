"""The report's material beyond accuracy: calibration, weight norms, a t-SNE embedding, and facts about the cache.

All tables are small: a few heads, `BINS` bins, and at most `PER_CLASS` samples of each of `SHOWN` classes.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from threadpoolctl import threadpool_limits

from h2t.cache.format.spec import TEST_GROUPS
from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.pipeline.base.outputs import write_json
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.evaluation.metrics import Answers, reliability
from h2t.pipeline.evaluation.scoring import Scores
from h2t.pipeline.heads.features import FeatureReader, to_tensor
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import StageOneHead

SHOWN = 10  # most classes in the embedding; of more classes, this many evenly spaced by training count
PER_CLASS = 60  # most samples of a class in the embedding
SPARSITY_ROWS = 256  # most test rows whose zeros are counted
PERPLEXITY = 30
METHOD = f"t-SNE, perplexity {PERPLEXITY}, pca, 0"
ROOM = 256 * 2**20  # bytes of memory that t-SNE and its libraries may need
FEWEST = 8  # with fewer samples there is no embedding


def write_reliability(into: Path, said: Iterable[tuple[int, Scores, Answers]]) -> None:
    """Writes `reliability.parquet`: for each head and bin, samples, mean confidence and accuracy (both in percent).

    `said`: the number of each head, the scores that its predictions belong to, and these.
    """
    lines = []
    for number, result, predicted in said:
        right = (predicted.guesses == result.labels).astype(float)
        bins = reliability(predicted.confidence, right)
        lines += [{"number": number, **b} for b in bins]
    names = ("low", "high", "confidence", "accuracy")
    schema = pa.schema([(k, pa.int64()) for k in ("number", "bin", "count")] + [(k, pa.float64()) for k in names])
    pq.write_table(pa.Table.from_pylist(lines, schema), into / "reliability.parquet", compression="zstd")


def write_weight_norms(into: Path, heads: Heads, stage1: StageOneHead, kept: Sequence[int]) -> None:
    """Writes `weight_norms.parquet`: the L2 norm of each class's weight vector, averaged over the experts.

    Class scales are included. `kept` lists the numbers of the heads to write besides stage I (-1). A head without a
    weight matrix is left out.
    """
    columns: dict[str, list[Any]] = {"number": [], "class": [], "norm": []}
    states = {-1: stage1.state, **{n: {k: t[n] for k, t in heads.state.items()} for n in kept}}
    for number, state in states.items():
        if "weight" not in state:
            continue
        norms = state["weight"].to(torch.float64).norm(dim=-1)  # (E, classes)
        if "class_scale" in state:
            norms = norms * state["class_scale"].to(torch.float64).abs()
        each = norms.mean(0).tolist()
        columns["number"] += [number] * len(each)
        columns["class"] += range(len(each))
        columns["norm"] += each
    types = (pa.int64(), pa.int64(), pa.float64())
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
    pq.write_table(pa.table(arrays, list(columns)), into / "weight_norms.parquet", compression="zstd")


def shown_samples(labels: np.ndarray, classes: int) -> np.ndarray:
    """Positions, int (m,), of the samples to embed: up to `PER_CLASS` of up to `SHOWN` classes, evenly spaced."""
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, SHOWN)).round().astype(int))
    places = []
    for label in chosen:
        members = np.flatnonzero(labels == label)
        places.append(members[np.linspace(0, len(members) - 1, min(len(members), PER_CLASS)).round().astype(int)])
    return np.sort(np.concatenate(places))


def embed(features: np.ndarray) -> np.ndarray:
    """t-SNE of features (n, D) as points in the plane, float64 (n, 2). Equal features give equal points.

    It runs on one thread, because the order of sums over several threads varies. Raises MemoryError below `ROOM`.
    Source: van der Maaten and Hinton, "Visualizing Data using t-SNE", JMLR 2008. A change here needs another METHOD.
    """
    from sklearn.manifold import TSNE  # takes seconds to import

    if available_memory() < ROOM:  # OpenBLAS would retry its allocations forever
        raise MemoryError(f"t-SNE needs {ROOM // 2**20} MB")
    if (features == features[:1]).all():  # scikit-learn divides by their spread, and crashes on the NaN
        return np.zeros((len(features), 2))
    with threadpool_limits(1):
        perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.astype(np.float64))
    return np.asarray(points, np.float64)


def embed_once(features: np.ndarray) -> np.ndarray:
    """`embed(features)`, computed once on a machine: the hosts of a cache show the same points, whatever their heads.

    Points are kept in `h2t/embeddings` below XDG_CACHE_HOME or ~/.cache, in a file named after everything they depend
    on, behind a sha256 of their bytes. A file that is missing, damaged or cannot be written costs time only.
    """
    made_by = (METHOD, *(f"{name} {version(name)}" for name in ("scikit-learn", "scipy", "numpy")))
    known = f"{made_by} {features.shape} {features.dtype}".encode() + features.tobytes()
    with suppress(OSError, RuntimeError):
        data = _kept_at(known).read_bytes()
        points = data[hashlib.sha256().digest_size :]
        if data == _sealed(points) and len(points) == len(features) * 2 * 8:
            return np.frombuffer(points, np.float64).reshape(-1, 2)
    at = embed(features)
    with suppress(OSError, RuntimeError):
        path = _kept_at(known)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(_sealed(at.tobytes()))
        partial.replace(path)
    return at


def _kept_at(known: bytes) -> Path:
    """The file of the points that depend on `known`. Raises RuntimeError for a user without a home folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "h2t", "embeddings", hashlib.sha256(known).hexdigest())


def _sealed(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


def write_embedding(
    into: Path, cache: Cache, rows: np.ndarray, samples: np.ndarray, labels: np.ndarray, guesses: Mapping[str, Any]
) -> None:
    """Writes `embedding.parquet`: t-SNE points of some test rows with their labels and predicted classes.

    `rows`, `samples` and `labels` are int (n,). `guesses` maps a column's name to one head's predicted classes (n,), or
    to None if there is no such head.
    """
    places = shown_samples(labels, len(recorded_names(cache.spec.provenance, cache.files)))
    few = len(places) < FEWEST
    at = np.zeros((0, 2)) if few else embed_once(_features(cache, rows[places]))
    places = places[:0] if few else places
    columns = {
        "sample": pa.array(samples[places], pa.int64()),
        "label": pa.array(labels[places], pa.int64()),
        "x": pa.array(at[:, 0], pa.float64()),
        "y": pa.array(at[:, 1], pa.float64()),
    }
    for name, classes in guesses.items():
        columns[name] = pa.nulls(len(places), pa.int64()) if classes is None else pa.array(classes[places], pa.int64())
    pq.write_table(pa.table(columns), into / "embedding.parquet", compression="zstd")


def _features(cache: Cache, rows: np.ndarray) -> np.ndarray:
    """Globally averaged maps of `rows`, all experts side by side, (n, E * C)."""
    features = FeatureReader(cache, global_average).read(rows)  # (E, n, C)
    return features.movedim(0, 1).flatten(1).numpy()


def write_about(
    into: Path, cache: Cache, heads: Heads, rows: np.ndarray, group_of: Sequence[str | None], seeded: bool
) -> None:
    """Writes `about.json`: the host's settings, the classes, and facts about the cache.

    `seeded`: whether its training depends on a seed. `rows` are test rows; the share of zeros is measured on at most
    `SPARSITY_ROWS` of them.
    """
    index, spec = cache.index, cache.spec
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SPARSITY_ROWS)).round().astype(int)]
    maps = (to_tensor(cache.read(rows, expert=e), spec.dtype) for e in range(spec.experts))
    zeros = [(m.numel() - int(m.count_nonzero())) / m.numel() for m in maps]
    facts = {
        "rows": spec.rows,
        "rows_of": sorted([p.split, p.statistics, p.stop - p.start] for p in index.parts),
        "bytes": sum(size for size, _ in cache.commit.files.values()),
        "files": len(cache.commit.files),
        "maps": [list(shape) for shape in spec.maps],
        "views": index.views[-1] + 1,
        "dtype": spec.dtype,
        "codec": spec.codec,
        "zeros_percent": 100 * float(np.mean(zeros)),
        "zeros_rows": len(rows),
        "fingerprint": spec.fingerprint,
        "batchnorm": spec.fingerprint_inputs.get("batchnorm", {}),
        "provenance": {k: v for k, v in spec.provenance.items() if k not in ("classes", "counts", TEST_GROUPS)},
    }
    counts = heads.about["counts"]
    settings = {k: v for k, v in heads.about.items() if k not in ("counts", "where")}
    settings["seeded"] = seeded
    names = recorded_names(spec.provenance, cache.files)
    about = {"host": settings, "classes": names, "counts": counts, "groups": list(group_of), "cache": facts}
    write_json(into / "about.json", about)

"""Small caches for tests. Every builder has a complete default, so that a test states only what matters to it."""

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from h2t.cache.errors import CacheError
from h2t.cache.format.rows import groups_of, read_table, write_table
from h2t.cache.format.rows import make_rows as rows_of
from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.parts import Part
from h2t.cache.write.staging import Staging
from h2t.cache.write.target import target_at
from h2t.cache.write.writer import CacheWriter

TOKEN = {"batch_size": 4}


@contextmanager
def raises(reason: str, match: str | None = None) -> Iterator[pytest.ExceptionInfo[CacheError]]:
    """`pytest.raises(CacheError, match=match)`, for this reason."""
    with pytest.raises(CacheError, match=match) as error:
        yield error
    assert error.value.reason == reason


def make_spec(**overrides) -> CacheSpec:
    values = {
        "rows": 11,
        "maps": ((3, 2, 2),),
        "dtype": "float16",
        "codec": "none",
        "chunk_rows": 1,
        "shard_rows": 4,
        "fingerprint_inputs": {"backbone": "b" * 64, "views": {"max": 2, "seed": 0}},
        "provenance": {"numpy": "2.0"},
    }
    return CacheSpec(**{**values, **overrides})


def make_rows(count: int = 11, **overrides) -> pa.Table:
    """A row table of `count` rows: three classes, two views, train and test."""
    i = np.arange(count)
    columns = {
        "sample": i // 2,
        "view": (i % 2).astype(np.int16),
        "statistics": ["stage1"] * count,
        "split": ["test" if k % 5 == 4 else "train" for k in i],
        "label": ((i // 2) % 3).astype(np.int32),
        "source": [f"images/{k // 2:04}.png" for k in i],
        "digest": [hashlib.sha256(str(k // 2).encode()).hexdigest() for k in i],
    }
    return rows_of({**columns, **overrides})


def table_bytes(table: pa.Table) -> bytes:
    """A row table as `rows.parquet`."""
    sink = io.BytesIO()
    write_table(groups_of(table), sink)
    return sink.getvalue()


def table_in(data: bytes, expected_rows: int) -> pa.Table:
    """The row table in `data`, the bytes of `rows.parquet`."""
    return read_table(pa.BufferReader(data), expected_rows)


def make_maps(spec: CacheSpec, seed: int = 0) -> list[np.ndarray]:
    """Maps of every expert, (rows, C, H, W) in the stored dtype: non-negative, about half of them 0."""
    rng = np.random.default_rng(seed)
    maps = []
    for shape in spec.maps:
        values = np.maximum(rng.standard_normal((spec.rows, *shape)), 0).astype(np.float32)
        if spec.dtype == "bfloat16":
            maps.append((values.view(np.uint32) >> 16).astype("<u2"))
        else:
            maps.append(values.astype(spec.stored_dtype))
    return maps


def make_statistics() -> bytes:
    """A safetensors file with one buffer."""
    values = np.arange(3, dtype="<f4").tobytes()
    header = json.dumps({"stage1/mean": {"dtype": "F32", "shape": [3], "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


def write_cache(target: Path, spec: CacheSpec, rows: pa.Table, maps: list[np.ndarray], **commit) -> None:
    with Staging(target) as staging:
        writer = CacheWriter(staging, spec, rows, TOKEN)
        for shard in writer.pending:
            held = spec.shard_range(shard)
            writer.write(shard, [m[held.start : held.stop] for m in maps])
        writer.commit(make_statistics(), b"# A cache\n", **commit)


def write_part(place: Path | str, spec: CacheSpec, part: Part, *, token=TOKEN, seed=0, shards=None) -> list[int]:
    """Writes `part` of the cache at the path or URL `place`, or only its `shards`; returns what it had to write."""
    target, maps = target_at(place), make_maps(spec, seed)
    with target.held(part) as staging:
        writer, pending = target.part(staging, spec, token, part)
        for shard in pending if shards is None else shards:
            held = spec.shard_range(shard)
            writer.write(shard, [m[held.start : held.stop] for m in maps])
        return pending


def make_cache(target: Path, seed: int = 0, rows: pa.Table | None = None, **overrides) -> list[np.ndarray]:
    """Writes a cache to `target`; returns the maps of its experts."""
    spec = make_spec(**({"rows": len(rows)} if rows is not None else {}), **overrides)
    maps = make_maps(spec, seed)
    write_cache(target, spec, make_rows(spec.rows) if rows is None else rows, maps)
    return maps


def flip(path: Path, at: int = -1, bit: int = 1) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def tree(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `root`."""
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def reseal(root: Path, change) -> None:
    """Lets `change` edit the object in cache.json and makes its own sha256 true again, as a hostile author would."""
    from h2t.cache.format.spec import canonical_json, sha256

    body = json.loads((root / "cache.json").read_bytes())
    change(body)
    body.pop("self", None)
    body["self"] = sha256(canonical_json(body))
    (root / "cache.json").write_bytes(canonical_json(body))


def reseal_file(root: Path, name: str) -> None:
    """Makes cache.json agree with the present bytes of `name`."""
    from h2t.cache.format.spec import sha256

    data = (root / name).read_bytes()
    reseal(root, lambda body: body["files"].__setitem__(name, {"bytes": len(data), "sha256": sha256(data)}))

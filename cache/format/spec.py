"""The specification of a cache: shapes, layout and what determines its values; written to and read from JSON.

`CacheSpec.fingerprint` covers everything that determines the values (rule 2.4 of docs/cache-format.md) and nothing
that only changes the bytes, so caches that differ in codec or chunk size have the same fingerprint.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from h2t.cache.errors import CacheError

FORMAT = 1
RECORD = "cache.json"
ROWS = "rows.parquet"
STATISTICS = "batchnorm.safetensors"
CARD = "README.md"
MAPS = "maps.zarr"
TEST_GROUPS = "test_groups"  # in the provenance: the number of each test image's group, in the order of their rows
#: Longer records are neither written nor read. A record of 200,000 shards takes 27 MB.
MAX_RECORD_BYTES = 32 * 1024**2

#: Dtype of the stored arrays. NumPy and zarr-python have no bfloat16, so its bits are stored as uint16.
STORED_AS = {"float16": "float16", "float32": "float32", "bfloat16": "uint16"}

WHOLE_ROW_BYTES = 8 * 1024  # a row of this size or more is its own chunk
SMALL_ROW_CHUNK_BYTES = 64 * 1024  # smaller rows share chunks of about this size
MANY_SHARDS = 4096  # files, which tools such as DVC list and hash one by one
LARGEST_GROWN_SHARD = 512 * 1024**2  # bytes
MAX_CHUNK_BYTES = 2**31  # the limit of Blosc and LZ4


def to_float32(maps: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values of a cache of `dtype`, any shape, as float32; the conversion is exact."""
    if dtype == "bfloat16":
        return (maps.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return maps.astype(np.float32)


def canonical_json(value: Any) -> bytes:
    """`value` as canonical JSON: UTF-8, sorted keys, no spaces; raises ValueError for NaN and infinity."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def chunk_rows_for(row_bytes: int) -> int:
    """Rows per chunk: 1 for large rows, so reading a random row reads no other; else as many as fill 64 KiB."""
    if row_bytes >= WHOLE_ROW_BYTES:
        return 1
    return max(1, SMALL_ROW_CHUNK_BYTES // row_bytes)


def shard_rows_for(row_bytes: int, chunk_rows: int, shard_bytes: int) -> int:
    """Rows per shard: as many whole chunks as fit into `shard_bytes` of uncompressed values, at least one."""
    return max(1, shard_bytes // (row_bytes * chunk_rows)) * chunk_rows


def grown_shard_bytes(shard_bytes: int, cache_bytes: int) -> int:
    """The size of a shard for an expert's `cache_bytes`: `shard_bytes`, doubled until there are few enough shards.

    Few enough is `MANY_SHARDS`, and no shard grows beyond `LARGEST_GROWN_SHARD`, as writers hold several in memory.
    """
    while cache_bytes > MANY_SHARDS * shard_bytes and 2 * shard_bytes <= LARGEST_GROWN_SHARD:
        shard_bytes *= 2
    return shard_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Shapes, layout and origin of one cache.

    `maps` holds one (C, H, W) per expert. `fingerprint_inputs` is a JSON object of everything that determines the
    values; `provenance` is a JSON object of versions and settings that are only recorded. Raises CacheError `spec`
    for an invalid specification.
    """

    rows: int
    maps: tuple[tuple[int, int, int], ...]
    dtype: str
    codec: str
    chunk_rows: int
    shard_rows: int
    fingerprint_inputs: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = None
        if self.rows < 1:
            problem = f"rows must be at least 1; got {self.rows}"
        elif not self.maps or any(len(m) != 3 or min(m) < 1 for m in self.maps):
            problem = f"every expert must have a map shape (C, H, W) with positive sizes; got {self.maps}"
        elif self.dtype not in STORED_AS:
            problem = f"dtype must be one of {', '.join(sorted(STORED_AS))}; got {self.dtype!r}"
        elif self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            problem = f"shard_rows must be a multiple of chunk_rows; got {self.shard_rows} and {self.chunk_rows}"
        elif self.chunk_rows * self.largest_row_bytes >= MAX_CHUNK_BYTES:
            problem = f"a chunk must hold less than 2 GiB of values; got chunk_rows {self.chunk_rows} of {self.maps}"
        if problem:
            raise CacheError("spec", problem)

    @property
    def experts(self) -> int:
        return len(self.maps)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the arrays on disk, little endian."""
        return np.dtype(STORED_AS[self.dtype]).newbyteorder("<")

    def row_bytes(self, expert: int = 0) -> int:
        """Bytes of one row of `expert`, uncompressed."""
        return math.prod(self.maps[expert]) * self.stored_dtype.itemsize

    @property
    def largest_row_bytes(self) -> int:
        """Bytes of one row, uncompressed, of the expert whose rows are the largest."""
        return max(map(self.row_bytes, range(self.experts)))

    @property
    def row_bytes_in_all(self) -> int:
        """Bytes of one row of all experts, uncompressed."""
        return sum(map(self.row_bytes, range(self.experts)))

    def chunk_bytes(self, expert: int = 0) -> int | None:
        """Bytes of every encoded chunk of `expert` if the codec is `none`; else None, as sizes differ."""
        return self.chunk_rows * self.row_bytes(expert) if self.codec == "none" else None

    @property
    def value_bytes(self) -> int:
        """Bytes of all rows of all experts, uncompressed."""
        return self.rows * self.row_bytes_in_all

    @property
    def shards(self) -> int:
        """Number of shards per expert."""
        return -(-self.rows // self.shard_rows)

    @property
    def chunks_per_shard(self) -> int:
        return self.shard_rows // self.chunk_rows

    def shard_range(self, shard: int) -> range:
        """The rows that `shard` holds; the last shard may hold fewer than `shard_rows`."""
        return range(shard * self.shard_rows, min(self.rows, (shard + 1) * self.shard_rows))

    def shard_file(self, expert: int, shard: int) -> str:
        """Path of a shard, relative to the cache. Keys are flat, so all shards of an expert are in one directory."""
        return f"{MAPS}/expert_{expert}/c.{shard}.0.0.0"

    @property
    def fingerprint(self) -> str:
        """Identity of the values, not of the bytes: sha256 of canonical JSON (rule 2.4 of docs/cache-format.md)."""
        return sha256(canonical_json({"inputs": self.fingerprint_inputs, "dtype": self.dtype}))

    @property
    def layout(self) -> dict[str, Any]:
        return {
            "codec": self.codec,
            "chunk_rows": self.chunk_rows,
            "shard_rows": self.shard_rows,
            "dtype": self.dtype,
            "index": "start",
        }

    def record(self, files: Mapping[str, tuple[int, str]]) -> bytes:
        """The commit record, `cache.json`, for `files`: relative path -> (bytes, sha256).

        Raises CacheError `spec` if it is longer than `MAX_RECORD_BYTES`.
        """
        body: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "fingerprint_inputs": self.fingerprint_inputs,
            "layout": self.layout,
            "experts": [{"shape": [self.rows, *shape]} for shape in self.maps],
            "rows": self.rows,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
            "provenance": self.provenance,
        }
        body["self"] = sha256(canonical_json(body))
        record = canonical_json(body)
        if len(record) > MAX_RECORD_BYTES:
            raise CacheError(
                "spec", f"{RECORD}: must be at most {MAX_RECORD_BYTES} bytes; got {len(record)}; make shards larger"
            )
        return record


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit record as read: the spec, and for every other file its path -> (bytes, sha256)."""

    spec: CacheSpec
    files: Mapping[str, tuple[int, str]]


def _count(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"a whole number from {least} to 2**63 - 1 expected; got {value!r}")
    return value


def _digest(value: Any) -> str:
    """`value`, checked to be a sha256: the block cache uses it as the name of a folder."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"a sha256 expected; got {value!r}")
    return value


def _check_shards(spec: CacheSpec, files: Mapping[str, tuple[int, str]]) -> None:
    """Raises ValueError unless `files` lists every shard of `spec`, each large enough for its index."""
    if spec.experts * spec.shards > len(files):  # first, because a hostile record can claim billions of shards
        raise ValueError("not every shard is named")
    for expert in range(spec.experts):
        for shard in range(spec.shards):
            name = spec.shard_file(expert, shard)
            if name not in files:
                raise ValueError(f"{name} is not named")
            if files[name][0] < 16 * spec.chunks_per_shard:
                raise ValueError(f"{name} is too small for its index")


def parse_record(data: bytes) -> Commit:
    """The commit record in `data`, checked against its own digest.

    Raises CacheError: `newer-format` for a later format, `damaged` for any other record that does not follow section
    2 of docs/cache-format.md, `full` if there is not enough memory.
    """
    way_out = "restore the cache from a copy, or run h2t extract again"
    try:
        body = json.loads(data)
        version = body["format"]
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError("format is not a positive whole number")
        if version > FORMAT:
            raise CacheError(
                "newer-format", f"{RECORD}: format {version}; this version reads formats up to {FORMAT}; update h2t"
            )
        claimed = body.pop("self")
        if sha256(canonical_json(body)) != claimed or canonical_json({**body, "self": claimed}) != data:
            raise ValueError("its own sha256 does not match")
        layout = body["layout"]
        if layout["index"] != "start":
            raise ValueError(f"layout.index must be 'start'; got {layout['index']!r}")
        maps = []
        for expert in body["experts"]:
            rows, channels, height, width = (_count(n) for n in expert["shape"])
            if rows != body["rows"]:
                raise ValueError("experts have different numbers of rows")
            maps.append((channels, height, width))
        spec = CacheSpec(
            rows=_count(body["rows"]),
            maps=tuple(maps),
            dtype=str(layout["dtype"]),
            codec=str(layout["codec"]),
            chunk_rows=_count(layout["chunk_rows"]),
            shard_rows=_count(layout["shard_rows"]),
            fingerprint_inputs=dict(body["fingerprint_inputs"]),
            provenance=dict(body["provenance"]),
        )
        if spec.fingerprint != body["fingerprint"]:
            raise ValueError("the fingerprint does not match its inputs")
        files = {name: (_count(v["bytes"], least=0), _digest(v["sha256"])) for name, v in body["files"].items()}
        for name in files:
            if "\\" in name or not name.isprintable() or {"", ".", ".."} & set(name.split("/")):
                raise ValueError(f"{name!r} is not the name of a file in the cache")
        _check_shards(spec, files)
    except MemoryError:
        raise CacheError("full", f"{RECORD}: not enough memory to read its {len(data)} bytes; free some") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError("damaged", f"{RECORD}: not a valid commit record ({error}); {way_out}") from None
    return Commit(spec, files)

"""Targets in `cache/`: the commit record, the row table, shard indices, chunks."""

import io
import json
import re
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from builders import make_rows, make_spec, table_bytes, table_in
from fuzz import mutation
from fuzz.oracle import Finding
from fuzz.target import Parse, Target

from h2t.cache.errors import CacheError
from h2t.cache.format import shard
from h2t.cache.format.codecs import CODECS, codec
from h2t.cache.format.spec import CacheSpec, canonical_json, parse_record, sha256

NAMES = ["cache.json", "rows.parquet", "maps.zarr/expert_0/c.0.0.0.0", "maps.zarr/zarr.json", "../up", "/etc/passwd"]
KEYS = ["format", "fingerprint", "layout", "experts", "rows", "files", "provenance", "self", "shape", "codec", "dtype",
        "chunk_rows", "shard_rows", "index", "bytes", "sha256", *NAMES]  # fmt: skip


# The commit record.


def _record(spec: CacheSpec) -> bytes:
    names = [spec.shard_file(e, s) for e in range(spec.experts) for s in range(spec.shards)]
    return spec.record(dict.fromkeys(["rows.parquet", *names], (1000, "0" * 64)))


def _record_seeds() -> list[bytes]:
    two = make_spec(maps=((2, 3, 4), (5, 1, 1)), codec="zstd", chunk_rows=2, shard_rows=4)
    return [_record(s) for s in (make_spec(), two, make_spec(rows=1, dtype="bfloat16", provenance={"classes": ["a"]}))]


def resealed(body: Any) -> bytes:
    """The record `body` with a fingerprint and a digest of its own that are right, as a hostile author makes it."""
    body = dict(body)
    body.pop("self", None)
    if isinstance(body.get("layout"), dict):
        body["fingerprint"] = sha256(
            canonical_json({"inputs": body.get("fingerprint_inputs"), "dtype": body["layout"].get("dtype")})
        )
    return canonical_json({**body, "self": sha256(canonical_json(body))})


def _mutated_record(data: bytes, random: Random) -> bytes:
    body = mutation.tree(json.loads(data), random, KEYS)
    return resealed(body) if random.random() < 0.8 else mutation.as_json(body)


def _open_record(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        commit = parse_record(data)
        for name, (size, digest) in commit.files.items():
            if not Path("/c", name).resolve().is_relative_to("/c/"):
                raise Finding(f"a name outside of the cache: {name!r}")
            if size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
                raise Finding(f"no size and digest of a file: {size} {digest!r}")
        claimed = sum(size for size, _ in commit.files.values())
        if commit.spec.experts * commit.spec.shards > len(commit.files) or commit.spec.chunks_per_shard > claimed:
            raise Finding("a spec that its files cannot hold")
        return commit

    return parse


# The row table: expected rows, uint32, then Parquet.


def _rows_seeds() -> list[bytes]:
    return [struct.pack("<I", n) + table_bytes(make_rows(n)) for n in (1, 3, 11)]


def _parquet(table: pa.Table, random: Random) -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression=random.choice(["none", "zstd", "snappy", "gzip"]),
        use_dictionary=random.random() < 0.7,
        row_group_size=random.choice([1, 7, 10**6]),
        write_statistics=random.random() < 0.5,
    )
    return sink.getvalue()


def mutated_table(table: pa.Table, random: Random) -> pa.Table:
    """`table` with a column of other values, type, name or none; or with other rows."""
    at = random.randrange(table.num_columns)
    name, column = table.schema.names[at], table.column(at)
    kind = random.randrange(8)
    if kind == 0:
        return table.remove_column(at)
    if kind == 1:
        return table.append_column(random.choice([name, "x", "row"]), column)
    if kind == 2:
        return table.take(
            pa.array([random.randrange(len(table)) for _ in range(random.choice([0, 1, len(table), 99]))])
        )
    if kind == 3:
        value = random.choice([None, *mutation.TEXTS, *mutation.NUMBERS])
        return table.set_column(at, name, pa.array([value] * len(table)))
    if kind == 4:
        values = column.to_pylist()
        values[random.randrange(len(values))] = random.choice([None, *mutation.TEXTS, *mutation.NUMBERS])
        return table.set_column(at, table.schema.field(at), pa.array(values, column.type))
    if kind == 5:  # few bytes that say much
        value = "A" * random.choice([10**3, 10**5])
        return table.set_column(at, name, pa.array([value] * len(table)))
    if kind == 6:
        types = [pa.int8(), pa.int64(), pa.uint64(), pa.float64(), pa.string(), pa.binary(), pa.large_string()]
        return table.set_column(at, name, column.cast(random.choice(types)))
    return table.set_column(
        at, name, column.dictionary_encode() if random.random() < 0.5 else pa.array([[1]] * len(table))
    )


def mutated_parquet(data: bytes, random: Random) -> bytes:
    """A Parquet file of a changed table, or with changed bytes in its footer, which says where everything lies."""
    if random.random() < 0.15:
        try:
            return _parquet(mutated_table(pq.ParquetFile(pa.BufferReader(data)).read(), random), random)
        except (pa.ArrowException, OSError):
            pass
    length = int.from_bytes(data[-8:-4], "little")
    start = max(0, len(data) - 8 - length)
    if random.random() < 0.7:
        return data[:start] + mutation.raw(data[start:-8], random) + data[-8:]
    return mutation.raw(data[:start], random) + data[start:]


def _mutated_rows(data: bytes, random: Random) -> bytes:
    count = struct.pack("<I", random.choice([0, 1, 11, 2**31, 2**32 - 1])) if random.random() < 0.1 else data[:4]
    return count + mutated_parquet(data[4:], random)


def _open_rows(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        expected = int.from_bytes(data[:4], "little")
        table = table_in(data[4:], expected)
        if len(table) != expected or any(column.null_count for column in table.columns):
            raise Finding(f"{len(table)} rows where {expected} were asked for, or missing values")
        return table.to_pylist() if expected < 1000 else table

    return parse


# A shard index: slots and used, uint16, size of the shard, uint64, then the index.


def _index_seeds() -> list[bytes]:
    found = []
    for slots, sizes in ((1, [5]), (4, [1, 9, 3, 8]), (8, [7, 7, 7]), (64, [40] * 50)):
        whole = shard.join([bytes(n) for n in sizes], slots)
        found.append(struct.pack("<HHQ", slots, len(sizes), len(whole)) + whole[: shard.index_bytes(slots)])
    return found


def _mutated_index(data: bytes, random: Random) -> bytes:
    head, body = bytearray(data[:12]), data[12 : -shard.CRC_BYTES]
    if random.random() < 0.3:
        at = random.choice([0, 2])
        struct.pack_into("<H", head, at, random.choice([0, 1, 4, 8, 64, 65535]))
    elif random.random() < 0.3:
        struct.pack_into("<Q", head, 4, random.choice([0, 1, 100, 2**31, 2**63 - 1, 2**63, 2**64 - 1]))
    else:
        body = mutation.raw(body, random)
    return bytes(head) + (shard.sealed(body) if random.random() < 0.9 else body + data[-4:])


def _open_index(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        slots, used, size = struct.unpack("<HHQ", data[:12].ljust(12, b"\0"))
        offsets, sizes = shard.parse_index(data[12:], slots, min(used, slots), size)
        for offset, length in zip(offsets.tolist(), sizes.tolist(), strict=True):
            if offset < 0 or length < 0 or offset + length > size:
                raise Finding(f"a chunk outside of its shard: {offset} {length} of {size}")
        return offsets

    return parse


# A chunk: codec, uint8, and payload.

SHAPE = (4, 3, 2, 2)
CODEC_NAMES = sorted(CODECS)


def _chunk_seeds() -> list[bytes]:
    values = np.random.default_rng(0).integers(0, 3, SHAPE).astype("<f2")
    found = [bytes([i]) + codec(name).encode(values) for i, name in enumerate(CODEC_NAMES)]
    bombs = [
        bytes([i]) + codec(name).encode(np.zeros(2**20, "<f2")) for i, name in enumerate(CODEC_NAMES) if name != "none"
    ]
    return found + bombs


def _open_chunk(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        out = np.zeros(SHAPE, "<f2")
        try:
            codec(CODEC_NAMES[(data[0] if data else 0) % len(CODEC_NAMES)]).decode(memoryview(data)[1:], out)
        except (ValueError, RuntimeError) as error:  # what the reader expects of a codec
            raise CacheError("damaged", f"chunk 0: cannot be decoded ({error})") from None
        return out

    return parse


TARGETS = [
    Target(
        "record", "cache/format/spec.py: parse_record", _open_record, _record_seeds, mutation.mostly(_mutated_record)
    ),
    Target(
        "rows", "cache/format/rows.py: read_table", _open_rows, _rows_seeds, mutation.mostly(_mutated_rows, 0.95), 16384
    ),
    Target("index", "cache/format/shard.py: parse_index", _open_index, _index_seeds, mutation.mostly(_mutated_index)),
    Target("chunk", "cache/format/codecs.py: decode", _open_chunk, _chunk_seeds, mutation.raw),
]

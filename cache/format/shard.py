"""The bytes of a shard: an index, then the chunks, each followed by its crc32c (Zarr v3 sharding, index at the start).

The writer builds shards with this module; the reader parses their indices with it.
"""

from collections.abc import Sequence

import numpy as np
from crc32c import crc32c

from h2t.cache.errors import CacheError

CRC_BYTES = 4
MAX_BYTES = 2**63 - 1  # of a file, because offsets and sizes become int64
EMPTY = np.uint64(2**64 - 1)  # offset and size of a chunk beyond the end of the array


def index_bytes(slots: int) -> int:
    """Size in bytes of the index of a shard with `slots` chunk slots, its checksum included."""
    return 16 * slots + CRC_BYTES


def sealed(payload: bytes | memoryview) -> bytes:
    """A chunk as stored: its encoded bytes followed by their crc32c, 4 bytes, little endian."""
    checksum: int = crc32c(payload)
    return bytes(payload) + checksum.to_bytes(CRC_BYTES, "little")


def _index(sizes: np.ndarray, slots: int) -> bytes:
    table = np.full((slots, 2), EMPTY, "<u8")
    table[: len(sizes), 0] = index_bytes(slots) + np.cumsum(sizes) - sizes
    table[: len(sizes), 1] = sizes
    return sealed(table.tobytes())


def join(chunks: Sequence[bytes], slots: int) -> bytes:
    """A shard with `slots` chunk slots that holds the encoded `chunks` (without checksums), in order."""
    return lay_out([sealed(chunk) for chunk in chunks], slots)


def lay_out(stored: Sequence[bytes | memoryview], slots: int) -> bytes:
    """A shard with `slots` chunk slots that holds the `stored` chunks (with checksums), in order."""
    return b"".join([_index(np.array([len(c) for c in stored], np.uint64), slots), *stored])


def join_plain(chunks: np.ndarray, slots: int) -> memoryview:
    """The same shard as `join`, for uncompressed chunks of equal size; `chunks` is (chunks, bytes) uint8.

    Several times faster than `join`: one array operation copies all chunks, into memory that nobody clears first.
    """
    count, size = chunks.shape
    shard = np.empty(index_bytes(slots) + count * (size + CRC_BYTES), np.uint8)
    shard[: index_bytes(slots)] = np.frombuffer(_index(np.full(count, size + CRC_BYTES, np.uint64), slots), np.uint8)
    body = shard[index_bytes(slots) :].reshape(count, size + CRC_BYTES)
    body[:, :size] = chunks
    sums = np.fromiter((crc32c(row.data) for row in chunks), "<u4", count)
    body[:, size:] = sums.view(np.uint8).reshape(count, CRC_BYTES)
    return shard.data


def parse_index(
    data: bytes, slots: int, used: int, shard_bytes: int, chunk_bytes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and stored sizes in bytes, two int64 arrays of length `used`, of the chunks of a shard.

    `data` is the index of a shard of `shard_bytes` bytes with `slots` chunk slots, of which the first `used` are in
    use. `chunk_bytes` is the size of every encoded chunk if the codec fixes it. Raises CacheError `damaged` unless the
    checksum is right and the chunks fill the rest of the shard in order, without gap or overlap: a duplicate or
    swapped entry would give wrong rows.
    """
    if len(data) != index_bytes(slots):
        raise CacheError("damaged", f"shard index: {index_bytes(slots)} bytes expected; got {len(data)}")
    body = memoryview(data)[:-CRC_BYTES]
    if crc32c(body) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise CacheError("damaged", "shard index: crc32c mismatch")
    table = np.frombuffer(body, "<u8").reshape(slots, 2)
    if (table[used:] != EMPTY).any():
        raise CacheError("damaged", "shard index: lists chunks beyond the array's end")
    table = table[:used]
    if (table == EMPTY).any():
        raise CacheError("damaged", f"shard index: chunk {int(np.argmax((table == EMPTY).any(1)))} is missing")
    limit = np.uint64(min(shard_bytes, MAX_BYTES))
    if ((table[:, 0] > limit) | (table[:, 1] > limit - np.minimum(table[:, 0], limit))).any():
        raise CacheError("damaged", f"shard index: a chunk lies outside the shard's {shard_bytes} bytes")
    offsets, sizes = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    ends = offsets + sizes
    misplaced = offsets != np.append(index_bytes(slots), ends[:-1])
    if misplaced.any():
        place = int(np.argmax(misplaced))
        raise CacheError("damaged", f"shard index: chunk {place} does not follow the one before it")
    if ends[-1] != shard_bytes:
        raise CacheError("damaged", f"shard index: chunks end at byte {ends[-1]}, the shard at {shard_bytes}")
    if chunk_bytes is not None and (sizes != chunk_bytes + CRC_BYTES).any():
        place = int(np.argmax(sizes != chunk_bytes + CRC_BYTES))
        raise CacheError(
            "damaged", f"shard index: chunk {place} must have {chunk_bytes + CRC_BYTES} bytes; got {sizes[place]}"
        )
    return offsets, sizes


def holds(stored: memoryview | bytes) -> bool:
    """True if the checksum at the end of a stored chunk matches its encoded bytes."""
    view = memoryview(stored)
    return len(view) >= CRC_BYTES and crc32c(view[:-CRC_BYTES]) == int.from_bytes(view[-CRC_BYTES:], "little")

"""Turns the maps of a shard into the bytes of its files."""

from collections.abc import Iterator, Sequence

import numpy as np

from h2t.cache.errors import CacheError
from h2t.cache.format import shard as shard_layout
from h2t.cache.format.codecs import codec
from h2t.cache.format.spec import CacheSpec


def encoded(spec: CacheSpec, shard: int, maps: Sequence[np.ndarray]) -> Iterator[bytes | memoryview]:
    """The bytes of `shard` for each expert, made one at a time.

    `maps` holds one array per expert, (rows of the shard, C, H, W), in the spec's dtype (bfloat16 as uint16 bits).
    Raises CacheError `out-of-range` or `mismatch` at once if they do not fit.
    """
    if not 0 <= shard < spec.shards:
        raise CacheError("out-of-range", f"shard: must be 0 to {spec.shards - 1}; got {shard}")
    if len(maps) != spec.experts:
        raise CacheError(
            "mismatch", f"shard {shard}: one array per expert expected, {spec.experts} in all; got {len(maps)}"
        )
    return (_encoded(spec, shard, expert, array) for expert, array in enumerate(maps))


def _encoded(spec: CacheSpec, shard: int, expert: int, array: np.ndarray) -> bytes | memoryview:
    expected = (len(spec.shard_range(shard)), *spec.maps[expert])
    if array.shape != expected or array.dtype != spec.stored_dtype:
        raise CacheError(
            "mismatch",
            f"shard {shard}, expert {expert}: {spec.stored_dtype} {expected} expected; got {array.dtype} {array.shape}",
        )
    missing = -len(array) % spec.chunk_rows  # the last chunk of the last shard is padded with zero rows
    if missing:
        array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
    array = np.ascontiguousarray(array)
    if spec.codec == "none":
        chunks = array.reshape(len(array) // spec.chunk_rows, -1).view(np.uint8)
        return shard_layout.join_plain(chunks, spec.chunks_per_shard)
    encode = codec(spec.codec).encode
    chunks_encoded = [encode(array[i : i + spec.chunk_rows]) for i in range(0, len(array), spec.chunk_rows)]
    return shard_layout.join(chunks_encoded, spec.chunks_per_shard)

"""Pooled copies: caches in the same format with the same rows, and maps of (C, 1, 1) in float32."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.format.card import card
from h2t.cache.format.rows import GROUP_ROWS
from h2t.cache.format.spec import CacheSpec, chunk_rows_for, shard_rows_for, to_float32
from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.cache.write import parts
from h2t.cache.write.parts import Part
from h2t.cache.write.target import Whole, target_at

Pool = Callable[[np.ndarray], np.ndarray]

WORKERS = min(4, os.cpu_count() or 1)  # at most; fewer if memory is short
SHARD_BYTES = 64 * 1024 * 1024
#: Stored bytes of the maps pooled together. Every shard starts a new block, and the block size depends only on the
#: cache, so each attempt pools a row together with the same rows.
BLOCK_BYTES = 16 * 1024 * 1024


def pooled(
    cache: Cache,
    out: str | Path,
    pool: Pool,
    pool_name: str,
    *,
    codec: str = "none",
    shard_bytes: int = SHARD_BYTES,
    token: Mapping[str, Any] | None = None,
    replace: bool = False,
    part: Part | None = None,
    commit: bool = False,
    progress: Callable[[int], None] | None = None,
) -> CacheSpec:
    """Writes the pooled copy of `cache` to the path or URL `out`, unless it is already there; returns its spec.

    `pool` maps float32 (n, C, H, W) to (n, C') and is called from several threads. `pool_name` names it and its
    parameters and is part of the fingerprint (format rule 2.5). An interrupted copy is resumed only if `token` is
    unchanged; it should hold whatever else affects the values, such as a library's version. With `part` only its
    shards are written, beside other processes, and the copy appears when a call with `commit`, which pools nothing,
    finds all shards (`cache.write.parts`). `progress` is called after each shard with its number of rows. Raises
    CacheError: `exists`, `busy`, `full`, `unwritable`, `mismatch`, `incomplete`, and whatever reading `cache` raises.
    """
    parent = cache.spec
    maps = tuple((_pooled(cache, pool, e, 0, 1).shape[1], 1, 1) for e in range(cache.experts))
    row_bytes = 4 * max(channels for channels, _, _ in maps)
    chunk_rows = chunk_rows_for(row_bytes)
    spec = CacheSpec(
        rows=parent.rows,
        maps=maps,
        dtype="float32",
        codec=codec,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows_for(row_bytes, chunk_rows, shard_bytes),
        fingerprint_inputs={**_backbone(parent), "pool": pool_name, "parent": parent.fingerprint},
        provenance={**parent.provenance, "pool": pool_name, "pooled_with": {"numpy": np.__version__}},
    )
    target = target_at(out)
    have = target.committed()
    if have and not replace:
        if (have.fingerprint, have.layout) == (spec.fingerprint, spec.layout):
            target.staging().clear_remains()
            return have
        raise CacheError("exists", f"{target}: holds another cache; remove it or pass --replace")
    block = max(1, BLOCK_BYTES // parent.largest_row_bytes)
    same = {"block_rows": block, "numpy": np.__version__, **(token or {})}

    with target.held(part) as staging:
        if commit:
            same = parts.written_with(staging)
            pooled_with = {"numpy": same.get("numpy")}
            spec = replaced(spec, provenance={**spec.provenance, "pooled_with": pooled_with})
        writer, pending = target.opened(staging, spec, RowsOf(cache), same, part, commit=commit)

        def shard(number: int) -> None:
            rows = spec.shard_range(number)
            arrays = [np.empty((len(rows), *shape), np.float32) for shape in spec.maps]
            for expert, array in enumerate(arrays):
                for start in range(rows.start, rows.stop, block):
                    stop = min(start + block, rows.stop)
                    vectors = _pooled(cache, pool, expert, start, stop)
                    if vectors.shape[1] != array.shape[1]:
                        raise CacheError(
                            "mismatch",
                            f"pool {pool_name}: must give every row as many channels as the first, {array.shape[1]}; "
                            f"got {vectors.shape[1]}; correct the pool",
                        )
                    array[start - rows.start : stop - rows.start, :, 0, 0] = vectors
            writer.write(number, arrays)
            if progress:
                progress(len(rows))

        # A worker holds a shard, its encoded copy, and a block once in the parent's dtype and twice in float32.
        own = 2 * spec.shard_rows * spec.row_bytes_in_all + 5 * BLOCK_BYTES
        workers = max(1, min(WORKERS, available_memory() // (2 * own)))
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(shard, pending))
        if isinstance(writer, Whole):
            writer.take_over(read=False)
            writer.commit(cache.statistics, card(spec, cache.index.counts), replace=replace)
    return spec


@dataclass(frozen=True)
class RowsOf:
    """The row table of `cache`, read in pieces (`cache.write.writer.Rows`)."""

    cache: Cache

    def __len__(self) -> int:
        return self.cache.spec.rows

    def groups(self) -> Iterator[pa.Table]:
        for start in range(0, len(self), GROUP_ROWS):
            yield self.cache.lines(np.arange(start, min(start + GROUP_ROWS, len(self))))


def _backbone(parent: CacheSpec) -> dict[str, Any]:
    """The parent's entry about its backbone, so that the copy alone tells which backbone made it."""
    return {k: v for k, v in parent.fingerprint_inputs.items() if k == "backbone"}


def _pooled(cache: Cache, pool: Pool, expert: int, start: int, stop: int) -> np.ndarray:
    maps = to_float32(cache.read(np.arange(start, stop), expert=expert), cache.spec.dtype)
    values = np.asarray(pool(maps), np.float32)
    if values.ndim == 4 and values.shape[2:] == (1, 1):
        values = values[:, :, 0, 0]
    if values.ndim != 2 or len(values) != len(maps):
        raise CacheError("mismatch", f"pool: must turn maps {maps.shape} into ({len(maps)}, C); got {values.shape}")
    return values

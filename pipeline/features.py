"""Maps from a cache as the tensors that heads train on: whole, or pooled as they stream in."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cache.prefetch import Meter
from cache.reader import Cache
from cache.spec import CacheSpec, canonical_json
from pipeline import plugins
from pipeline.errors import UserError
from pipeline.head import global_average
from pipeline.params import build

BLOCK_BYTES = 8 * 1024**2  # maps that are pooled are read in blocks of about this size

Pooling = Callable[[torch.Tensor], torch.Tensor]


def pool_label(pool: str, options: Mapping[str, Any]) -> str:
    """The name a pooled cache records: the pool, and its options, complete, where it has any."""
    full = build(plugins.load("pools", pool).Options, "pool_options", options).model_dump()
    return f"{pool} {canonical_json(full).decode()}" if full else pool


def identity_if_pooled(cache: Cache, label: str) -> Pooling | None:
    """None for a cache of whole maps; for a pooled copy what takes its (C, 1, 1) maps as the features they are.

    Raises UserError if the copy was pooled by anything but `label`.
    """
    found = cache.spec.fingerprint_inputs.get("pool")
    if found is None:
        return None
    if found != label:
        raise UserError(
            f"{cache.files}: is pooled already, by {found}; {label} is needed here: use the cache it was made from"
        )
    return global_average


def maps_fingerprint(spec: CacheSpec) -> str:
    """Identity of the maps behind the features: the parent's fingerprint for a pooled copy, else the cache's own."""
    return str(spec.fingerprint_inputs.get("parent", spec.fingerprint))


def to_tensor(maps: np.ndarray, dtype: str) -> torch.Tensor:
    """Stored maps as a tensor of their own dtype; `dtype` is the cache's (bfloat16 is stored as its bits)."""
    tensor = torch.from_numpy(maps)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


class FeatureReader:
    """Reads features of rows: maps as stored or, with `pooling` (channel-wise, without parameters), pooled to float32.

    Pooling as they are read leaves (C,) floats a row and expert in place of (C, H, W); (C, M) for M numbers a channel.
    """

    def __init__(self, cache: Cache, pooling: Pooling | None, meter: Meter | None = None) -> None:
        self.cache = cache
        self.pooling = pooling
        self.meter = meter or Meter()
        channels, height, width = cache.spec.maps[0]
        one = torch.zeros(1, channels, height, width)
        self.shape = tuple((pooling(one) if pooling else one).shape[1:])
        stored = to_tensor(np.empty(0, cache.spec.stored_dtype), cache.spec.dtype).dtype
        self.dtype = torch.float32 if pooling else stored

    @property
    def row_bytes(self) -> int:
        """Bytes of the features of one row, all experts."""
        return self.cache.experts * int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows` (n,), (E, n, C[, H, W])."""
        cache, spec = self.cache, self.cache.spec
        if self.pooling is None:  # straight into the result
            maps = np.empty((cache.experts, len(rows), *self.shape), spec.stored_dtype)
            for expert in range(cache.experts):
                cache.read(rows, out=maps[expert], expert=expert)
            out = to_tensor(maps, spec.dtype)
        else:
            out = torch.empty((cache.experts, len(rows), *self.shape), dtype=self.dtype)
            for expert in range(cache.experts):
                block = max(1, BLOCK_BYTES // spec.row_bytes(expert))
                for first in range(0, len(rows), block):
                    read = to_tensor(cache.read(rows[first : first + block], expert=expert), spec.dtype)
                    out[expert, first : first + block] = self.pooling(read.to(torch.float32))
        chunks = np.unique(rows // spec.chunk_rows)
        for expert in range(cache.experts):
            self.meter.bytes_read += int(cache.chunk_ranges(chunks, expert)[2].sum())
        return out


class FeatureTable:
    """Features of some rows in memory, gathered by row number. `values` is (E, n, C[, H, W]) for the n given `rows`.

    `rows` are ascending. With `hot`, another table, rows that it holds are found there.
    """

    def __init__(
        self,
        rows: np.ndarray,
        values: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device,
        hot: "FeatureTable | None" = None,
    ) -> None:
        self.rows = rows
        self._values = values
        self._dtype = dtype
        self._device = device
        self._hot = hot

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows` (..., B), each of which the table must hold, as (..., E, B, C[, H, W])."""
        return self._gather(rows).movedim(0, rows.ndim - 1).to(self._device, self._dtype)

    def _gather(self, rows: np.ndarray) -> torch.Tensor:
        """(E, *rows.shape, C[, H, W]) where and as it is kept."""
        if self._hot is None:
            return self._values[:, torch.from_numpy(np.searchsorted(self.rows, rows)).to(self._values.device)]
        out = self._values.new_empty((len(self._values), *rows.shape, *self._values.shape[2:]))
        hot = np.isin(rows, self._hot.rows)
        for table, here in ((self._hot, hot), (FeatureTable(self.rows, self._values, self._dtype, self._device), ~hot)):
            out[:, torch.from_numpy(here)] = table._gather(rows[here])
        return out

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

BLOCK_BYTES = 32 * 1024**2  # maps are read, checked and pooled in blocks of about this size

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
        out = torch.empty((self.cache.experts, len(rows), *self.shape), dtype=self.dtype)
        self.read_into(out, rows, np.arange(len(rows)))
        return out

    def read_into(self, out: torch.Tensor, rows: np.ndarray, places: np.ndarray) -> None:
        """Puts the features of `rows` (n,) at `places` (n,) of `out` (E, m, C[, H, W]), a block at a time."""
        cache = self.cache
        for expert in range(cache.experts):
            block = max(1, BLOCK_BYTES // cache.spec.row_bytes(expert))
            for first in range(0, len(rows), block):
                maps = to_tensor(cache.read(rows[first : first + block], expert=expert), cache.spec.dtype)
                place = torch.from_numpy(places[first : first + block])
                out[expert, place] = self.pooling(maps.to(torch.float32)) if self.pooling else maps
            chunks = np.unique(rows // cache.spec.chunk_rows)
            self.meter.bytes_read += int(cache.chunk_ranges(chunks, expert)[2].sum())


class FeatureTable:
    """Features of some rows in memory, gathered by row number. `values` is (E, n, C[, H, W]) for the n given `rows`."""

    def __init__(self, rows: np.ndarray, values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = rows
        self._values = values
        self._dtype = dtype
        self._device = device

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows` (..., B), each of which the table must hold, as (..., E, B, C[, H, W])."""
        place = torch.from_numpy(np.searchsorted(self._rows, rows)).to(self._values.device)
        found = self._values[:, place].movedim(0, place.dim() - 1)
        return found.to(self._device, self._dtype)

"""Maps from a cache as the tensors that heads train on: whole, or pooled as they stream in."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from h2t.cache.format.spec import CacheSpec, canonical_json
from h2t.cache.read.prefetch import Meter
from h2t.cache.reader import Cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.networks.classifier import global_average

CPU = torch.device("cpu")
BLOCK_BYTES = 8 * 1024**2  # maps that are pooled or go to a GPU are read in blocks of about this size

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


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on the CPU as the array that a cache stores; the same memory."""
    found: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


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

    def read(self, rows: np.ndarray, device: torch.device = CPU) -> torch.Tensor:
        """Features of `rows` (n,), (E, n, C[, H, W]), on `device`; the last may still be on their way to a GPU."""
        cache, spec = self.cache, self.cache.spec
        out = torch.empty((cache.experts, len(rows), *self.shape), dtype=self.dtype, device=device)
        chunks = np.unique(rows // spec.chunk_rows)
        at_once = self.pooling is None and device.type == "cpu"  # straight into the result
        for expert in range(cache.experts):
            block = max(1, len(rows) if at_once else BLOCK_BYTES // spec.row_bytes(expert))
            for first in range(0, len(rows), block):
                part = rows[first : first + block]
                self._fill(out[expert, first : first + len(part)], part, expert)
            self.meter.bytes_read += int(cache.chunk_ranges(chunks, expert)[2].sum())
        return out

    def _fill(self, into: torch.Tensor, rows: np.ndarray, expert: int) -> None:
        """Features of `rows` into `into` (n, C[, H, W])."""
        if self.pooling is not None:
            read = to_tensor(self.cache.read(rows, expert=expert), self.cache.spec.dtype)
            into.copy_(self.pooling(read.to(torch.float32)))
        elif into.is_cuda:  # fetches from pinned memory by itself
            staging = torch.empty(into.shape, dtype=into.dtype, pin_memory=True)
            self.cache.read(rows, out=to_array(staging), expert=expert)
            into.copy_(staging, non_blocking=True)
        else:
            self.cache.read(rows, out=to_array(into), expert=expert)


def first_not_finite(cache: Cache, rows: np.ndarray) -> str | None:
    """Which of `rows` (n,) is the first to hold NaN or infinity, in words; None if all maps are finite.

    Reads every map of `rows`, so it is for finding out what went wrong.
    """
    spec = cache.spec
    block = max(1, BLOCK_BYTES // max(spec.row_bytes(expert) for expert in range(spec.experts)))
    for first in range(0, len(rows), block):
        part = rows[first : first + block]
        finite = np.ones(len(part), bool)
        for expert in range(spec.experts):
            finite &= to_tensor(cache.read(part, expert=expert), spec.dtype).isfinite().flatten(1).all(1).numpy()
        if not finite.all():
            row = int(part[np.argmin(finite)])
            return f"row {row} ({cache.rows['source'][row].as_py()})"
    return None


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
        found = self._gather(rows)
        if self._device.type == "cuda" and not found.is_cuda:  # as they are kept, and without waiting
            found = found.pin_memory().to(self._device, non_blocking=True)
        return found.movedim(0, rows.ndim - 1).to(self._device, self._dtype)

    def _gather(self, rows: np.ndarray) -> torch.Tensor:
        """(E, *rows.shape, C[, H, W]) where and as it is kept."""
        if self._hot is None:
            return self._values[:, torch.from_numpy(np.searchsorted(self.rows, rows)).to(self._values.device)]
        flat, shape = rows.ravel(), self._values.shape
        out = self._values.new_empty((shape[0], len(flat), *shape[2:]))
        hot = np.isin(flat, self._hot.rows)
        for table, here in ((self._hot, hot), (FeatureTable(self.rows, self._values, self._dtype, self._device), ~hot)):
            places = np.flatnonzero(here)  # numbers: a mask would make a GPU wait
            out[:, torch.from_numpy(places).to(out.device)] = table._gather(flat[places])
        return out.view(shape[0], *rows.shape, *shape[2:])

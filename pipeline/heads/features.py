"""Reads maps of a cache as tensors to train on: whole maps, or features that are pooled as they are read."""

from collections.abc import Callable, Mapping, Sequence
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
from h2t.pipeline.networks.pool import Pool

CPU = torch.device("cpu")
BLOCK_BYTES = 8 * 1024**2  # block size for reading maps that are pooled or copied to a GPU

Pooling = Callable[[torch.Tensor], torch.Tensor]


def pool_label(pool: str, options: Mapping[str, Any]) -> str:
    """What a pooled cache records about its pool: the name, with all options if there are any. Raises UserError."""
    full = build(plugins.load("pools", pool).Options, "pool_options", options).model_dump()
    return f"{pool} {canonical_json(full).decode()}" if full else pool


def load_pool(pool: str, options: Mapping[str, Any], where: str, channels: int) -> Pool:
    """The pool plug-in `pool` for maps of so many `channels`; `where` is the place of `options` in params.yaml.

    Raises UserError for options that the pool does not accept.
    """
    module = plugins.load("pools", pool)
    kind = module.Pool
    if not issubclass(kind, Pool):  # a plug-in may define the methods alone
        kind = type("Pool", (kind, Pool), {})
    made: Pool = kind(build(module.Options, where, options), channels)
    return made


def identity_if_pooled(cache: Cache, label: str) -> Pooling | None:
    """For a pooled cache the pooling that turns its maps (C, 1, 1) into features (C,); None for a cache of whole maps.

    Raises UserError if the cache was not pooled by `label`.
    """
    recorded = cache.spec.fingerprint_inputs.get("pool")
    if recorded is None:
        return None
    if recorded != label:
        raise UserError(
            f"{cache.files}: pooled caches can be used with their own pool only; the cache was pooled by {recorded}, "
            f"got pool {label}; use the cache of whole maps that it was made from"
        )
    return global_average


def maps_fingerprint(spec: CacheSpec) -> str:
    """Fingerprint of the maps behind the features: the original cache's for a pooled copy, else the cache's own."""
    return str(spec.fingerprint_inputs.get("parent", spec.fingerprint))


def to_tensor(maps: np.ndarray, dtype: str) -> torch.Tensor:
    """Stored maps as a tensor of the cache's `dtype`, without a copy. NumPy has no bfloat16, so its bits are stored."""
    tensor = torch.from_numpy(maps)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """A CPU tensor as the array that a cache stores, without a copy: bfloat16 as uint16."""
    array: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class FeatureReader:
    """Reads rows as maps (C, H, W) in the stored dtype or, with `pooling`, as features (C,) or (C, M) in float32.

    `pooling` must commute with fusion: act on each channel separately, without trained parameters.
    """

    def __init__(self, cache: Cache, pooling: Pooling | None) -> None:
        self.cache = cache
        self.pooling = pooling
        self.meter = Meter()
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
        """Features of `rows` (n,) on `device`, (E, n, C[, H, W]). The last copies to a GPU may still be in flight."""
        cache, spec = self.cache, self.cache.spec
        out = torch.empty((cache.experts, len(rows), *self.shape), dtype=self.dtype, device=device)
        chunks = np.unique(rows // spec.chunk_rows)
        in_place = self.pooling is None and device.type == "cpu"  # the cache reads into the result itself
        for expert in range(cache.experts):
            block = max(1, len(rows) if in_place else BLOCK_BYTES // spec.row_bytes(expert))
            for first in range(0, len(rows), block):
                part = rows[first : first + block]
                self._fill(out[expert, first : first + len(part)], part, expert)
            self.meter.bytes_read += int(cache.chunk_ranges(chunks, expert)[2].sum())
        return out

    def _fill(self, into: torch.Tensor, rows: np.ndarray, expert: int) -> None:
        """Reads features of `rows` into `into`, (n, C[, H, W])."""
        if self.pooling is not None:
            read = to_tensor(self.cache.read(rows, expert=expert), self.cache.spec.dtype)
            into.copy_(self.pooling(read.to(torch.float32)))
        elif into.is_cuda:  # copies from pinned memory run while the next block is read
            staging = torch.empty(into.shape, dtype=into.dtype, pin_memory=True)
            self.cache.read(rows, out=to_array(staging), expert=expert)
            into.copy_(staging, non_blocking=True)
        else:
            self.cache.read(rows, out=to_array(into), expert=expert)


def first_not_finite(cache: Cache, rows: np.ndarray) -> str | None:
    """Describes the first of `rows` (n,) that holds NaN or infinity; None if all maps are finite.

    Reads every map of `rows`, so it is meant for finding the cause of an error.
    """
    spec = cache.spec
    block = max(1, BLOCK_BYTES // spec.largest_row_bytes)
    for first in range(0, len(rows), block):
        part = rows[first : first + block]
        finite = np.ones(len(part), bool)
        for expert in range(spec.experts):
            finite &= to_tensor(cache.read(part, expert=expert), spec.dtype).isfinite().flatten(1).all(1).numpy()
        if not finite.all():
            row = int(part[np.argmin(finite)])
            return f"row {row} ({cache.lines([row], ['source'])['source'][0].as_py()})"
    return None


class FeatureTable:
    """Features of some rows in memory, looked up by row number.

    `rows`: int64 (n,), ascending; `values`: their features (E, n, C[, H, W]). Rows in `hot`, a second table, are taken
    from there.
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
        # Runs of neighbouring rows, of which there are few if all rows are here: their first rows, less their places.
        borders = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        self._runs = rows[borders]
        self._ahead = self._runs - borders

    @property
    def device(self) -> torch.device:
        """Where the features are stored, which is where `gather` needs the places."""
        return self._values.device

    def find(self, rows: np.ndarray) -> list[np.ndarray]:
        """The places of `rows` for `gather`, int64 (n,) each: here, and with a hot set four arrays.

        These are where in `rows` those that lie here stand, their places, and the same for those in the hot set.
        """
        flat = rows.ravel()
        if self._hot is None:
            return [self._places(flat)]
        hot = np.isin(flat, self._hot.rows)
        here, there = np.flatnonzero(~hot), np.flatnonzero(hot)  # indices: a mask would make the CPU wait for the GPU
        return [here, self._places(flat[here]), there, self._hot._places(flat[there])]

    def _places(self, rows: np.ndarray) -> np.ndarray:
        """The places of `rows` (n,), which all lie in this table, int64."""
        places: np.ndarray = rows - self._ahead[np.searchsorted(self._runs, rows, side="right") - 1]
        return places

    def gather(self, places: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Features (..., E, B, C[, H, W]) of rows of `shape` (..., B), whose `places` were found before."""
        values = self._values
        if self._hot is None:
            features = values.index_select(1, places[0])
        else:
            here, own, there, hot = places
            features = values.new_empty((values.shape[0], len(here) + len(there), *values.shape[2:]))
            features.index_copy_(1, here, values.index_select(1, own))
            features.index_copy_(1, there, self._hot._values.index_select(1, hot))
        if self._device.type == "cuda" and not features.is_cuda:  # copied in the stored dtype, without waiting
            features = features.pin_memory().to(self._device, non_blocking=True)
        return features.unflatten(1, shape).movedim(0, len(shape) - 1).to(self._device, self._dtype)

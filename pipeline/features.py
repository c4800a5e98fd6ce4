"""Maps from a cache as the tensors that heads train on: whole, or pooled as they stream in."""

from collections.abc import Callable

import numpy as np
import torch

from cache.reader import Cache
from pipeline.progress import progress

BLOCK_BYTES = 64 * 1024**2

Pooling = Callable[[torch.Tensor], torch.Tensor]


def to_tensor(maps: np.ndarray, dtype: str) -> torch.Tensor:
    """Stored maps as float32; `dtype` is the cache's (bfloat16 is stored as its bits)."""
    tensor = torch.from_numpy(maps)
    return (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).to(torch.float32)


class FeatureTable:
    """Features of chosen cache rows in memory; `take` gathers them by row number.

    With `pooling` (channel-wise, without parameters) every map is pooled as it is read: (C,) floats a row and expert
    in place of (C, H, W).
    """

    def __init__(
        self,
        cache: Cache,
        rows: np.ndarray,
        pooling: Pooling | None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._place = np.full(cache.spec.rows, -1, np.int64)
        self._place[rows] = np.arange(len(rows))
        experts = []
        for expert in range(cache.experts):
            block = max(1, BLOCK_BYTES // cache.spec.row_bytes(expert))
            parts = []
            for first in progress(range(0, len(rows), block), "read cache", unit="block"):
                maps = to_tensor(cache.read(rows[first : first + block], expert=expert), cache.spec.dtype).to(dtype)
                parts.append(pooling(maps) if pooling else maps)
            experts.append(torch.cat(parts))
        self.values = torch.stack(experts).to(device)  # (E, rows, C[, H, W])

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Features of `rows` (..., B) as (..., E, B, C[, H, W])."""
        place = torch.from_numpy(self._place[rows]).to(self.values.device)
        return self.values[:, place].movedim(0, place.dim() - 1)

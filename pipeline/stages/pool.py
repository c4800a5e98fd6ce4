"""pool: a copy of a cache with one vector per row in place of a map, 25 to 64 times fewer numbers.

Whoever trains linear heads needs no more than this, so it is what a colleague pulls. The copy has the parent's rows and
names its backbone: it is a CACHE to train-classifier and evaluate like any other.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.reader import Cache
from h2t.cache.tools.pooled import pooled
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section, plugin
from h2t.pipeline.base.progress import progress
from h2t.pipeline.heads.features import load_pool, pool_label

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Params(Section):
    """Section `pool`: which pool, with its options, and the codec of the copy."""

    pool: Annotated[str, plugin("pools")] = "gap"
    pool_options: dict[str, Any] = {}
    codec: Literal["none", "zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"] = "none"


def run(
    params: Params, name: str, cache: Cache, out: Path, say: Callable[[str], None], *, replace: bool = False
) -> CacheSpec:
    """Pools `cache` into the cache `out`; continues a killed run.

    Raises CacheError (`exists`, `busy`, `full`), and UserError for a cache that is pooled already and for a pool that
    is trained or gives several numbers a channel.
    """
    if "pool" in cache.spec.fingerprint_inputs:
        raise UserError(f"{cache.files}: is pooled already; name the cache it was made from")
    of = {
        channels: load_pool(params.pool, params.pool_options, "pool.pool_options", channels)
        for channels, _, _ in cache.spec.maps
    }
    if any(not pool.commutes or pool.numbers != 1 for pool in of.values()):
        raise UserError(
            f"pool.pool: must act on each channel alone, without trained parts, and give one number; got {params.pool}"
        )

    def vectors(maps: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = of[maps.shape[1]]({}, torch.from_numpy(maps)).numpy()
        return found

    with progress(None, f"pool {name}", unit="row", total=cache.spec.rows, unit_scale=True) as bar:
        spec = pooled(
            cache,
            out,
            vectors,
            pool_label(params.pool, params.pool_options),
            codec=params.codec,
            token={"torch": version("torch")},
            replace=replace,
            progress=bar.update,
        )
    say(f"{name}: {spec.rows} rows, {cache.spec.value_bytes / 1e6:.1f} -> {spec.value_bytes / 1e6:.1f} MB -> {out}")
    return spec

"""pool: copies a cache with one vector per row in place of its maps, 25 to 64 times fewer numbers.

Linear classifiers need only these vectors, so this is the copy to share. It has the parent's rows and names its
backbone; train-classifier and evaluate accept it like any other cache.
"""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.reader import Cache
from h2t.cache.redaction import redacted
from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section, plugin
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.features import load_pool, pool_label

if TYPE_CHECKING:
    from h2t.cache.write.parts import Part

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Params(Section):
    """Section `pool`: the copy of each cache with one vector in place of a map."""

    pool: Annotated[str, plugin("pools")] = "gap"
    """The pool; one with trained parts cannot be used here."""
    pool_options: dict[str, Any] = {}
    """Options of the pool; see below."""
    codec: Literal["none", "zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"] = "none"
    """Compression of the copy."""


def run(
    params: Params,
    run: Run,
    cache: Cache,
    *,
    replace: bool = False,
    part: "Part | None" = None,
    commit: bool = False,
    to: str | Path | None = None,
) -> CacheSpec:
    """Pools `cache` into a new cache at `to`; resumes a killed run. Vectors are stored as maps (D, 1, 1), float32.

    `to` is a path or URL, by default `run.out`; `part` and `commit` are those of `cache.tools.pooled`. Raises
    CacheError (`exists`, `busy`, `full`, `incomplete`, `unreachable`), and UserError if `cache` is pooled already, or
    if the pool is trained or gives more than one number per channel.
    """
    # Every stage checks the section `pool`, so it imports this module, and need not load what writes caches.
    from h2t.cache.tools.pooled import pooled
    from h2t.cache.write.target import target_at

    if "pool" in cache.spec.fingerprint_inputs:
        raise UserError(f"{cache.files}: is pooled already; name the cache it was made from")
    of = {
        channels: load_pool(params.pool, params.pool_options, "pool.pool_options", channels)
        for channels, _, _ in cache.spec.maps
    }
    if any(not pool.commutes or pool.numbers != 1 for pool in of.values()):
        raise UserError(
            "pool.pool: must have no trained parts and give one number per channel, from that channel alone; "
            f"got {params.pool}; use gap, max or an untrained gem, or share the cache itself"
        )

    def vectors(maps: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pooled_maps: np.ndarray = of[maps.shape[1]]({}, torch.from_numpy(maps)).numpy()
        return pooled_maps

    out = to or run.out
    with progress(None, f"pool {run.name}", unit="row", total=cache.spec.rows, unit_scale=True) as bar:
        spec = pooled(
            cache,
            out,
            vectors,
            pool_label(params.pool, params.pool_options),
            codec=params.codec,
            token={"torch": version("torch")},
            replace=replace,
            part=part,
            commit=commit,
            progress=bar.update,
        )
    if part is not None and target_at(out).committed() != spec:
        done = f"{counted(len(part.shards(spec)), 'shard')} of {spec.shards:,}"
        run.say(f"{run.name}: part {part}, {done}, written; when all parts are, run the same command with --commit")
        return spec
    size = f"{sized(cache.spec.value_bytes)} -> {sized(spec.value_bytes)}"
    run.say(f"{run.name}: {counted(spec.rows, 'row')}, {size}, written to {redacted(str(out))}")
    return spec

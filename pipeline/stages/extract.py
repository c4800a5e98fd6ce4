"""extract: run the frozen backbone once over every image and store its last feature maps as a cache.

One forward pass per (sample, view, statistics). The unit of work is a shard: batches never straddle shards and every
forward pass runs at exactly `batch_size` images, so that a row does not depend on its neighbours and a run that was
killed goes on to the same bytes. Decoding, forward pass and writing overlap.
"""

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from cache.card import card
from cache.errors import CacheError
from cache.rows import make_rows
from cache.spec import CacheSpec, canonical_json, chunk_rows_for, sha256, shard_rows_for
from cache.staging import Staging
from cache.writer import CacheWriter, committed
from pipeline import batchnorm, cluster
from pipeline.batchnorm import Statistics
from pipeline.checkpoints import weights_digest
from pipeline.cluster import ADDRESS
from pipeline.device import choose
from pipeline.errors import UserError
from pipeline.images import Images
from pipeline.network import load_backbone
from pipeline.params import DISTINCT, Count, Positive, Section
from pipeline.progress import progress
from pipeline.recipes import stored
from pipeline.samples import Samples

TAP = "last maps before pooling"
HALF_MAX = 65504.0  # the largest float16


class Params(Section):
    """Section `extract`. Sizes in bytes; `chunk_rows` is chosen from the row's size unless given.

    `cluster`: null, local:N for N processes here, or the address of a dask scheduler; it changes no byte on the CPU.
    """

    batchnorm: Annotated[list[Literal["stage1", "calibrated", "branchwise", "reverse"]], DISTINCT] = [
        "stage1",
        "branchwise",
    ]
    batchnorm_passes: Count = 200
    max_views: Count = 1
    view_target: Positive = 1.0
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    codec: Literal["none", "zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"] = "none"
    chunk_rows: Count | None = None
    shard_bytes: Count = 128 * 1024**2
    batch_size: Count = 128
    cluster: Annotated[str | None, ADDRESS] = None


@dataclass(frozen=True)
class Summary:
    """What an extraction did; `forwarded` counts images that went through the backbone for rows."""

    rows: int
    value_bytes: int
    forwarded: int
    kept_shards: int
    shards: int


def views_per_class(counts: list[int], max_views: int, target: float) -> list[int]:
    """V_j = min(max_views, ceil(target * N / (C * n_j))): rare classes, drawn more often, get more views."""
    mean = sum(counts) / len(counts)
    return [min(max_views, math.ceil(target * mean / n)) for n in counts]


def row_table(params: Params, samples: Samples) -> pa.Table:
    """Every row of the cache, in cache order. Evaluation samples have view 0 only."""
    views = views_per_class(samples.counts, params.max_views, params.view_target)
    columns: dict[str, list[Any]] = {
        k: [] for k in ("sample", "view", "statistics", "split", "label", "source", "digest")
    }
    for sample in samples.table.to_pylist():
        train = sample["split"] == "train"
        for statistics in stored(list(params.batchnorm), sample["split"]):
            for view in range(views[sample["label"]] if train else 1):
                for key in ("sample", "split", "label", "source", "digest"):
                    columns[key].append(sample[key])
                columns["view"].append(view)
                columns["statistics"].append(statistics)
    return make_rows(columns)


def run(
    params: Params,
    name: str,
    samples: Samples,
    images: Images,
    backbone_dir: Path,
    seed: int,
    device: torch.device,
    out: Path,
    say: Callable[[str], None],
    *,
    replace: bool = False,
) -> Summary:
    """Extracts the maps of the backbone in `backbone_dir` into the cache `out`; continues a killed run.

    Raises CacheError (`exists`, `busy`, `full`) and UserError.
    """
    backbone, identity = load_backbone(backbone_dir)
    backbone.to(device)
    rows = row_table(params, samples)
    wanted = sorted(set(rows["statistics"].unique().to_pylist()))
    inputs = fingerprint_inputs(params, samples, identity, seed)
    token = _token(params, device)
    with Staging(out) as staging:
        existing = committed(out)
        if existing is not None and _same(existing, inputs, params, len(rows)):
            say(f"{name}: {out} already holds this cache ({existing.rows} rows); nothing to do")
            staging.discard()
            return Summary(existing.rows, existing.value_bytes, 0, existing.shards, existing.shards)
        if existing is not None and not replace:
            raise CacheError("exists", f"{out}: holds another cache; remove it, or pass --replace to write this one")
        statistics_bytes = _statistics(staging, params, wanted, backbone, samples, images, seed, device, inputs, token)
        inputs["batchnorm"]["statistics"] = sha256(statistics_bytes)
        spec = _spec(params, backbone, samples, len(rows), inputs, token, device)
        writer = CacheWriter(staging, spec, rows, token)
        pending = writer.pending
        _announce(spec, name, pending, out, say)
        work = _Work(params, rows, images, backbone, batchnorm.from_bytes(statistics_bytes), seed, device)
        before = weights_digest(dict(backbone.named_parameters()))
        job = _Job(params, rows, images, backbone_dir.resolve(), identity, statistics_bytes, seed, device, spec, token)
        _extract(work, writer, pending, name, job)
        if weights_digest(dict(backbone.named_parameters())) != before:
            raise UserError(
                f"{name}: the backbone's weights changed during extraction; its forward pass must not train"
            )
        writer.commit(statistics_bytes, card(spec, rows), replace=replace)
    forwarded = sum(len(spec.shard_range(s)) for s in pending)
    say(f"{name}: {spec.rows} rows in {spec.shards} shards, {spec.value_bytes / 1e6:.1f} MB of values -> {out}")
    return Summary(spec.rows, spec.value_bytes, forwarded, spec.shards - len(pending), spec.shards)


def fingerprint_inputs(params: Params, samples: Samples, identity: dict[str, Any], seed: int) -> dict[str, Any]:
    """All that decides the values, but for the statistics, which follow from it."""
    table = samples.table.select(["split", "label", "source", "digest"]).to_pydict()
    return {
        "backbone": {**identity, "tap": TAP},
        "batchnorm": {"recipes": sorted(params.batchnorm), "passes": params.batchnorm_passes, "seed": seed},
        "dataset": sha256(canonical_json(table)),
        "transform": samples.facts["transform"],
        "views": {"max": params.max_views, "target": params.view_target, "seed": seed},
    }


def _token(params: Params, device: torch.device) -> dict[str, Any]:
    """All that must be equal for two attempts to give the same bytes from the same fingerprint and layout."""
    return {
        "batch_size": params.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("numcodecs", "numpy", "pillow", "torch", "torchvision")},
    }


def layout(params: Params, row_bytes: int) -> tuple[int, int]:
    """Rows per chunk and per shard."""
    chunk_rows = params.chunk_rows or chunk_rows_for(row_bytes)
    return chunk_rows, shard_rows_for(row_bytes, chunk_rows, params.shard_bytes)


def _same(existing: CacheSpec, inputs: dict[str, Any], params: Params, rows: int) -> bool:
    """Whether `existing` is the cache that would be written. Its statistics follow from the other ingredients."""
    found = {k: dict(v) if isinstance(v, dict) else v for k, v in existing.fingerprint_inputs.items()}
    if not isinstance(found.get("batchnorm"), dict):
        return False
    found["batchnorm"].pop("statistics", None)
    have = (existing.codec, existing.dtype, (existing.chunk_rows, existing.shard_rows), existing.rows)
    return found == inputs and have == (
        params.codec,
        params.dtype,
        layout(params, max(existing.row_bytes(e) for e in range(existing.experts))),
        rows,
    )


def _statistics(
    staging: Staging,
    params: Params,
    wanted: list[str],
    backbone: nn.Module,
    samples: Samples,
    images: Images,
    seed: int,
    device: torch.device,
    inputs: dict[str, Any],
    token: dict[str, Any],
) -> bytes:
    """The batch-norm statistics, computed once and kept in staging for later attempts."""
    key = canonical_json({"inputs": inputs, "token": token})
    kept = staging.kept("batchnorm.safetensors")
    if kept is not None and staging.kept("batchnorm.json") == canonical_json({"of": sha256(key), "is": sha256(kept)}):
        return kept
    found = batchnorm.compute(
        backbone, wanted, samples, images, passes=params.batchnorm_passes, seed=seed, device=device
    )
    data = batchnorm.to_bytes(found)
    staging.keep("batchnorm.safetensors", data)
    staging.keep("batchnorm.json", canonical_json({"of": sha256(key), "is": sha256(data)}))
    return data


def _spec(
    params: Params,
    backbone: nn.Module,
    samples: Samples,
    rows: int,
    inputs: dict[str, Any],
    token: dict[str, Any],
    device: torch.device,
) -> CacheSpec:
    size = samples.transform.size
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, size, size, device=device))
    shapes = tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)
    itemsize = 4 if params.dtype == "float32" else 2
    chunk_rows, shard_rows = layout(params, max(math.prod(s) for s in shapes) * itemsize)
    return CacheSpec(
        rows=rows,
        maps=shapes,
        dtype=params.dtype,
        codec=params.codec,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        fingerprint_inputs=inputs,
        provenance={
            **token,
            "classes": list(samples.facts["classes"]),
            "counts": samples.counts,
            "dataset": samples.facts["dataset"],
        },
    )


def _announce(spec: CacheSpec, name: str, pending: list[int], out: Path, say: Callable[[str], None]) -> None:
    """Says what is about to be written, and refuses what the disk cannot hold."""
    share = sum(len(spec.shard_range(s)) for s in pending) / spec.rows
    needed = int(spec.value_bytes * share * 1.02) + 2**20
    free = shutil.disk_usage(out.parent).free
    kept = spec.shards - len(pending)
    resumed = f", {kept} of {spec.shards} shards kept from before" if kept else ""
    say(f"{name}: {spec.rows} rows, {spec.value_bytes / 1e6:.1f} MB of values{resumed}; {free / 1e9:.1f} GB free")
    if needed > free:
        raise CacheError(
            "full", f"{out}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make space or use a codec"
        )


@dataclass(frozen=True)
class _Work:
    """What turns rows into maps."""

    params: Params
    rows: pa.Table
    images: Images
    backbone: nn.Module
    statistics: Statistics
    seed: int
    device: torch.device

    def batches(self, shards: list[int], spec: CacheSpec) -> Iterator[tuple[int, str, pa.Table]]:
        """(shard, statistics, rows) of every forward pass, at most `batch_size` rows, in order."""
        for shard in shards:
            span = spec.shard_range(shard)
            part = self.rows.slice(span.start, len(span))
            names = np.array(part["statistics"])
            cuts = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(part)]
            for begin, end in pairwise(cuts):
                for first in range(begin, end, self.params.batch_size):
                    count = min(self.params.batch_size, end - first)
                    yield shard, str(names[first]), part.slice(first, count)

    def decode(self, part: pa.Table) -> torch.Tensor:
        """Input of one forward pass, always `batch_size` images: the last one is repeated to fill up."""
        samples, views = part["sample"].to_pylist(), part["view"].to_pylist()
        keys = [None if view == 0 else (self.seed, view) for view in views]
        missing = self.params.batch_size - len(samples)
        batch = self.images.batch(samples, keys)
        return torch.cat([batch, batch[-1:].expand(missing, -1, -1, -1)]) if missing else batch

    @torch.no_grad()
    def forward(self, x: torch.Tensor, statistics: str, count: int) -> list[torch.Tensor]:
        """Maps of the first `count` images, float32 on the CPU, one tensor per expert."""
        batchnorm.use(self.backbone, self.statistics[statistics])
        return [m[:count].cpu() for m in self.backbone(x.to(self.device))]

    def stored(self, maps: torch.Tensor) -> np.ndarray:
        """Maps in the storage dtype. Raises UserError for values it cannot hold."""
        if not torch.isfinite(maps).all():
            raise UserError("extract: the backbone gave NaN or infinity; check its weights and the images")
        if self.params.dtype == "float32":
            return maps.numpy()
        if self.params.dtype == "bfloat16":
            return maps.to(torch.bfloat16).view(torch.uint16).numpy()
        if float(maps.abs().max()) > HALF_MAX:
            raise UserError(
                f"extract.dtype: float16 holds values up to 65504; got {float(maps.abs().max()):.0f}; "
                "use bfloat16 or float32"
            )
        return maps.to(torch.float16).numpy()


@dataclass(frozen=True)
class _Job:
    """All that a worker of a cluster needs to compute shards as this process would."""

    params: Params
    rows: pa.Table
    images: Images
    backbone_dir: Path
    identity: dict[str, Any]
    statistics: bytes
    seed: int
    device: torch.device
    spec: CacheSpec
    token: dict[str, Any]

    def open(self, number: int) -> Callable[[int], list[np.ndarray]]:
        """Shard -> its maps, an array per expert. Raises UserError where they would come out with other bytes."""
        device = self.device
        device = choose(f"cuda:{number % torch.cuda.device_count()}") if device.type == "cuda" else device
        torch.set_num_threads(self.token["threads"])
        backbone, identity = load_backbone(self.backbone_dir)
        found = {**identity, **_token(self.params, device)}
        for key, value in {**self.identity, **self.token}.items():
            if found[key] != value:
                raise UserError(f"extract.cluster: {key} must be {value} on every worker; got {found[key]}")
        statistics = batchnorm.from_bytes(self.statistics)
        work = _Work(self.params, self.rows, self.images, backbone.to(device), statistics, self.seed, device)
        return lambda shard: next(_computed(work, self.spec, [shard], lambda rows: None))[1]


def _extract(work: _Work, writer: CacheWriter, pending: list[int], name: str, job: _Job) -> None:
    """Computes the shards here or on a cluster; another thread writes them."""
    spec = writer.spec
    total = sum(len(spec.shard_range(s)) for s in pending)
    row_bytes = sum(spec.row_bytes(e) for e in range(spec.experts))
    bar = progress(None, f"extract {name}", unit="row", total=total, unit_scale=True)

    def tick(rows: int) -> None:
        bar.update(rows)
        bar.set_postfix_str(f"{bar.n * row_bytes / 1e6:.0f} MB", refresh=False)

    far = work.params.cluster
    computed = cluster.shards(far, job, pending) if far else _computed(work, spec, pending, tick)
    with ThreadPoolExecutor(1, "write") as scribe, bar:
        writes: deque[Future[None]] = deque()
        for shard, maps in computed:
            if far:
                tick(len(spec.shard_range(shard)))
            writes.append(scribe.submit(writer.write, shard, maps))
            while len(writes) > 2:  # the bound on memory: three shards
                writes.popleft().result()
        for write in writes:
            write.result()


def _computed(
    work: _Work, spec: CacheSpec, pending: list[int], tick: Callable[[int], None]
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(shard, maps of each expert), in order. Forward passes in this thread; images are decoded ahead in another."""
    with ThreadPoolExecutor(1, "decode-ahead") as decoder:
        ahead: deque[tuple[int, str, int, Future[torch.Tensor]]] = deque()
        batches = work.batches(pending, spec)
        shard_maps: list[list[np.ndarray]] = [[] for _ in spec.maps]
        filled = 0
        while True:
            while len(ahead) < 3 and (item := next(batches, None)) is not None:
                shard, statistics, part = item
                ahead.append((shard, statistics, len(part), decoder.submit(work.decode, part)))
            if not ahead:
                break
            shard, statistics, count, decoded = ahead.popleft()
            for expert, maps in enumerate(work.forward(decoded.result(), statistics, count)):
                shard_maps[expert].append(work.stored(maps))
            filled += count
            tick(count)
            if filled == len(spec.shard_range(shard)):
                yield shard, [np.concatenate(m) for m in shard_maps]
                shard_maps, filled = [[] for _ in spec.maps], 0

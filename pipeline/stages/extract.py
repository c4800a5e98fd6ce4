"""extract: runs the frozen backbone once over every image and stores its last feature maps as a cache.

Each (sample, view, statistics) is one row and takes one forward pass, unless a previous cache has the row
(`extraction.reuse`). A resumed run keeps the finished shards, computes the others and ends with the same bytes.
Decoding, forward passes (`extraction.forward`) and writing overlap.
"""

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h2t.cache.errors import CacheError
from h2t.cache.format.card import card
from h2t.cache.format.spec import CacheSpec, canonical_json, chunk_rows_for, grown_shard_bytes, sha256, shard_rows_for
from h2t.cache.machine import cores
from h2t.cache.memory import available_memory
from h2t.cache.sizes import sized
from h2t.cache.write import parts
from h2t.cache.write.carry import Carrier, Source
from h2t.cache.write.parts import Part
from h2t.cache.write.target import AnyStaging, OfPart, Target, Whole, target_at
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction import batchnorm, cluster, forward, reuse
from h2t.pipeline.extraction.batchnorm import Statistics
from h2t.pipeline.extraction.row_plan import MOST_GROUPED, PlannedRows, planned, recorded_groups
from h2t.pipeline.extraction.settings import Params as Params  # every stage module has its `Params`
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.trained import BackboneFacts, backbone_facts, has_stored_weights, load_backbone

NUMBER = 2026112601  # other results, another number: docs/numbers.md
#: Most threads that write shards; each joins, digests and writes some 200 MB a second, a fast GPU makes 2 GB a second.
MOST_WRITERS = max(1, min(8, cores() // 2))

TAP = "last maps before pooling"  # where the backbone is cut; part of the fingerprint


@dataclass(frozen=True)
class Summary:
    """Counts and costs of an extraction.

    `forwarded`: rows computed by a forward pass; `taken`: rows copied from a previous cache; `kept_shards`: shards that
    an earlier attempt had finished. `forward_*`: cost of the forward passes of this process, in images and seconds
    (`forward.Passes`); 0 if they ran on a cluster, or if there were none.
    """

    fingerprint: str
    rows: int
    value_bytes: int
    forwarded: int
    taken: int
    kept_shards: int
    shards: int
    forward_images: int = 0
    forward_seconds: float = 0.0
    forward_cpu: float = 0.0


def views_per_class(counts: list[int], max_views: int, target: float) -> list[int]:
    """Views per training sample, by class: V_j = min(max_views, ceil(target N / (K n_j))), N samples in K classes.

    Rare classes get more views, as balanced samplers draw them more often.
    """
    mean = sum(counts) / len(counts)
    return [min(max_views, math.ceil(target * mean / n)) for n in counts]


def planned_rows(params: Params, samples: Samples) -> PlannedRows:
    """All rows of the cache. Evaluation samples have view 0 only."""
    views = views_per_class(samples.counts, params.max_views, params.view_target)
    return planned(samples.table, params.batchnorm, views)


def run(
    params: Params,
    run: Run,
    samples: Samples,
    images: Images,
    backbone_dir: Path,
    *,
    replace: bool = False,
    previous: Source | None = None,
    anew: bool = False,
    part: Part | None = None,
    commit: bool = False,
    to: str | Path | None = None,
) -> Summary:
    """Extracts the maps of the backbone in `backbone_dir` into the cache `to`; resumes a killed run.

    `to` is a path or URL, by default `run.out`. `previous` is the open cache that `extract.statistics_from` names.
    With `anew` its statistics are kept but no rows: all are computed, to the same bytes. With `part` only its shards
    are written, beside other processes, and the cache appears when a run with `commit`, which computes nothing, finds
    all shards. Raises CacheError (`exists`, `busy`, `full`, `damaged`, `mismatch`, `incomplete`, `unreachable`), and
    UserError if the backbone, images, previous cache or cluster cannot be used.
    """
    target = target_at(to or run.out)
    backbone, identity = load_backbone(backbone_dir)
    backbone.to(run.device)
    facts = backbone_facts(backbone_dir)
    asked, params = params, with_recipes_of(params, facts)
    if "batchnorm" in asked.model_fields_set and (left_out := set(asked.batchnorm) - set(params.batchnorm)):
        run.say(
            f"note: {run.name}: has no batch norm, so there is one set of statistics, stage1; left out: "
            + ", ".join(sorted(left_out))
        )
    samples = samples.with_input(facts.input)
    images = images.prepared_for(samples.transform)
    rows = planned_rows(params, samples)
    names = rows.plan.statistics
    inputs = fingerprint_inputs(params, samples, identity, run.seed)
    settings = forward.settings(params.batch_size, params.precision, run.device)
    kept: Statistics = {}
    if previous is not None:
        kept, lost = reuse.kept_statistics(previous, inputs, names)
        if lost:
            run.say(f"{run.name}: {lost}")
    origin: dict[str, Any] = rows.test_groups
    if rows.grouped and not origin:
        run.say(f"note: {run.name}: groups of more than {MOST_GROUPED:,} test images are not kept for intervals")
    if previous is not None and kept:
        origin = {**origin, "statistics_from": previous.spec.fingerprint}
    with target.held(part) as staging:
        existing = target.committed()
        if existing is not None and _same(existing, inputs, params, names, len(rows), kept, origin):
            run.say(f"{run.name}: {target} already holds this cache ({counted(existing.rows, 'row')}); nothing to do")
            staging.discard_if_alone()
            return _summary(existing, 0, 0, existing.shards, forward.Passes())
        if existing is not None and not replace:
            raise CacheError("exists", f"{target}: holds another cache; remove it, or pass --replace to write this one")

        if commit:
            asked_for = {"batch_size": params.batch_size, "precision": params.precision}
            settings = forward.written_with(staging, asked_for)

        def estimate(wanted: list[str]) -> Statistics:
            if commit:
                raise parts.no_parts(staging)
            return batchnorm.compute(
                backbone, wanted, samples, images, passes=params.batchnorm_passes, seed=run.seed, device=run.device
            )

        statistics = _statistics(staging, names, kept, estimate, {**inputs, "settings": settings})
        inputs["batchnorm"]["statistics"] = sha256(statistics)
        spec = _spec(params, backbone, samples, len(rows), inputs, {**settings, **origin}, run.device)
        writer, pending = target.opened(staging, spec, rows, settings, part, commit=commit)
        _announce(spec, run, pending, part, target)
        todo = {shard: np.array(spec.shard_range(shard)) for shard in pending}
        carrier = None
        if previous is not None and not anew and not commit:
            wanted = reuse.Wanted(rows, inputs, params.dtype, samples.facts["dataset"], settings)
            carrier, summary = reuse.carrier(previous, wanted, batchnorm.from_bytes(statistics), spec, pending)
            run.say(f"{run.name}: {summary}")
        if carrier is not None:
            todo = {shard: numbers[carrier.origin[numbers] < 0] for shard, numbers in todo.items()}
        job = forward.Job(
            rows.plan, todo, images, backbone_dir.resolve(), identity, statistics, run.seed, run.device, spec, settings
        )
        passes = forward.Passes()
        if params.cluster is not None and pending:
            _extract_there(params.cluster, job, _Sink(writer.beside(), carrier), run)
        else:
            _extract_here(job, backbone, _Sink(writer, carrier), passes, run)
        if not has_stored_weights(backbone, backbone_dir):
            raise UserError(
                f"{run.name}: the backbone's weights must not change during extraction; got other weights at its end; "
                f"make its forward pass leave its parameters alone; if {backbone_dir} was written anew, extract again"
            )
        if isinstance(writer, Whole):
            writer.take_over(read=False)
            writer.commit(statistics, card(spec, rows.plan.counts), replace=replace)
    forwarded = sum(len(numbers) for numbers in todo.values())
    taken = sum(len(spec.shard_range(shard)) for shard in pending) - forwarded
    if part is not None:
        done = f"{counted(len(part.shards(spec)), 'shard')} of {spec.shards:,}"
        run.say(f"{run.name}: part {part}, {done}, written; when all parts are: h2t extract ... --commit")
        return _summary(spec, forwarded, taken, len(part.shards(spec)) - len(pending), passes)
    what = f"{counted(spec.rows, 'row')} in {counted(spec.shards, 'shard')}, {sized(spec.value_bytes)} of values"
    run.say(f"{run.name}: {what}, written to {target}")
    return _summary(spec, forwarded, taken, spec.shards - len(pending), passes)


def with_recipes_of(params: Params, facts: BackboneFacts) -> Params:
    """The parameters with the batch-norm recipes that apply to the backbone, `stage1` alone if it has no batch norm."""
    given = "batchnorm" in params.model_fields_set
    if facts.batch_norm and (given or not facts.pretrained):
        return params
    passes = params.batchnorm_passes if facts.batch_norm else 0
    return params.model_copy(update={"batchnorm": ["stage1"], "batchnorm_passes": passes})


def _summary(spec: CacheSpec, forwarded: int, taken: int, kept: int, passes: forward.Passes) -> Summary:
    return Summary(
        fingerprint=spec.fingerprint,
        rows=spec.rows,
        value_bytes=spec.value_bytes,
        forwarded=forwarded,
        taken=taken,
        kept_shards=kept,
        shards=spec.shards,
        forward_images=passes.images,
        forward_seconds=round(passes.seconds, 3),
        forward_cpu=round(passes.cpu, 3),
    )


def fingerprint_inputs(params: Params, samples: Samples, identity: dict[str, Any], seed: int) -> dict[str, Any]:
    """Everything that determines the stored values, except the batch-norm statistics, which `run` adds."""
    return {
        "backbone": {**identity, "tap": TAP},
        "batchnorm": {"recipes": sorted(params.batchnorm), "passes": params.batchnorm_passes, "seed": seed},
        "dataset": samples.digest,
        "transform": samples.facts["transform"],
        "views": {"max": params.max_views, "target": params.view_target, "seed": seed},
    }


def layout(params: Params, row_bytes: int, rows: int) -> tuple[int, int]:
    """(rows per chunk, rows per shard) for `rows` rows of at most `row_bytes` bytes per expert."""
    chunk_rows, shard_bytes = params.chunk_rows or chunk_rows_for(row_bytes), params.shard_bytes
    if "shard_bytes" not in params.model_fields_set:
        shard_bytes = grown_shard_bytes(shard_bytes, rows * row_bytes)
    return chunk_rows, shard_rows_for(row_bytes, chunk_rows, shard_bytes)


def _same(
    existing: CacheSpec,
    inputs: dict[str, Any],
    params: Params,
    names: list[str],
    rows: int,
    kept: Statistics,
    origin: dict[str, Any],
) -> bool:
    """True if `existing` is the cache that this run would write.

    Its statistics are compared only if all are kept. Estimated ones follow from what else is compared.
    """
    recorded = {k: dict(v) if isinstance(v, dict) else v for k, v in existing.fingerprint_inputs.items()}
    if not isinstance(recorded.get("batchnorm"), dict):
        return False
    digest = recorded["batchnorm"].pop("statistics", None)
    if sorted(kept) == names:
        same_statistics = digest == sha256(batchnorm.to_bytes(kept))
    else:
        same_statistics = existing.provenance.get("statistics_from") == origin.get("statistics_from")
    same_groups = recorded_groups(existing.provenance) == recorded_groups(origin)
    chunks = layout(params, existing.largest_row_bytes, rows)
    # Batch size and threads change results only within the tolerance of a precision, so they are not compared.
    precision = existing.provenance.get("precision", "float32")
    have = (existing.codec, existing.dtype, precision, (existing.chunk_rows, existing.shard_rows), existing.rows)
    asked = (params.codec, params.dtype, params.precision, chunks, rows)
    return same_statistics and same_groups and recorded == inputs and have == asked


def _statistics(
    staging: AnyStaging,
    names: list[str],
    kept: Statistics,
    estimate: Callable[[list[str]], Statistics],
    depends: dict[str, Any],
) -> bytes:
    """The batch-norm statistics `names` as bytes: those `kept`, and the others by `estimate`.

    They are saved in staging, so that a resumed run does not estimate them again. `depends`: everything that the
    estimates depend on.
    """
    key = sha256(canonical_json({**depends, "kept": sha256(batchnorm.to_bytes(kept))}))
    file = f"batchnorm.{key[:16]}"  # holds the sha256 of the statistics, then the statistics
    saved = staging.kept(file)
    if saved is None or saved[:64] != sha256(saved[64:]).encode():
        staging.drop(file)
        estimated = estimate([name for name in names if name not in kept])
        data = batchnorm.to_bytes({name: {**kept, **estimated}[name] for name in names})
        # Of parts that start together all estimate and one is first; on GPUs their statistics may differ by rounding.
        saved = staging.claim(file, sha256(data).encode() + data)
    return saved[64:]


def _spec(
    params: Params,
    backbone: Backbone,
    samples: Samples,
    rows: int,
    inputs: dict[str, Any],
    origin: dict[str, Any],
    device: torch.device,
) -> CacheSpec:
    size = samples.transform.size
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, size, size, device=device))
    shapes = tuple((m.shape[1], m.shape[2], m.shape[3]) for m in maps)
    itemsize = 4 if params.dtype == "float32" else 2
    chunk_rows, shard_rows = layout(params, max(math.prod(s) for s in shapes) * itemsize, rows)
    return CacheSpec(
        rows=rows,
        maps=shapes,
        dtype=params.dtype,
        codec=params.codec,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        fingerprint_inputs=inputs,
        provenance={
            **origin,
            "classes": list(samples.facts["classes"]),
            "counts": samples.counts,
            "dataset": samples.facts["dataset"],
        },
    )


def _announce(spec: CacheSpec, run: Run, pending: list[int], part: Part | None, target: Target) -> None:
    """Prints what will be written. Raises CacheError `full` if the disk has too little space for it."""
    share = sum(len(spec.shard_range(s)) for s in pending) / spec.rows
    needed = int(spec.value_bytes * share * 1.02) + 2**20
    free = target.free()
    own = spec.shards if part is None else len(part.shards(spec))
    kept = own - len(pending)
    resumed = f", {kept:,} of {counted(own, 'shard')} already written" if kept else ""
    size = f"{counted(spec.rows, 'row')}, {sized(spec.value_bytes)} of values"
    of = f"part {part} of " if part else ""
    run.say(f"{run.name}: {of}{size}{resumed}" + (f"; {sized(free)} free" if free is not None else ""))
    if free is not None and needed > free:
        more = sized(needed - free)  # the two amounts may look alike
        raise CacheError(
            "full", f"{target}: needs {sized(needed)}; got {sized(free)} free; free {more} more, or use a codec"
        )


@dataclass(frozen=True)
class _Sink:
    """Writes a shard, after adding the rows that come from a previous cache. Cluster workers get a copy of it."""

    writer: Whole | OfPart
    carrier: Carrier | None

    def __call__(self, shard: int, maps: list[np.ndarray]) -> None:
        """Writes `shard`; `maps` holds its computed rows, one array per expert."""
        if self.carrier is None:
            self.writer.write(shard, maps)
        else:
            self.writer.put(shard, self.carrier.complete(shard, maps))


def _bar(job: forward.Job, run: Run) -> tuple[Any, Callable[[int], None]]:
    """(progress bar over the rows of `job`, a function that adds a number of rows to it)."""
    total = sum(len(numbers) for numbers in job.todo.values())
    bar = progress(None, f"extract {run.name}", unit="row", total=total, unit_scale=True)

    def tick(rows: int) -> None:
        bar.update(rows)
        bar.set_postfix_str(sized(bar.n * job.spec.row_bytes_in_all), refresh=False)

    return bar, tick


def _extract_here(job: forward.Job, backbone: Backbone, sink: _Sink, passes: forward.Passes, run: Run) -> None:
    """Computes the rows in `job.todo`. Other threads complete shards and write them."""
    work = forward.Work(job, backbone, job.device, passes)
    bar, tick = _bar(job, run)
    shard_bytes = job.spec.shard_rows * job.spec.row_bytes_in_all
    # A writer holds its shard twice; all writers together, a quarter of the memory at most.
    writers = max(1, min(MOST_WRITERS, available_memory() // (8 * shard_bytes)))
    with ThreadPoolExecutor(writers, "write") as write_threads, bar:
        writes: deque[Future[None]] = deque()
        # With rows from a previous cache few are left in each shard, so batches span shards.
        for shard, maps in forward.computed(work, job.todo, tick, straddle=sink.carrier is not None):
            writes.append(write_threads.submit(sink, shard, maps))
            while len(writes) > writers + 1:  # bounds memory to two shards more than are being written
                writes.popleft().result()
        for pending_write in writes:
            pending_write.result()


def _extract_there(address: str, job: forward.Job, sink: _Sink, run: Run) -> None:
    """Has the workers of a cluster compute and write the shards of `job.todo`."""
    bar, tick = _bar(job, run)
    with bar:
        for shard in cluster.shards(address, forward.Remote(job, sink), list(job.todo), run.say):
            tick(len(job.todo[shard]))

"""A training task: classifiers of one host on one cache, in this process."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.cache.sizes import sized
from h2t.pipeline.base import clock
from h2t.pipeline.base.columns import column
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.extraction.recipes import RECIPES
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import (
    FeatureReader,
    first_not_finite,
    identity_if_pooled,
    maps_fingerprint,
    pool_label,
)
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.host_entry import Params, check_reads
from h2t.pipeline.heads.parts import planned_parts
from h2t.pipeline.heads.residency import Feed, Residency, find_room, plan_tier
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.stack import FLOAT, NotFinite, not_finite
from h2t.pipeline.heads.start import backbone_head, class_means, from_file
from h2t.pipeline.heads.step_size import step_size
from h2t.pipeline.heads.stored import HeadParts, Heads, build_head
from h2t.pipeline.heads.training import Trained, fit, train
from h2t.pipeline.networks.frozen import save_classifier
from h2t.pipeline.networks.pool import Pool
from h2t.pipeline.networks.trained import StageOneHead, backbone_digest, load_head
from h2t.pipeline.networks.weights import weights_digest
from h2t.pipeline.training.resume import Checkpoint


@dataclass(frozen=True)
class Summary:
    """What was trained, and the cost of reading features, for the run record.

    `stall`: share of the time spent waiting for features. `resumed_steps`: steps done by an earlier, interrupted run.
    """

    heads: int
    steps: int
    batch_size: int = 0
    resumed_steps: int = 0
    residency: str = "memory"
    stall: float = 0.0
    bytes_read: int = 0
    bytes_used: int = 0
    hit_rate: float | None = None
    expected_hit_rate: float | None = None


class Diverged(UserError):
    """Training or a fit gave weights that are not finite."""


SUMMED = ("heads", "resumed_steps", "bytes_read", "bytes_used")  # over replicates and processes


def together(summaries: list[Summary]) -> Summary:
    """The summary of all replicates or processes: sums of `SUMMED`, else what the first one says."""
    summed = {key: sum(getattr(s, key) for s in summaries) for key in SUMMED}
    return replace(summaries[0], **summed)


@dataclass(frozen=True)
class Made:
    """Trained classifiers, their losses by epoch, and what they cost."""

    heads: Heads
    history: pa.Table
    summary: Summary

    def write(self, into: Path) -> None:
        """Writes `heads.safetensors`, `heads.parquet` and `history.parquet` into a directory, made if need be."""
        into.mkdir(parents=True, exist_ok=True)
        heads = self.heads
        save_classifier(into / "heads.safetensors", heads.state, heads.frozen, {"host": heads.about["host"]})
        pq.write_table(heads.table, into / "heads.parquet")
        pq.write_table(self.history, into / "history.parquet")


@dataclass(frozen=True)
class Task:
    """Classifiers with the settings `heads`, to be trained on `rows` of `cache`, by default all training samples.

    `run.out` is the place whose neighbour holds the unfinished training. `host`: bytes of host memory to plan with, by
    default what is available. `start`: the folder of the backbone's head, if another process has read or fitted it.
    """

    params: Params
    run: Run
    residency: Residency
    cache: Cache
    backbone_dir: Path
    heads: list[HeadSetting]
    rows: pa.Table | None = None
    host: int | None = None
    start: Path | None = None


def backbone_start(task: Task) -> StageOneHead:
    """The head of the task's backbone: trained in stage I, or a probe, which is fitted here unless there is one."""
    if task.start is not None:
        return load_head(task.start)
    if task.params.kind.starts_from == "own" or _start_of(task.params) not in (None, "probe"):
        return load_head(task.backbone_dir)
    return backbone_head(
        task.cache, task.backbone_dir, task.params.classifier, task.run.device, task.run.say, task.rows
    )


def _start_of(params: Params) -> str | None:
    """What training starts from, as `hosts.NAME.start` says it, or by the host's default."""
    return params.start or ("means" if params.kind.starts_from == "means" else None)


def train_task(task: Task) -> Made:
    """Trains the classifiers. Raises UserError for settings or caches that do not fit, or if training diverges."""
    params, run, cache, heads = task.params, task.run, task.cache, task.heads
    recipe, kind = RECIPES[params.batchnorm], params.kind
    start = _start_of(params)
    stage1 = backbone_start(task)
    fitted = kind.fitted
    receiver = params.receiver or kind.receiver
    replaced = [h.replaced(cache.spec.maps[0][0]) for h in heads]
    streams = Streams(
        cache.index if task.rows is None else task.rows,
        recorded_names(cache.spec.provenance, cache.files),
        recipe.read_under(receiver),
        {} if fitted else {donor: recipe.read_under(donor) for donor in params.grid.donor},
        list(dict.fromkeys(h.seed for h in heads)),
        params.optimiser.batch_size,
        receiver=receiver,
        partner=None if fitted else kind.partner,
        epochs=params.optimiser.epochs,
    )
    channels, height, width = cache.spec.maps[0]
    frozen = stage1.frozen
    features = frozen.outputs(channels) if frozen else channels
    context = Context(torch.from_numpy(streams.index.counts), features, cache.experts, height * width)
    _check_cache(cache, context, kind.numbers, whole=task.rows is None)
    same = stage1.classifier == params.classifier
    parts = HeadParts(
        host=params.host,
        loss=params.loss,
        classifier=params.classifier,
        scale=params.scale or kind.usual_scale or (stage1.scale if same else 1.0),
        pool=params.pool,
        pool_options=params.pool_options,
        where=f"hosts.{run.name}",
    )

    def head_of(setting: HeadSetting) -> Head:
        on_device = frozen.to(run.device) if frozen else None
        return build_head(parts.of(setting.constants), context, channels, on_device)

    head = head_of(heads[0])
    reads = "features" if fitted else kind.reads
    as_maps = reads == "maps" or (reads == "any" and not task.residency.pooled)
    reader = _reader(params, cache, head.pool, as_maps=as_maps)
    check_reads(params, run.name, "any" if fitted else reads, reader)
    if start not in (None, "probe"):
        stage1 = replace(_start(start, params, run, reader, head, streams), frozen=frozen)
    about = {
        **asdict(parts),
        "batchnorm": params.batchnorm,
        "receiver": recipe.read_under(receiver),
        "evaluate": recipe.evaluate,
        "rounding": params.rounding,
        "cache": maps_fingerprint(cache.spec),
        "backbone": backbone_digest(task.backbone_dir),
        **({"constants": [name for name, _ in heads[0].constants]} if heads[0].constants else {}),
        "counts": streams.index.counts.tolist(),
        "channels": context.channels,
        "experts": context.experts,
        "pixels": context.pixels,
        **({"map_channels": channels} if frozen else {}),
        **({"start": Path(params.start).name} if params.start else {}),
    }
    if fitted:
        trained, summary = _fitted(task, streams, reader, stage1, head_of)
    else:
        trained, summary = _descended(task, streams, reader, stage1, head_of, str(about["backbone"]))
    return Made(Heads(trained.state, table(heads, replaced, about), about, frozen), trained.history, summary)


def _fitted(
    task: Task, streams: Streams, reader: FeatureReader, stage1: StageOneHead, head_of: Callable[[HeadSetting], Head]
) -> tuple[Trained, Summary]:
    """The classifiers of a closed-form fit. Raises UserError, also if they are not finite."""
    run, heads = task.run, task.heads
    clock.begins("training")
    _check_fit(run.name, streams, reader, holds_logits=task.params.kind.holds_logits)
    trained = fit([head_of(setting) for setting in heads], stage1, streams, reader, run.device)
    if bad := not_finite(trained.state):
        raise _not_finite_because(run.name, True, task.cache, streams.receivers.first, bad[1], heads[bad[0]])
    return trained, Summary(len(heads), 0)


def _descended(
    task: Task,
    streams: Streams,
    reader: FeatureReader,
    stage1: StageOneHead,
    head_of: Callable[[HeadSetting], Head],
    backbone: str,
) -> tuple[Trained, Summary]:
    """The classifiers that gradient descent trains, in parts that fit the memory. Raises UserError if it diverges.

    `backbone`: digest of its weights.
    """
    run, cache, heads, params = task.run, task.cache, task.heads, task.params
    head = head_of(heads[0])
    if head.gradient_host.prepares:
        _check_fit(run.name, streams, reader, task.host, holds_logits=False)
    begin = weights_digest(stage1.state)
    token = f"{cache.spec.fingerprint} {backbone} {params.model_dump_json()} {begin}"
    token += "" if task.rows is None else f" fold of {streams.samples} samples"
    room = find_room(task.residency, run.device, task.host)
    choice = plan_tier(streams, reader, task.residency, room)
    size = step_size(streams, reader, stage1, head, on_gpu=room.gpu > 0)
    planned = planned_parts(run, heads, size, choice, room, streams.count * reader.row_bytes, token)
    if len(planned) > len({h.kind for h in heads}):
        run.say(
            f"{run.name}: {counted(len(heads), 'classifier')} in {len(planned)} parts, "
            f"to stay below {sized(room.step)} per step"
        )
    clock.begins("reading")
    step_rows = max(size.window(part) for part in planned) // reader.row_bytes
    feed = Feed(streams, reader, choice, room.windows, run.device, run.say, step_rows=step_rows)
    try:
        clock.begins("training")
        trained = train(params.optimiser, run, head_of, planned, feed, stage1, token)
    except NotFinite as bad:
        Checkpoint(run.out, "").clear()  # or training on a repaired cache would resume from these weights
        raise _not_finite_because(run.name, False, cache, streams.rows, bad.parameter, heads[bad.head]) from None
    run.say(f"{run.name}: {feed.cost}")
    return trained, _summary(len(heads), params.optimiser, streams.steps, trained.restored, feed)


def _start(start: str, params: Params, run: Run, reader: FeatureReader, head: Head, streams: Streams) -> StageOneHead:
    """The classifier that training starts from: class means, or the vectors in the file `start`. Raises UserError."""
    if start == "means":
        return class_means(reader, head, streams.receivers, streams.index.classes, params.classifier, run.device)
    return from_file(
        Path(start),
        params.start_sha256,
        f"hosts.{run.name}.start",
        recorded_names(reader.cache.spec.provenance, reader.cache.files),
        head.host.context.channels,
        params.classifier,
    )


def _check_cache(cache: Cache, context: Context, numbers: int, *, whole: bool) -> None:
    """Raises UserError for a cache whose maps or classes do not suit a host with so many `numbers` per channel.

    `whole`: whether `context` counts all training samples of the cache.
    """
    if len(set(cache.spec.maps)) > 1:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in cache.spec.maps)
        raise UserError(
            f"{cache.files}: the maps of all experts must have the same shape; got {shapes}; use a cache with one shape"
        )
    recorded = cache.spec.provenance.get("counts", context.counts.tolist())
    if whole and recorded != context.counts.tolist():
        raise UserError(
            f"{cache.files}: rows and record of a cache must agree; the rows have {context.counts.tolist()} training "
            f"samples per class, the record says {recorded}; extract again"
        )
    if numbers > 1 and "pool" in cache.spec.fingerprint_inputs:
        raise UserError(
            f"{cache.files}: this host needs whole maps; got a pooled cache; use the cache that it was made from"
        )


def _reader(params: Params, cache: Cache, pool: Pool, *, as_maps: bool) -> FeatureReader:
    """Pools features as they are read if that changes no result, unless `as_maps`. Raises UserError."""
    exact = pool.commutes and (pool.linear or "mixup" not in params.grid.selection)
    already = identity_if_pooled(cache, pool_label(params.pool, params.pool_options))
    if already and not exact:
        raise UserError(
            f"{cache.files}: selection mixup with pool {params.pool} needs whole maps, because the two do not commute; "
            "got a pooled cache; use the cache that it was made from"
        )
    return FeatureReader(cache, already or ((lambda maps: pool({}, maps)) if exact and not as_maps else None))


def table(heads: list[HeadSetting], replaced: list[int], about: dict[str, Any]) -> pa.Table:
    """The table `heads.parquet`: a line per head with its settings; `about` in the schema's metadata."""
    columns: dict[str, list[Any]] = {"number": list(range(len(heads)))}
    columns |= {k: [getattr(h, k) for h in heads] for k in ("ratio", "donor", "selection", "seed")}
    columns |= {"replaced": replaced}
    columns |= {name: [dict(h.constants)[name] for h in heads] for name, _ in heads[0].constants}
    found = pa.table({name: column(values) for name, values in columns.items()})
    return found.replace_schema_metadata({"h2t": json.dumps(about, sort_keys=True)})


def _check_fit(
    name: str, streams: Streams, reader: FeatureReader, host: int | None = None, *, holds_logits: bool
) -> None:
    """Raises UserError if memory cannot hold the features of all training samples (also in float64) and the logits.

    `host`: bytes to plan with, by default what is available. `holds_logits`: whether the fit has logits of all samples
    at once.
    """
    samples, numbers = streams.samples, reader.row_bytes // reader.dtype.itemsize
    logits = reader.cache.experts * samples * streams.index.classes if holds_logits else 0
    need = samples * numbers * (reader.dtype.itemsize + 3 * FLOAT) + 6 * FLOAT * logits
    room = available_memory() if host is None else host
    if need > room:
        raise UserError(
            f"hosts.{name}: a closed-form fit on {counted(samples, 'sample')} needs {sized(need)} of memory; "
            f"{sized(room)} are available; raise the memory limit, or use a host that is trained by gradient descent"
        )


def _summary(heads: int, optimiser: Optimiser, steps: int, restored: int, feed: Feed) -> Summary:
    meter = feed.meter
    return Summary(
        heads=heads,
        steps=optimiser.epochs * steps,
        batch_size=optimiser.batch_size,
        resumed_steps=restored,
        residency=feed.choice.tier,
        stall=meter.stall,
        bytes_read=meter.bytes_read,
        bytes_used=meter.bytes_used,
        hit_rate=meter.hit_rate,
        expected_hit_rate=feed.expected_hit_rate,
    )


def _not_finite_because(
    name: str, fitted: bool, cache: Cache, rows: np.ndarray, parameter: str, head: HeadSetting
) -> Diverged:
    """The error for a `parameter` of `head` that is not finite. The cause is one of `rows`, or the settings."""
    if (row := first_not_finite(cache, rows)) is not None:
        return Diverged(
            f"{cache.files}: maps must be finite; {row} holds NaN or infinity, and hosts.{name} trains on it; extract "
            "again, or correct the features and import them again"
        )
    if fitted:
        return Diverged(
            f"hosts.{name}: the fit gave NaN or infinity in {parameter}; choose other constants in hosts.{name}.loss"
        )
    return Diverged(
        f"hosts.{name}: training diverged: {parameter} of the classifier with ratio {head.ratio:g} and seed "
        f"{head.seed} is NaN or infinite; lower hosts.{name}.optimiser.lr"
    )

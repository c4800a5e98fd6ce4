"""train_classifier (stage II): trains all classifiers of one host, the combinations of its grid, on the cached maps.

Writes `heads.safetensors` (each parameter stacked over the classifiers), `heads.parquet` (a line per classifier with
its settings; the host's settings in the schema's metadata) and `history.parquet` (loss per classifier and epoch).
"""

import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import (
    DISTINCT,
    Experts,
    Positive,
    Ratio,
    Section,
    Seed,
    plugin,
)
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.extraction.recipes import RECIPES, Recipe
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import (
    FeatureReader,
    first_not_finite,
    identity_if_pooled,
    maps_fingerprint,
    pool_label,
)
from h2t.pipeline.heads.fusion import Rounding, Selection
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import Context, Host
from h2t.pipeline.heads.parts import planned_parts, step_size
from h2t.pipeline.heads.residency import Feed, Residency, amount, find_room, plan_tier
from h2t.pipeline.heads.stack import (
    FLOAT,
    HeadSetting,
    NotFinite,
    Optimiser,
    not_finite,
)
from h2t.pipeline.heads.start import backbone_head, check_backbone, class_means, from_file
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.heads.training import fit, train
from h2t.pipeline.networks.pool import Pool
from h2t.pipeline.networks.trained import StageOneHead, backbone_digest, load_head
from h2t.pipeline.networks.weights import save_weights, weights_digest
from h2t.pipeline.training.resume import Checkpoint

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Grid(Section):
    """Section `hosts.NAME.grid`: one classifier for each combination of the lists' values."""

    ratio: Annotated[list[Ratio], DISTINCT] = [0.0, 0.3]
    """Shares of the channels that are replaced; 0.0 is the host without H2T."""
    donor: Annotated[list[Annotated[str, plugin("samplers")]], DISTINCT] = ["instance"]
    """Samplers that donors are drawn by."""
    selection: Annotated[list[Selection], DISTINCT] = ["random"]
    """Which channels are replaced; `mixup` mixes all channels, `shuffled` takes each from another donor (controls)."""
    seed: Annotated[list[Seed], DISTINCT] = [0, 1, 2]
    """Seeds of batches and initial weights."""


class Params(Section):
    """An entry of section `hosts`."""

    host: Annotated[str, plugin("hosts")]
    """The method of stage II; an entry that is named like one need not say it."""
    backbone: str
    """Entry of `backbones` whose cache is read."""
    batchnorm: Literal["stage1", "calibrated", "branchwise"] = "branchwise"
    """Batch-norm recipe whose rows are read, of `extract.batchnorm`; left out, `stage1` if the cache has no other."""
    pool: Annotated[str, plugin("pools")] = "gap"
    """How maps become vectors."""
    pool_options: dict[str, Any] = {}
    """Options of the pool; see below."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Logits from products, or from cosines times `scale`."""
    scale: Positive | None = None
    """Factor of cosine logits; null is the host's own, that of a backbone's head of this kind, or 1."""
    start: str | None = None
    """Where training starts: `probe`, `means` (of the classes), a file of vectors, or null, the backbone's head."""
    start_sha256: str | None = None
    """With `start: FILE`: digest of the file, which must be given, because DVC does not watch it."""
    experts: Experts | None = None
    """Number of experts that the cache must have; null accepts any."""
    loss: dict[str, Any] = {}
    """Constants of the host; see below."""
    rounding: Rounding = "floor"
    """How the number of replaced channels, ratio x channels, becomes a whole number."""
    receiver: Annotated[str, plugin("samplers")] | None = None
    """Sampler of the training batches; null is the host's own."""
    optimiser: Optimiser = Optimiser()
    """Training; hosts with a closed-form fit do not take it."""
    grid: Grid = Grid()
    """What the classifiers vary in; hosts with a closed-form fit do not take it."""


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


def read_under(recipe: Recipe, sampler: str) -> str:
    """The statistics under which rows drawn by `sampler` are read; those of the receivers for a sampler plug-in."""
    return recipe.donors.get(sampler, recipe.receiver)


def heads_of(grid: Grid, rounding: Rounding = "floor") -> list[HeadSetting]:
    """All combinations of the grid's values; the seed varies fastest."""
    return [HeadSetting(*h, rounding) for h in itertools.product(grid.ratio, grid.donor, grid.selection, grid.seed)]


def run(params: Params, run: Run, residency: Residency, cache: Cache, backbone_dir: Path) -> Summary:
    """Trains all classifiers of host `run.name` and writes them into the directory `run.out`.

    An interrupted run resumes from its last saved step. Raises UserError for settings or caches that do not fit.
    """
    check_backbone(cache, backbone_dir)
    params = _with_recipe(params, run.name, cache)
    recipe = RECIPES[params.batchnorm]
    kind = plugins.load("hosts", params.host).Host
    own = load_head(backbone_dir)
    check_start(params, run.name, kind, own.about.get("head", "trained" if own.state else "none"))
    start = params.start or ("means" if kind.starts_from == "means" else None)
    from_backbone = kind.starts_from != "own" and start in (None, "probe")
    stage1 = backbone_head(cache, backbone_dir, params.classifier, run.device, run.say) if from_backbone else own
    fitted = kind.fitted
    receiver = params.receiver or kind.receiver
    heads = [HeadSetting(0.0, "instance", "random", 0)] if fitted else heads_of(params.grid, params.rounding)
    replaced = [h.replaced(cache.spec.maps[0][0]) for h in heads]
    _check_grid(params, run.name, cache, fitted, heads, replaced)
    streams = Streams(
        cache.rows,
        recorded_names(cache.spec.provenance, cache.files),
        read_under(recipe, receiver),
        {} if fitted else {donor: read_under(recipe, donor) for donor in params.grid.donor},
        [0] if fitted else params.grid.seed,
        params.optimiser.batch_size,
        receiver=receiver,
        partner=None if fitted else kind.partner,
        epochs=params.optimiser.epochs,
    )
    channels, height, width = cache.spec.maps[0]
    frozen = stage1.frozen
    features = frozen.outputs(channels) if frozen else channels
    context = Context(torch.from_numpy(streams.index.counts), features, cache.experts, height * width)
    _check_cache(cache, context, kind.numbers)
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
    head = build_head(parts, context, channels, frozen.to(run.device) if frozen else None)
    reads = "features" if fitted else kind.reads
    as_maps = reads == "maps" or (reads == "any" and not residency.pooled)
    reader = _reader(params, cache, head.pool, as_maps=as_maps)
    _check_reads(params, run.name, "any" if fitted else reads, reader)
    if start not in (None, "probe"):
        stage1 = replace(_start(start, params, run, reader, head, streams), frozen=frozen)
    about = {
        **asdict(parts),
        "batchnorm": params.batchnorm,
        "receiver": read_under(recipe, receiver),
        "evaluate": recipe.evaluate,
        "rounding": params.rounding,
        "cache": maps_fingerprint(cache.spec),
        "backbone": backbone_digest(backbone_dir),
        "counts": streams.index.counts.tolist(),
        "channels": context.channels,
        "experts": context.experts,
        "pixels": context.pixels,
        **({"map_channels": channels} if frozen else {}),
        **({"start": Path(params.start).name} if params.start else {}),
    }
    if fitted:
        _check_fit(run.name, streams, reader, holds_logits=kind.holds_logits)
        trained, summary = fit(head, stage1, streams, reader, run.device), Summary(1, 0)
        if bad := not_finite(trained.state):
            raise _not_finite_because(run.name, fitted, cache, streams.receivers.first, bad[1], heads[0])
    else:
        if head.gradient_host.prepares:
            _check_fit(run.name, streams, reader, holds_logits=False)
        begin = weights_digest(stage1.state)
        token = f"{cache.spec.fingerprint} {about['backbone']} {params.model_dump_json()} {begin}"
        room = find_room(residency, run.device)
        choice = plan_tier(streams, reader, residency, room)
        size = step_size(streams, reader, stage1, head)
        planned = planned_parts(run, heads, size, choice, room, len(streams.rows) * reader.row_bytes, token)
        if len(planned) > 1:
            run.say(
                f"{run.name}: {counted(len(heads), 'classifier')} in {len(planned)} parts, "
                f"to stay below {amount(room.step)} per step"
            )
        rows = max(size.window(part) for part in planned) // reader.row_bytes
        feed = Feed(streams, reader, choice, room.windows, run.device, run.say, step_rows=rows)
        try:
            trained = train(params.optimiser, run, head, planned, feed, stage1, token)
        except NotFinite as bad:
            Checkpoint(run.out, "").clear()  # or training on a repaired cache would resume from these weights
            raise _not_finite_because(run.name, fitted, cache, streams.rows, bad.parameter, heads[bad.head]) from None
        summary = _summary(len(heads), params.optimiser, streams.steps, trained.restored, feed)
        run.say(f"{run.name}: {feed.cost}")
    with fresh_directory(run.out) as into:
        tensors, described = frozen.to_file() if frozen else ({}, None)
        about_file = {"host": params.host, **({"frozen": described} if frozen else {})}
        save_weights(into / "heads.safetensors", {**trained.state, **tensors}, about_file)
        pq.write_table(_table(heads, replaced, about), into / "heads.parquet")
        pq.write_table(trained.history, into / "history.parquet")
    Checkpoint(run.out, "").clear()
    run.say(f"{run.name}: " + ("fitted" if fitted else _outcome(trained.history, params.optimiser.epochs, len(heads))))
    return summary


def _with_recipe(params: Params, name: str, cache: Cache) -> Params:
    """The parameters with recipe `stage1` if the cache holds no other statistics and no other recipe is asked for.

    Raises UserError if one is.
    """
    if params.batchnorm == "stage1" or set(cache.rows["statistics"].unique().to_pylist()) != {"stage1"}:
        return params
    if "batchnorm" in params.model_fields_set:
        raise UserError(
            f"hosts.{name}.batchnorm: must be stage1, the only statistics in {cache.files}; got {params.batchnorm}; "
            "set it to stage1 or, if the backbone has batch norm, add the recipe to extract.batchnorm and extract again"
        )
    return params.model_copy(update={"batchnorm": "stage1"})


def check_start(params: Params, name: str, kind: type[Host], head: str) -> None:
    """Raises UserError if host `name` cannot start as asked from a backbone with this `head`."""
    where, backbone = f"hosts.{name}", f"backbones.{params.backbone}"
    if kind.starts_from == "own" and params.start:
        raise UserError(f"{where}.start: host {params.host} has a start of its own; got {params.start}; remove the key")
    if kind.starts_from == "trained" and (params.start or head != "trained"):
        raise UserError(
            f"{where}: host {params.host} starts from the classifier that its own stage I trained; got "
            f"{f'start: {params.start}' if params.start else f'{backbone} with head: {head}'}; use head: trained "
            "without start, or another host"
        )
    if params.start == "probe" and head != "probe":
        raise UserError(f"{where}.start: {backbone} has head: {head}; set {backbone}.head: probe, or start: means")
    if params.start_sha256 and params.start in (None, "probe", "means"):
        raise UserError(f"{where}.start_sha256: needs a file in start; got {params.start}; remove the key")


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


def _check_grid(
    params: Params, name: str, cache: Cache, fitted: bool, heads: list[HeadSetting], replaced: list[int]
) -> None:
    """Raises UserError for settings that do not suit the host or the cache. `replaced`: channels per head."""
    where = f"hosts.{name}"
    for key in ("grid", "optimiser", "receiver"):
        if fitted and key in params.model_fields_set:
            raise UserError(
                f"{where}.{key}: host {params.host} has a closed-form fit and takes no {key}; remove the key"
            )
    if params.experts not in (None, cache.experts):
        raise UserError(
            f"{where}.experts: must be {cache.experts}, as in the cache of backbone {params.backbone}; got "
            f"{params.experts}; change it, or set backbones.{params.backbone}.options.experts and extract again"
        )
    channels = cache.spec.maps[0][0]
    for head, count in zip(heads, replaced, strict=True):
        if head.ratio and not count:
            raise UserError(
                f"{where}.grid.ratio[{params.grid.ratio.index(head.ratio)}]: must be 0 or replace at least one of "
                f"{counted(channels, 'channel')}; got {head.ratio:g}; use 0 or at least {1 / channels:.3g}"
            )


def _check_cache(cache: Cache, context: Context, numbers: int) -> None:
    """Raises UserError for a cache whose maps or classes do not suit a host with so many `numbers` per channel."""
    if len(set(cache.spec.maps)) > 1:
        shapes = ", ".join(" x ".join(map(str, shape)) for shape in cache.spec.maps)
        raise UserError(
            f"{cache.files}: the maps of all experts must have the same shape; got {shapes}; use a cache with one shape"
        )
    recorded = cache.spec.provenance.get("counts", context.counts.tolist())
    if recorded != context.counts.tolist():
        raise UserError(
            f"{cache.files}: rows and record of a cache must agree; the rows have {context.counts.tolist()} training "
            f"samples per class, the record says {recorded}; extract again"
        )
    if numbers > 1 and "pool" in cache.spec.fingerprint_inputs:
        raise UserError(
            f"{cache.files}: the host needs whole maps; got a pooled cache; use the cache that it was made from"
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


def _check_reads(params: Params, name: str, reads: str, reader: FeatureReader) -> None:
    """Raises UserError if a host that `reads` features gets maps, or the other way round."""
    if reads == "features" and reader.pooling is None:
        raise UserError(
            f"hosts.{name}.pool: host {params.host} changes features before fusion, so the pool must act on each "
            f"channel alone and train nothing; got {params.pool}; use gap"
        )
    if reads == "maps" and reader.pooling is not None:
        raise UserError(
            f"{reader.cache.files}: host {params.host} needs whole maps; got a pooled cache; use the cache that it was "
            "made from"
        )


def _table(heads: list[HeadSetting], replaced: list[int], about: dict[str, Any]) -> pa.Table:
    """The table `heads.parquet`: a line per head with its settings; `about` in the schema's metadata."""
    columns = {k: [asdict(h)[k] for h in heads] for k in ("ratio", "donor", "selection", "seed")}
    numbers = pa.array(range(len(heads)), pa.int64())
    table = pa.table({"number": numbers, **columns, "replaced": pa.array(replaced, pa.int64())})
    return table.replace_schema_metadata({"h2t": json.dumps(about, sort_keys=True)})


def _check_fit(name: str, streams: Streams, reader: FeatureReader, *, holds_logits: bool) -> None:
    """Raises UserError if memory cannot hold the features of all training samples (also in float64) and the logits.

    `holds_logits`: whether the fit has logits of all samples at once.
    """
    samples, numbers = streams.samples, reader.row_bytes // reader.dtype.itemsize
    logits = reader.cache.experts * samples * streams.index.classes if holds_logits else 0
    need = samples * numbers * (reader.dtype.itemsize + 3 * FLOAT) + 6 * FLOAT * logits
    room = available_memory()
    if need > room:
        raise UserError(
            f"hosts.{name}: a closed-form fit on {counted(samples, 'sample')} needs {amount(need)} of memory; "
            f"{amount(room)} are available; raise the memory limit, or use a host that is trained by gradient descent"
        )


def _outcome(history: pa.Table, epochs: int, heads: int) -> str:
    """What was trained, in words, for the terminal."""
    final = history["loss"].to_numpy()[-heads:]
    trained = f"{counted(heads, 'classifier')}, {counted(epochs, 'epoch')}"
    return f"{trained}, final loss {final.min():.3f} to {final.max():.3f}"


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
) -> UserError:
    """The error for a `parameter` of `head` that is not finite. The cause is one of `rows`, or the settings."""
    if (row := first_not_finite(cache, rows)) is not None:
        return UserError(
            f"{cache.files}: maps must be finite; {row} holds NaN or infinity, and hosts.{name} trains on it; extract "
            "again, or correct the features and import them again"
        )
    if fitted:
        return UserError(
            f"hosts.{name}: the fit gave NaN or infinity in {parameter}; choose other constants in hosts.{name}.loss"
        )
    return UserError(
        f"hosts.{name}: training diverged: {parameter} of the classifier with ratio {head.ratio:g} and seed "
        f"{head.seed} is NaN or infinite; lower hosts.{name}.optimiser.lr"
    )

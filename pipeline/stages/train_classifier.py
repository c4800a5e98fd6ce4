"""train_classifier (stage II): trains all classifiers of one host, the combinations of its grid, on the cached maps.

Writes `heads.safetensors` (each parameter stacked over the classifiers), `heads.parquet` (a line per classifier with
its settings; the host's settings in the schema's metadata), `history.parquet` (loss per classifier and epoch) and, with
`folds`, `folds.parquet` (how well each setting does on held-out training samples).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.pipeline.base import clock, plugins, progress
from h2t.pipeline.base.columns import column
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.replicates import seeds_of
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.base.side_by_side import side_by_side
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.evaluation.folds import FOLDS, cross_validate
from h2t.pipeline.extraction.recipes import RECIPES, Recipe
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
from h2t.pipeline.heads.host_entry import Params as Params  # every stage module has its `Params`
from h2t.pipeline.heads.host_entry import check_grid, check_reads, check_start, heads_of
from h2t.pipeline.heads.parts import planned_parts, shares_of, step_size
from h2t.pipeline.heads.replicate import Replicate
from h2t.pipeline.heads.residency import Feed, Residency, amount, find_room, host_room, plan_tier
from h2t.pipeline.heads.stack import (
    FLOAT,
    HeadSetting,
    NotFinite,
    Optimiser,
    not_finite,
)
from h2t.pipeline.heads.start import backbone_head, check_backbone, class_means, from_file
from h2t.pipeline.heads.stored import HeadParts, Heads, build_head, load_heads
from h2t.pipeline.heads.training import Trained, fit, joined, train
from h2t.pipeline.networks.pool import Pool
from h2t.pipeline.networks.trained import StageOneHead, backbone_digest, load_head
from h2t.pipeline.networks.weights import save_weights, weights_digest
from h2t.pipeline.training.resume import Checkpoint

NUMBER = 2026112601  # other results, another number: docs/numbers.md


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


SUMMED = ("heads", "resumed_steps", "bytes_read", "bytes_used")  # over replicates; the other facts are the first one's


def read_under(recipe: Recipe, sampler: str) -> str:
    """The statistics under which rows drawn by `sampler` are read; those of the receivers for a sampler plug-in."""
    return recipe.donors.get(sampler, recipe.receiver)


def run(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    further: Sequence[Replicate] = (),
) -> Summary:
    """Trains all classifiers of host `run.name` and writes them into the directory `run.out`.

    Those of `further` replicates, with seeds of their own, go to `replicates/r` inside it. An interrupted run resumes
    from its last saved step. Raises UserError for settings or caches that do not fit.
    """
    replicates = [Replicate(0, cache, backbone_dir), *further]
    done = [_replicate(params, run, residency, replicate) for replicate in replicates]
    with fresh_directory(run.out) as into:
        for replicate, made in zip(replicates, done, strict=True):
            made.write(replicate.inside(into))
    for replicate in replicates:
        place = _place(run, replicate)
        for number in range(params.folds or 0):
            Checkpoint(_out_of_fold(place, number), "").clear()
        Checkpoint(place, "").clear()
    return _together([made.summary for made in done])


@dataclass(frozen=True)
class _Made:
    """The classifiers of one replicate. `folds`: what cross-validation found, if there was one."""

    heads: Heads
    history: pa.Table
    folds: pa.Table | None
    summary: Summary

    def write(self, into: Path) -> None:
        """Writes the stage's files into the directory `into`, which is made if need be."""
        into.mkdir(parents=True, exist_ok=True)
        tensors, described = self.heads.frozen.to_file() if self.heads.frozen else ({}, None)
        about = {"host": self.heads.about["host"], **({"frozen": described} if self.heads.frozen else {})}
        save_weights(into / "heads.safetensors", {**self.heads.state, **tensors}, about)
        pq.write_table(self.heads.table, into / "heads.parquet")
        pq.write_table(self.history, into / "history.parquet")
        if self.folds is not None:
            pq.write_table(self.folds, into / FOLDS)


def _replicate(params: Params, run: Run, residency: Residency, replicate: Replicate) -> _Made:
    """Trains the classifiers of one replicate; only their unfinished training is written."""
    cache, backbone_dir = replicate.cache, replicate.backbone
    kind = plugins.load("hosts", params.host).Host
    if replicate.number:
        said = run.say
        if not kind.fitted:
            own = params.grid.model_copy(update={"seed": seeds_of(params.grid.seed, replicate.number)})
            params = params.model_copy(update={"grid": own})
        run = replace(run, out=_place(run, replicate), say=lambda line: said(f"replicate {replicate.number}: {line}"))
    check_backbone(cache, backbone_dir)
    params = _with_recipe(params, run.name, cache)
    own_head = load_head(backbone_dir)
    head = own_head.about.get("head", "trained" if own_head.state else "none")
    check_start(params, run.name, kind, head)
    settings = heads_of(params.grid, params.rounding, fitted=kind.fitted)
    check_grid(params, run.name, cache, kind.fitted, settings)
    folds = _cross_validated(params, run, residency, cache, backbone_dir, settings, head) if params.folds else None
    heads, trained, summary = _train(params, run, residency, cache, backbone_dir, settings)
    epochs = params.optimiser.epochs
    outcome = counted(len(settings), "classifier") + " fitted" if kind.fitted and len(settings) > 1 else "fitted"
    run.say(f"{run.name}: {outcome if kind.fitted else _outcome(trained.history, epochs, len(settings))}")
    return _Made(heads, trained.history, folds, summary)


def _place(run: Run, replicate: Replicate) -> Path:
    """The place whose neighbour holds the unfinished training of a replicate: the output itself for replicate 0."""
    return run.out.with_name(f"{run.out.name}.replicate-{replicate.number}") if replicate.number else run.out


def _together(summaries: list[Summary]) -> Summary:
    """The summary of all replicates: sums, and for shares the first."""
    summed = {key: sum(getattr(s, key) for s in summaries) for key in SUMMED}
    return replace(summaries[0], **summed)


def _out_of_fold(out: Path, number: int) -> Path:
    """The place whose neighbour holds the unfinished training of a fold; nothing is written to the place itself."""
    return out.with_name(f"{out.name}.fold-{number}")


def _cross_validated(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    settings: list[HeadSetting],
    head: str,
) -> pa.Table:
    """How well each setting does on held-out training samples, as `evaluation.folds` describes."""
    assert params.folds is not None
    recipe, kind = RECIPES[params.batchnorm], plugins.load("hosts", params.host).Host
    under = [read_under(recipe, params.receiver or kind.receiver)]
    if not kind.fitted:
        under += [read_under(recipe, donor) for donor in params.grid.donor]
    tried = [(number, s) for number, s in enumerate(settings) if kind.fitted or s.seed == params.grid.seed[0]]
    run.say(f"{run.name}: cross-validation of {counted(len(tried), 'setting')} in {params.folds} folds")
    if head == "trained":
        run.say(
            f"note: {run.name}: stage I was trained on the samples that are held out here, so they look easier than "
            "new ones; where there are enough images, choose on validation images"
        )

    def train_on(rows: pa.Table, fold: int) -> Heads:
        quiet = replace(run, out=_out_of_fold(run.out, fold), say=silent)
        return _train(params, quiet, residency, cache, backbone_dir, [s for _, s in tried], rows)[0]

    numbers = [number for number, _ in tried]
    return cross_validate(cache, list(dict.fromkeys(under)), params.folds, numbers, train_on, run.device)


def _train(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    heads: list[HeadSetting],
    rows: pa.Table | None = None,
) -> tuple[Heads, Trained, Summary]:
    """Trains classifiers with the settings `heads` on the training samples in `rows`, by default all of the cache.

    Does so here, or in several processes. Those of a closed-form fit are always trained here.
    """
    one_process = plugins.load("hosts", params.host).Host.fitted
    shares = shares_of(heads, 1 if one_process else residency.processes)
    if len(shares) == 1:
        return _train_here(params, run, residency, cache, backbone_dir, heads, rows)
    devices = _devices(run.device, len(shares))
    run.say(f"{run.name}: {counted(len(heads), 'classifier')} in {len(shares)} processes")
    clock.begins("training")
    jobs = [
        _Share(
            params=params,
            run=replace(run, out=_share_of(run.out, number, len(shares)), say=silent, chosen=None),
            residency=residency,
            cache=cache,
            backbone_dir=backbone_dir,
            heads=[heads[place] for place in share],
            rows=rows,
            device=devices[number],
            host=host_room() // len(shares),
            threads=max(1, torch.get_num_threads() // len(shares)),
        )
        for number, share in enumerate(shares)
    ]
    summary = _together(side_by_side(jobs, "train_classifier.processes"))
    first = load_heads(jobs[0].run.out)
    trained = joined(shares, (job.trained() for job in jobs))
    table = _table(heads, [h.replaced(cache.spec.maps[0][0]) for h in heads], first.about)
    return Heads(trained.state, table, first.about, first.frozen), trained, summary


def _share_of(out: Path, number: int, of: int) -> Path:
    """Where a share of the heads of output `out` is written, inside the folder of its unfinished training."""
    return Checkpoint(out, "").folder / f"share-{number + 1}-of-{of}"


def _devices(device: torch.device, count: int) -> list[str]:
    """The device of each of `count` processes: the CPU, or a GPU of its own. Raises UserError if there are fewer."""
    if device.type == "cpu":
        return ["cpu"] * count
    there = torch.cuda.device_count() if device.index is None else 1
    if count > there:
        raise UserError(
            f"train_classifier.processes: must be at most {there}, one for each GPU in use; got {count}; lower it, or "
            "set device: cuda to use all GPUs"
        )
    return [f"cuda:{number}" for number in range(count)]


@dataclass(frozen=True)
class _Share:
    """The training of some of the classifiers in a process of its own.

    `host`: bytes of host memory it may plan with; `threads`: of torch.
    """

    params: Params
    run: Run
    residency: Residency
    cache: Cache
    backbone_dir: Path
    heads: list[HeadSetting]
    rows: pa.Table | None
    device: str
    host: int
    threads: int

    def __call__(self) -> Summary:
        """Trains the classifiers and writes them to `run.out`."""
        torch.set_num_threads(self.threads)
        run = replace(self.run, chosen=choose(self.device))
        with progress.hidden(True):  # the bars of several processes would overwrite each other
            heads, trained, summary = _train_here(
                self.params, run, self.residency, self.cache, self.backbone_dir, self.heads, self.rows, self.host
            )
        with fresh_directory(run.out) as into:
            _Made(heads, trained.history, None, summary).write(into)
        return summary

    def trained(self) -> Trained:
        """The classifiers that were written."""
        return Trained(load_heads(self.run.out).state, pq.ParquetFile(self.run.out / "history.parquet").read())


def _train_here(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    heads: list[HeadSetting],
    rows: pa.Table | None = None,
    host: int | None = None,
) -> tuple[Heads, Trained, Summary]:
    """The same in this process. `host`: bytes of host memory to plan with, by default what is available."""
    recipe = RECIPES[params.batchnorm]
    kind = plugins.load("hosts", params.host).Host
    own = load_head(backbone_dir)
    start = params.start or ("means" if kind.starts_from == "means" else None)
    from_backbone = kind.starts_from != "own" and start in (None, "probe")
    stage1 = own
    if from_backbone:
        stage1 = backbone_head(cache, backbone_dir, params.classifier, run.device, run.say, rows)
    fitted = kind.fitted
    receiver = params.receiver or kind.receiver
    replaced = [h.replaced(cache.spec.maps[0][0]) for h in heads]
    streams = Streams(
        cache.index if rows is None else rows,
        recorded_names(cache.spec.provenance, cache.files),
        read_under(recipe, receiver),
        {} if fitted else {donor: read_under(recipe, donor) for donor in params.grid.donor},
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
    _check_cache(cache, context, kind.numbers, whole=rows is None)
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
    as_maps = reads == "maps" or (reads == "any" and not residency.pooled)
    reader = _reader(params, cache, head.pool, as_maps=as_maps)
    check_reads(params, run.name, "any" if fitted else reads, reader)
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
        **({"constants": [name for name, _ in heads[0].constants]} if heads[0].constants else {}),
        "counts": streams.index.counts.tolist(),
        "channels": context.channels,
        "experts": context.experts,
        "pixels": context.pixels,
        **({"map_channels": channels} if frozen else {}),
        **({"start": Path(params.start).name} if params.start else {}),
    }
    if fitted:
        clock.begins("training")
        _check_fit(run.name, streams, reader, holds_logits=kind.holds_logits)
        trained = fit([head_of(h) for h in heads], stage1, streams, reader, run.device)
        summary = Summary(len(heads), 0)
        if bad := not_finite(trained.state):
            raise _not_finite_because(run.name, fitted, cache, streams.receivers.first, bad[1], heads[bad[0]])
    else:
        if head.gradient_host.prepares:
            _check_fit(run.name, streams, reader, holds_logits=False)
        begin = weights_digest(stage1.state)
        token = f"{cache.spec.fingerprint} {about['backbone']} {params.model_dump_json()} {begin}"
        token += "" if rows is None else f" fold of {streams.samples} samples"
        room = find_room(residency, run.device, host)
        choice = plan_tier(streams, reader, residency, room)
        size = step_size(streams, reader, stage1, head)
        planned = planned_parts(run, heads, size, choice, room, streams.count * reader.row_bytes, token)
        if len(planned) > len({h.kind for h in heads}):
            run.say(
                f"{run.name}: {counted(len(heads), 'classifier')} in {len(planned)} parts, "
                f"to stay below {amount(room.step)} per step"
            )
        clock.begins("reading")
        step_rows = max(size.window(part) for part in planned) // reader.row_bytes
        feed = Feed(streams, reader, choice, room.windows, run.device, run.say, step_rows=step_rows)
        try:
            clock.begins("training")
            trained = train(params.optimiser, run, head_of, planned, feed, stage1, token)
        except NotFinite as bad:
            Checkpoint(run.out, "").clear()  # or training on a repaired cache would resume from these weights
            raise _not_finite_because(run.name, fitted, cache, streams.rows, bad.parameter, heads[bad.head]) from None
        summary = _summary(len(heads), params.optimiser, streams.steps, trained.restored, feed)
        run.say(f"{run.name}: {feed.cost}")
    return Heads(trained.state, _table(heads, replaced, about), about, frozen), trained, summary


def _with_recipe(params: Params, name: str, cache: Cache) -> Params:
    """The parameters with recipe `stage1` if the cache holds no other statistics and no other recipe is asked for.

    Raises UserError if one is.
    """
    if params.batchnorm == "stage1" or cache.index.statistics() != ["stage1"]:
        return params
    if "batchnorm" in params.model_fields_set:
        raise UserError(
            f"hosts.{name}.batchnorm: must be stage1, the only statistics in {cache.files}; got {params.batchnorm}; "
            "set it to stage1 or, if the backbone has batch norm, add the recipe to extract.batchnorm and extract again"
        )
    return params.model_copy(update={"batchnorm": "stage1"})


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


def _table(heads: list[HeadSetting], replaced: list[int], about: dict[str, Any]) -> pa.Table:
    """The table `heads.parquet`: a line per head with its settings; `about` in the schema's metadata."""
    columns: dict[str, list[Any]] = {"number": list(range(len(heads)))}
    columns |= {k: [getattr(h, k) for h in heads] for k in ("ratio", "donor", "selection", "seed")}
    columns |= {"replaced": replaced}
    columns |= {name: [dict(h.constants)[name] for h in heads] for name, _ in heads[0].constants}
    table = pa.table({name: column(values) for name, values in columns.items()})
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
    final = history["loss"].slice(len(history) - heads).to_pylist()
    trained = f"{counted(heads, 'classifier')}, {counted(epochs, 'epoch')}"
    return f"{trained}, final loss {min(final):.3f} to {max(final):.3f}"


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

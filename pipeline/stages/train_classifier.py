"""train_classifier (stage II): train the whole grid of heads of one host on the cached maps.

Writes `heads.safetensors` (every parameter stacked over the heads), `heads.parquet` (one line per head: its settings;
the host's settings in the schema's metadata) and `history.parquet` (loss per head and epoch).
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
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
    Count,
    Epochs,
    Experts,
    NonNegative,
    Positive,
    Rate,
    Ratio,
    Section,
    Seed,
    plugin,
)
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
from h2t.pipeline.heads.fusion import Rounding, Selection, replaced_channels
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import WINDOW_SHARE, Choice, Feed, Residency, Room, find_room, plan_tier
from h2t.pipeline.heads.stack import (
    FLOAT,
    POOL,
    HeadSetting,
    NotFinite,
    Optimiser,
    Stack,
    StepSize,
    not_finite,
    part_sizes,
    parts_of,
    seeds_and_donors,
)
from h2t.pipeline.heads.stored import HeadParts, head_parts
from h2t.pipeline.networks.trained import NONE, StageOneHead, backbone_digest, load_head
from h2t.pipeline.networks.weights import save_weights
from h2t.pipeline.training.resume import Checkpoint

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class OptimiserParams(Section):
    """Section `hosts.NAME.optimiser`: SGD whose learning rate follows half a cosine over the epochs."""

    epochs: Epochs = 10
    """Passes over the training samples."""
    batch_size: Count = 128
    """Receivers in a batch."""
    lr: Rate = 0.02
    """Learning rate at the start; it follows half a cosine down to 0."""
    momentum: Ratio = 0.9
    """Momentum of SGD."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of SGD."""


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
    """Batch-norm recipe whose rows are read; one of `extract.batchnorm`."""
    pool: Annotated[str, plugin("pools")] = "gap"
    """How maps become vectors."""
    pool_options: dict[str, Any] = {}
    """Options of the pool; see below."""
    classifier: Literal["linear", "cosine"] = "linear"
    """Logits from products, or from cosines times `scale`."""
    scale: Positive | None = None
    """Factor of cosine logits; null is that of stage I if its classifier is of the same kind, else 1."""
    experts: Experts | None = None
    """Number of experts that the cache must have; null accepts any."""
    loss: dict[str, Any] = {}
    """Constants of the host; see below."""
    rounding: Rounding = "floor"
    """How the number of replaced channels, ratio x channels, becomes a whole number."""
    receiver: Annotated[str, plugin("samplers")] | None = None
    """Sampler of the training batches; null is the host's own."""
    optimiser: OptimiserParams = OptimiserParams()
    """Training; hosts with a closed-form fit do not take it."""
    grid: Grid = Grid()
    """What the classifiers vary in; hosts with a closed-form fit do not take it."""


@dataclass(frozen=True)
class Summary:
    """What was trained, and what feeding it cost. `resumed_steps` were done by a process that was killed."""

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


@dataclass(frozen=True)
class Trained:
    """The heads' parameters, name -> (K, ...), a line per head and epoch, and the steps that were done before."""

    state: dict[str, torch.Tensor]
    history: pa.Table
    restored: int = 0


RESULT_COPIES = 3  # of all heads' weights: as they are collected, and twice as they are written
TRAINED_POOL_COPIES = 8  # of a head's input, for the gradients of a pool with parameters (measured on `gem`)
RESUME_SLACK = 1.5  # by so much a step may exceed its budget, rather than that training starts anew in other parts

HISTORY = pa.schema([("number", pa.int64()), ("epoch", pa.int64()), ("lr", pa.float64()), ("loss", pa.float64())])


def read_under(recipe: Recipe, sampler: str) -> str:
    """The statistics that rows drawn by `sampler` are read under; those of receivers for samplers of your own."""
    return recipe.donors.get(sampler, recipe.receiver)


def heads_of(grid: Grid) -> list[HeadSetting]:
    """The product of the grid's lists; the seed varies fastest."""
    return [HeadSetting(*h) for h in itertools.product(grid.ratio, grid.donor, grid.selection, grid.seed)]


def check_backbone(cache: Cache, backbone_dir: Path) -> None:
    """Raises UserError unless the cache was extracted by the backbone in `backbone_dir`."""
    expected = backbone_digest(backbone_dir)
    backbone = cache.spec.fingerprint_inputs.get("backbone")
    recorded = backbone.get("weights") if isinstance(backbone, dict) else None
    if recorded == NONE != expected:
        raise UserError(f"{cache.files}: was imported, nothing is known of its backbone; give none in its place")
    if recorded != expected:
        raise UserError(
            f"{cache.files}: this cache was extracted by a backbone with weights {str(recorded)[:12]}, "
            f"{backbone_dir} has {expected[:12]}; name the backbone that made it, or extract again"
        )


def run(
    params: Params,
    residency: Residency,
    name: str,
    cache: Cache,
    backbone_dir: Path,
    device: torch.device,
    out: Path,
    say: Callable[[str], None],
) -> Summary:
    """Trains the heads of host `name` into the directory `out`."""
    check_backbone(cache, backbone_dir)
    stage1 = load_head(backbone_dir)
    recipe = RECIPES[params.batchnorm]
    kind = plugins.load("hosts", params.host).Host
    fitted = kind.fitted
    receiver = params.receiver or kind.receiver
    _check_grid(params, name, cache, fitted)
    heads = [HeadSetting(0.0, "instance", "random", 0)] if fitted else heads_of(params.grid)
    streams = Streams(
        cache.rows,
        recorded_names(cache.spec.provenance, cache.files),
        read_under(recipe, receiver),
        {} if fitted else {donor: read_under(recipe, donor) for donor in params.grid.donor},
        [0] if fitted else params.grid.seed,
        params.optimiser.batch_size,
        receiver=receiver,
    )
    channels, height, width = cache.spec.maps[0]
    context = Context(torch.from_numpy(streams.index.counts), channels, cache.experts, height * width)
    _check_cache(cache, context, kind.numbers)
    same = stage1.classifier == params.classifier
    parts = HeadParts(
        host=params.host,
        loss=params.loss,
        classifier=params.classifier,
        scale=params.scale or (stage1.scale if same else 1.0),
        pool=params.pool,
        pool_options=params.pool_options,
        where=f"hosts.{name}",
    )
    host, pool = head_parts(parts, context)
    reader = _reader(params, cache, pool, as_maps=not (residency.pooled or fitted))
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
    }
    if fitted:
        _check_fit(name, streams, reader)
        trained, summary = _fit(host, pool, stage1, streams, reader, device), Summary(1, 0)
        if bad := not_finite(trained.state):
            raise _diverged(name, fitted, cache, streams.receivers.first, bad[1], heads[0])
    else:
        token = f"{cache.spec.fingerprint} {about['backbone']} {params.model_dump_json()}"
        room = find_room(residency, device)
        choice = plan_tier(streams, reader, residency, room)
        size = _step_size(streams, reader, stage1, pool)
        planned = _parts(name, heads, size, choice, room, len(streams.rows) * reader.row_bytes, Path(out), token)
        if len(planned) > 1:
            say(f"{name}: {len(heads)} heads in {len(planned)} parts, to stay below {room.step / 1e9:.2g} GB a step")
        rows = max(size.window(part) for part in planned) // reader.row_bytes
        feed = Feed(streams, reader, choice, room.windows, device, say, step_rows=rows)
        try:
            trained = _train(params, name, host, pool, planned, feed, stage1, Path(out), token)
        except NotFinite as bad:
            Checkpoint(out, "").clear()  # else training on a mended cache would resume from these weights
            raise _diverged(name, fitted, cache, streams.rows, bad.parameter, heads[bad.head]) from None
        summary = _summary(len(heads), params.optimiser, streams.steps, trained.restored, feed)
        say(f"{name}: {feed.cost}")
    replaced = [replaced_channels(h.ratio, channels, params.rounding) for h in heads]
    with fresh_directory(out) as into:
        save_weights(into / "heads.safetensors", trained.state, {"host": params.host})
        pq.write_table(_table(heads, replaced, about), into / "heads.parquet")
        pq.write_table(trained.history, into / "history.parquet")
    Checkpoint(out, "").clear()
    say(f"{name}: " + ("fitted" if fitted else _outcome(trained.history, params.optimiser.epochs, len(heads))))
    return summary


def _check_grid(params: Params, name: str, cache: Cache, fitted: bool) -> None:
    """Raises UserError for a grid that this host or this cache cannot have."""
    where = f"hosts.{name}"
    for key in ("grid", "optimiser", "receiver"):
        if fitted and key in params.model_fields_set:
            raise UserError(f"{where}.{key}: {params.host} is fitted at once, it is not trained; remove the key")
    if params.experts not in (None, cache.experts):
        raise UserError(
            f"{where}.experts: asks for {params.experts}, the cache of backbone {params.backbone} has {cache.experts}; "
            f"set backbones.{params.backbone}.options.experts and extract again"
        )
    channels = cache.spec.maps[0][0]
    for i, ratio in enumerate(params.grid.ratio):
        if ratio and not fitted and not replaced_channels(ratio, channels, params.rounding):
            raise UserError(
                f"{where}.grid.ratio[{i}]: {ratio:g} of {channels} channels replaces none of them; "
                f"use 0 or at least {1 / channels:.3g}"
            )


def _check_cache(cache: Cache, context: Context, numbers: int) -> None:
    """Raises UserError for a cache whose maps or classes do not suit."""
    if len(set(cache.spec.maps)) > 1:
        raise UserError(f"{cache.files}: experts of one shape are needed; got {sorted(set(cache.spec.maps))}")
    recorded = cache.spec.provenance.get("counts", context.counts.tolist())
    if recorded != context.counts.tolist():
        raise UserError(
            f"{cache.files}: its rows have {context.counts.tolist()} training samples per class, "
            f"its record says {recorded}; extract again"
        )
    if numbers > 1 and "pool" in cache.spec.fingerprint_inputs:
        raise UserError(f"{cache.files}: is pooled already, this host needs whole maps; use the cache it was made from")


def _reader(params: Params, cache: Cache, pool: Any, *, as_maps: bool) -> FeatureReader:
    """Reads features pooled where that changes nothing, unless they are wanted `as_maps`. Raises UserError."""
    exact = pool.commutes and (getattr(pool, "linear", False) or "mixup" not in params.grid.selection)
    already = identity_if_pooled(cache, pool_label(params.pool, params.pool_options))
    if already and not exact:
        raise UserError(f"{cache.files}: is pooled already; mixup and {params.pool} do not commute, use whole maps")
    return FeatureReader(cache, already or ((lambda maps: pool({}, maps)) if exact and not as_maps else None))


def _table(heads: list[HeadSetting], replaced: list[int], about: dict[str, Any]) -> pa.Table:
    """A line per head: its settings and how many channels are `replaced`; `about` in the schema's metadata."""
    columns = {k: [asdict(h)[k] for h in heads] for k in ("ratio", "donor", "selection", "seed")}
    numbers = pa.array(range(len(heads)), pa.int64())
    table = pa.table({"number": numbers, **columns, "replaced": pa.array(replaced, pa.int64())})
    return table.replace_schema_metadata({"h2t": json.dumps(about, sort_keys=True)})


def _check_fit(name: str, streams: Streams, reader: FeatureReader) -> None:
    """Raises UserError if the features of all training samples, in float64 as well, and their logits cannot fit."""
    samples, numbers = streams.samples, reader.row_bytes // reader.dtype.itemsize
    logits = reader.cache.experts * samples * streams.index.classes
    need = samples * numbers * (reader.dtype.itemsize + 3 * FLOAT) + 6 * FLOAT * logits
    room = available_memory()
    if need > room:
        raise UserError(
            f"hosts.{name}: is fitted on the features of {samples} samples at once, which needs {need / 1e9:.2f} GB; "
            f"{room / 1e9:.2f} GB are available; raise the limit, or use a host that is trained"
        )


def _fit(
    host: Any, pool: Any, stage1: StageOneHead, streams: Streams, reader: FeatureReader, device: torch.device
) -> Trained:
    """The one head of a host that is not trained, from the unaugmented view of every training sample."""
    features = reader.read(streams.receivers.first).to(device, torch.float32)
    own = pool.initial()
    if reader.pooling is None:
        features = pool({k: t.to(device) for k, t in own.items()}, features)
    labels = torch.from_numpy(streams.receivers.labels).to(device)
    state = {**host.fit(features, labels, stage1), **{POOL + k: t for k, t in own.items()}}
    history = pa.table({"number": [], "epoch": [], "lr": [], "loss": []}, schema=HISTORY)
    return Trained({k: t.to(torch.float32)[None] for k, t in state.items()}, history)


def _step_size(streams: Streams, reader: FeatureReader, stage1: StageOneHead, pool: Any) -> StepSize:
    """What a training step of these features needs."""
    experts, classes = reader.cache.experts, streams.index.classes
    numbers = reader.row_bytes // reader.dtype.itemsize
    own = experts * classes * (reader.cache.spec.maps[0][0] + 1)
    return StepSize(
        batch=streams.batch_size,
        numbers=numbers,
        kept=reader.dtype.itemsize,
        logits=experts * streams.batch_size * classes,
        parameters=max(own, sum(t.numel() for t in stage1.state.values())),
        pool_copies=TRAINED_POOL_COPIES if len(reader.shape) == 3 and pool.initial() else 0,
    )


def _parts(
    name: str,
    heads: list[HeadSetting],
    size: StepSize,
    choice: Choice,
    room: Room,
    features: int,
    out: Path,
    token: str,
) -> list[list[HeadSetting]]:
    """The heads in the fewest parts whose steps fit, or in those of the training that resumes, if they still fit.

    Raises UserError if not even one head fits: `features` are the bytes of those that stay in memory.
    """
    results = RESULT_COPIES * len(heads) * FLOAT * size.parameters
    if results > room.host:
        raise UserError(
            f"hosts.{name}.grid: the weights of {len(heads)} heads need {results / 1e9:.2f} GB, "
            f"{room.host / 1e9:.2f} GB are available; train fewer heads at a time, or raise the limit"
        )
    streamed = choice.tier == "stream"

    def fits(parts: list[list[HeadSetting]], slack: float = 1.0) -> bool:
        step, window = slack * room.step, slack * WINDOW_SHARE * room.windows
        return all(size.of(part) <= step and (not streamed or size.window(part) <= window) for part in parts)

    ways = [parts_of(heads, n) for n in part_sizes(len(heads))]
    saved = Checkpoint.saved(out)
    for parts in ways:
        if any(_key(token, n, parts) == key for n, key in saved.items()) and fits(parts, RESUME_SLACK):
            return parts
    for parts in ways:
        if fits(parts):
            return parts
    here = choice.tier == "device" or not room.gpu  # features lie where heads train
    need = max(size.of(p) + (2 * size.window(p) if streamed else features * here) for p in ways[-1])
    if need > room.where_trained:
        raise UserError(
            f"hosts.{name}: training one head at a time needs {need / 1e9:.2f} GB, {room.where_trained / 1e9:.2f} GB "
            f"are available; lower hosts.{name}.optimiser.batch_size ({size.batch} samples a step), or raise the limit"
        )
    return ways[-1]


def _key(token: str, number: int, parts: list[list[HeadSetting]]) -> str:
    """The checkpoint's token of a part."""
    return sha256(f"{token} part {number} of {len(parts)}".encode()).hexdigest()


def _train(
    params: Params,
    name: str,
    host: Any,
    pool: Any,
    parts: list[list[HeadSetting]],
    feed: Feed,
    stage1: StageOneHead,
    out: Path,
    token: str,
) -> Trained:
    """All heads by gradient descent, part by part."""
    optimiser = params.optimiser
    settings = Optimiser(optimiser.epochs, optimiser.lr, optimiser.momentum, optimiser.weight_decay)
    state: dict[str, torch.Tensor] = {}
    history: list[dict[str, float]] = []
    done = restored = 0
    for number, part in enumerate(parts):
        stack = Stack(host, pool, part, feed.of(*seeds_and_donors(part)), rounding=params.rounding)
        stack.start(stage1)
        numbers = list(range(done, done + len(part)))
        done += len(part)

        def report(epoch: int, losses: torch.Tensor, numbers: list[int] = numbers) -> None:
            rate = settings.rate(epoch)
            history.extend(
                {"number": n, "epoch": epoch, "lr": rate, "loss": loss}
                for n, loss in zip(numbers, losses.tolist(), strict=True)
            )

        checkpoint = Checkpoint(out, _key(token, number, parts), part=number)
        try:
            stack.train(settings, name, report, checkpoint)
        except NotFinite as bad:
            raise NotFinite(bad.epoch, numbers[bad.head], bad.parameter) from None
        restored += checkpoint.restored
        for key, tensor in stack.state.items():
            if key not in state:
                state[key] = torch.empty(sum(map(len, parts)), *tensor.shape[1:], dtype=tensor.dtype)
            state[key][numbers] = tensor.detach().cpu()
    table = pa.Table.from_pylist(history, HISTORY).sort_by([("epoch", "ascending"), ("number", "ascending")])
    return Trained(state, table, restored)


def _outcome(history: pa.Table, epochs: int, heads: int) -> str:
    final = history["loss"].to_numpy()[-heads:]
    return f"{heads} heads, {epochs} epochs, final loss {final.min():.3f} to {final.max():.3f}"


def _summary(heads: int, optimiser: OptimiserParams, steps: int, restored: int, feed: Feed) -> Summary:
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


def _diverged(name: str, fitted: bool, cache: Cache, rows: np.ndarray, parameter: str, head: HeadSetting) -> UserError:
    """Why `parameter` of `head` is not finite: a row of the cache, which is looked for only now, or the settings."""
    if (row := first_not_finite(cache, rows)) is not None:
        return UserError(
            f"{cache.files}: {row} holds NaN or infinity, and hosts.{name} trains on it; extract again, or mend and "
            "import the features again"
        )
    if fitted:
        return UserError(f"hosts.{name}: {parameter} is not finite; choose other constants in hosts.{name}.loss")
    return UserError(
        f"hosts.{name}: training diverged: {parameter} of the head with ratio {head.ratio:g}, seed {head.seed} "
        f"is not finite; lower hosts.{name}.optimiser.lr"
    )

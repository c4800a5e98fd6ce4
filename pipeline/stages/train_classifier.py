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

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cache.reader import Cache
from pipeline import plugins
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoints import save_weights
from pipeline.classes import recorded_names
from pipeline.errors import UserError
from pipeline.features import FeatureReader, identity_if_pooled, maps_fingerprint, pool_label
from pipeline.fusion import Rounding, Selection, replaced_channels
from pipeline.heads import HeadParts, head_parts
from pipeline.host import Context, FittedHost
from pipeline.network import NONE, StageOneHead, backbone_digest, load_head
from pipeline.outputs import fresh_directory
from pipeline.params import DISTINCT, Count, NonNegative, Positive, Ratio, Section, Seed, plugin
from pipeline.recipes import RECIPES, Recipe
from pipeline.residency import Feed, Residency, open_feed
from pipeline.stack import POOL, HeadSetting, Optimiser, Stack, head_bytes, parts_of
from pipeline.streams import Streams


class OptimiserParams(Section):
    """Stage-II training; the learning rate follows half a cosine over the epochs."""

    epochs: Count = 10
    batch_size: Count = 128
    lr: Positive = 0.02
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 5e-4


class Grid(Section):
    """What the heads of the stack vary in; the product of the lists is the heads."""

    ratio: Annotated[list[Ratio], DISTINCT] = [0.0, 0.3]
    donor: Annotated[list[Annotated[str, plugin("samplers")]], DISTINCT] = ["instance"]
    selection: Annotated[list[Selection], DISTINCT] = ["random"]
    seed: Annotated[list[Seed], DISTINCT] = [0, 1, 2]


class Params(Section):
    """An entry of section `hosts`.

    `scale` of the logits: by default that of stage I, if the classifier is of its kind, else 1. `experts`, where it is
    given, is what the cache must have. `receiver` names the sampler of the training batches in the place of the host's
    own. Hosts that are fitted have neither `optimiser` nor `grid`.
    """

    host: Annotated[str, plugin("hosts")]
    backbone: str
    batchnorm: Literal["stage1", "calibrated", "branchwise"] = "branchwise"
    pool: Annotated[str, plugin("pools")] = "gap"
    pool_options: dict[str, Any] = {}
    classifier: Literal["linear", "cosine"] = "linear"
    scale: Positive | None = None
    experts: Count | None = None
    loss: dict[str, Any] = {}
    rounding: Rounding = "floor"
    receiver: Annotated[str, plugin("samplers")] | None = None
    optimiser: OptimiserParams = OptimiserParams()
    grid: Grid = Grid()


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
    fitted = issubclass(kind, FittedHost)
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
        trained, summary = _fit(host, pool, stage1, streams, reader, device), Summary(1, 0)
    else:
        feed = open_feed(streams, reader, residency, device, say)
        token = f"{cache.spec.fingerprint} {about['backbone']} {params.model_dump_json()}"
        trained = _train(params, residency, name, host, pool, heads, feed, stage1, Path(out), token, say)
        summary = _summary(len(heads), params.optimiser, streams.steps, trained.restored, feed)
        say(f"{name}: {feed.cost}")
    _check_finite(trained.state, heads, name)
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


def _train(
    params: Params,
    residency: Residency,
    name: str,
    host: Any,
    pool: Any,
    heads: list[HeadSetting],
    feed: Feed,
    stage1: StageOneHead,
    out: Path,
    token: str,
    say: Callable[[str], None],
) -> Trained:
    """All heads by gradient descent, in as many parts as the memory for a step asks for."""
    optimiser = params.optimiser
    settings = Optimiser(optimiser.epochs, optimiser.lr, optimiser.momentum, optimiser.weight_decay)
    size = sum(t.numel() for t in stage1.state.values())
    parts = parts_of(heads, head_bytes(feed, len(host.context.counts), size), residency.stack_bytes)
    if len(parts) > 1:
        say(f"{name}: {len(heads)} heads in {len(parts)} parts, to stay below {residency.stack_bytes / 1e9:.2g} GB")
    states: list[dict[str, torch.Tensor]] = []
    history: list[dict[str, float]] = []
    done = restored = 0
    for number, part in enumerate(parts):
        stack = Stack(host, pool, part, feed, rounding=params.rounding)
        stack.start(stage1)
        numbers = list(range(done, done + len(part)))
        done += len(part)

        def report(epoch: int, losses: torch.Tensor, numbers: list[int] = numbers) -> None:
            rate = settings.rate(epoch)
            history.extend(
                {"number": n, "epoch": epoch, "lr": rate, "loss": loss}
                for n, loss in zip(numbers, losses.tolist(), strict=True)
            )

        key = sha256(f"{token} part {number} of {len(parts)}".encode()).hexdigest()
        checkpoint = Checkpoint(out, key, part=number)
        stack.train(settings, name, report, checkpoint)
        restored += checkpoint.restored
        states.append({k: t.detach() for k, t in stack.state.items()})
    state = {k: torch.cat([s[k] for s in states]) for k in states[0]}
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


def _check_finite(state: dict[str, torch.Tensor], heads: list[HeadSetting], name: str) -> None:
    for key, tensor in state.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            worst = heads[int((~finite).nonzero()[0])]
            raise UserError(
                f"hosts.{name}: training diverged: {key} of the head with ratio {worst.ratio:g}, seed {worst.seed} "
                f"is not finite; lower hosts.{name}.optimiser.lr"
            )

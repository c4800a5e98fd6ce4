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

from cache.reader import Cache
from pipeline.batchnorm import RECIPES
from pipeline.checkpoint import Checkpoint
from pipeline.checkpoints import save_weights
from pipeline.errors import UserError
from pipeline.features import FeatureReader
from pipeline.fusion import Rounding, Selection
from pipeline.heads import HeadParts, head_parts
from pipeline.host import Context
from pipeline.network import backbone_digest, load_head
from pipeline.outputs import fresh_directory
from pipeline.params import DISTINCT, Count, NonNegative, Positive, Ratio, Section, Seed, plugin
from pipeline.residency import Feed, available_memory, choose_tier
from pipeline.stack import HeadSetting, Optimiser, Stack
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
    donor: Annotated[list[Literal["instance", "balanced", "reverse"]], DISTINCT] = ["instance"]
    selection: Annotated[list[Selection], DISTINCT] = ["random"]
    seed: Annotated[list[Seed], DISTINCT] = [0, 1, 2]


class Params(Section):
    """An entry of section `hosts`."""

    host: Annotated[str, plugin("hosts")]
    backbone: str
    batchnorm: Literal["stage1", "calibrated", "branchwise"] = "branchwise"
    pool: Annotated[str, plugin("pools")] = "gap"
    pool_options: dict[str, Any] = {}
    classifier: Literal["linear", "cosine"] = "linear"
    scale: Positive = 1.0
    loss: dict[str, Any] = {}
    rounding: Rounding = "floor"
    optimiser: OptimiserParams = OptimiserParams()
    grid: Grid = Grid()


class Residency(Section):
    """Section `train_classifier`: where features live while heads train. It changes no result.

    `memory_bytes`: the budget for features in host memory; null is half of what is available.
    """

    residency: Literal["auto", "device", "memory", "stream"] = "auto"
    memory_bytes: Count | None = None
    pooled: bool = True


@dataclass(frozen=True)
class Summary:
    """What was trained, and what feeding it cost."""

    heads: int
    steps: int
    residency: str
    stall: float
    bytes_read: int
    bytes_used: int
    hit_rate: float | None
    expected_hit_rate: float | None


def heads_of(grid: Grid) -> list[HeadSetting]:
    """The product of the grid's lists; the seed varies fastest."""
    return [HeadSetting(*h) for h in itertools.product(grid.ratio, grid.donor, grid.selection, grid.seed)]


def check_backbone(cache: Cache, backbone_dir: Path) -> None:
    """Raises UserError unless the cache was extracted by the backbone in `backbone_dir`."""
    found = cache.spec.fingerprint_inputs
    while "parent" in found:  # a pooled cache carries the ingredients of the cache it was made from
        found = found["parent"]
    expected = backbone_digest(backbone_dir)
    recorded = found.get("backbone", {}).get("weights")
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
    grid = params.grid
    heads = heads_of(grid)
    streams = Streams(
        cache.rows,
        cache.spec.provenance["classes"],
        recipe.receiver,
        {donor: recipe.donors[donor] for donor in grid.donor},
        grid.seed,
        params.optimiser.batch_size,
    )
    shapes = set(cache.spec.maps)
    if len(shapes) > 1:
        raise UserError(f"{cache.files}: experts of one shape are needed; got {sorted(shapes)}")
    context = Context(torch.from_numpy(streams.index.counts), cache.spec.maps[0][0], cache.experts)
    parts = HeadParts(
        host=params.host,
        loss=params.loss,
        classifier=params.classifier,
        scale=params.scale,
        pool=params.pool,
        pool_options=params.pool_options,
        where=f"hosts.{name}",
    )
    host, pool = head_parts(parts, context)
    pooling = (lambda maps: pool({}, maps)) if pool.commutes and residency.pooled else None
    feed = _feed(streams, FeatureReader(cache, pooling), residency, device, say)
    stack = Stack(host, pool, heads, feed, rounding=params.rounding)
    stack.start(stage1)

    history: dict[str, list[Any]] = {"number": [], "epoch": [], "lr": [], "loss": []}
    settings = Optimiser(
        epochs=params.optimiser.epochs,
        lr=params.optimiser.lr,
        momentum=params.optimiser.momentum,
        weight_decay=params.optimiser.weight_decay,
    )

    def report(epoch: int, losses: torch.Tensor) -> None:
        history["number"] += range(len(heads))
        history["epoch"] += [epoch] * len(heads)
        history["lr"] += [settings.rate(epoch)] * len(heads)
        history["loss"] += losses.tolist()

    token = sha256(f"{cache.spec.fingerprint} {backbone_digest(backbone_dir)} {params.model_dump_json()}".encode())
    save = Checkpoint(out, token.hexdigest())
    stack.train(settings, name, report, save)
    _check_finite(stack, heads, name)

    about = {
        **asdict(parts),
        "batchnorm": params.batchnorm,
        "receiver": recipe.receiver,
        "evaluate": recipe.evaluate,
        "rounding": params.rounding,
        "cache": cache.spec.fingerprint,
        "backbone": backbone_digest(backbone_dir),
        "counts": streams.index.counts.tolist(),
        "channels": context.channels,
        "experts": context.experts,
    }
    table = pa.table({k: [asdict(h)[k] for h in heads] for k in ("ratio", "donor", "selection", "seed")})
    table = table.add_column(0, "number", pa.array(range(len(heads)), pa.int64()))
    table = table.append_column("replaced", pa.array(stack.replaced.tolist(), pa.int64()))
    with fresh_directory(out) as into:
        save_weights(into / "heads.safetensors", stack.state, {"host": params.host})
        pq.write_table(
            table.replace_schema_metadata({"h2t": json.dumps(about, sort_keys=True)}), into / "heads.parquet"
        )
        pq.write_table(pa.table(history), into / "history.parquet")
    final = np.array(history["loss"][-len(heads) :])
    losses = f"final loss {final.min():.3f} to {final.max():.3f}"
    say(f"{name}: {len(heads)} heads, {params.optimiser.epochs} epochs, {losses}")
    save.clear()
    meter = feed.meter
    say(f"{name}: {_cost(feed)}")
    return Summary(
        heads=len(heads),
        steps=params.optimiser.epochs * streams.steps,
        residency=feed.choice.tier,
        stall=meter.stall,
        bytes_read=meter.bytes_read,
        bytes_used=meter.bytes_used,
        hit_rate=meter.hit_rate,
        expected_hit_rate=feed.expected_hit_rate,
    )


def _feed(
    streams: Streams, reader: FeatureReader, residency: Residency, device: torch.device, say: Callable[[str], None]
) -> Feed:
    """The batches with their features, in the tier that the budget allows."""
    budget = residency.memory_bytes or available_memory() // 2
    free = int(torch.cuda.mem_get_info(device)[0] * 0.8) if device.type == "cuda" else 0
    choice = choose_tier(residency.residency, len(streams.rows) * reader.row_bytes, budget, free)
    return Feed(streams, reader, choice, budget, device, say)


def _cost(feed: Feed) -> str:
    """The stall meter in words."""
    meter = feed.meter
    text = f"read {meter.bytes_read / 1e6:.1f} MB for {meter.bytes_used / 1e6:.1f} MB used"
    if meter.hit_rate is None:
        return text
    rate = f"hit rate {100 * meter.hit_rate:.1f} % (expected {100 * (feed.expected_hit_rate or 0):.1f} %)"
    return f"{text}, waited {100 * meter.stall:.0f} % of the time, {rate}"


def _check_finite(stack: Stack, heads: list[HeadSetting], name: str) -> None:
    for key, tensor in stack.state.items():
        finite = torch.isfinite(tensor).flatten(1).all(1)
        if not finite.all():
            worst = heads[int((~finite).nonzero()[0])]
            raise UserError(
                f"hosts.{name}: training diverged: {key} of the head with ratio {worst.ratio:g}, seed {worst.seed} "
                f"is not finite; lower hosts.{name}.optimiser.lr"
            )

"""An entry of section `hosts`: its keys, the classifiers that it asks for, and what does not go together."""

import itertools
import math
from typing import Annotated, Any, Literal

from h2t.cache.reader import Cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import (
    DISTINCT,
    Count,
    Experts,
    NonNegative,
    Positive,
    Rate,
    Ratio,
    Section,
    Seed,
    at_least,
    build,
    plugin,
)
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.fusion import Rounding, Selection
from h2t.pipeline.heads.setting import HeadSetting, Optimiser
from h2t.pipeline.heads.stored import LOSS


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
    lr: Annotated[list[Rate], DISTINCT] | None = None
    """Learning rates to choose from; null is `optimiser.lr` alone."""
    weight_decay: Annotated[list[NonNegative], DISTINCT] | None = None
    """Weight decays to choose from; null is `optimiser.weight_decay` alone."""
    scale: Annotated[list[Positive], DISTINCT] | None = None
    """Factors of cosine logits to choose from; null is `scale` alone."""
    loss: dict[str, Annotated[list[float | int | str], DISTINCT]] = {}
    """Values to choose from for keys of `loss`, such as {tau: [0.5, 1.0]}; also of hosts with a closed-form fit."""

    def constants(self) -> dict[str, list[Any]]:
        """The values of each constant, by its name in `HeadSetting.constants`; those of one stack's heads come last."""
        named = {"scale": self.scale, "lr": self.lr, "weight_decay": self.weight_decay}
        losses = {LOSS + key: values for key, values in self.loss.items()}
        return losses | {name: values for name, values in named.items() if values is not None}


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
    """What the classifiers vary in; of it, hosts with a closed-form fit take `loss` alone."""
    folds: Annotated[Count, at_least(2)] | None = None
    """Parts of a cross-validation on the training samples that chooses from the grid; null is validation images."""

    @property
    def kind(self) -> Any:
        """The class `Host` of the method's plug-in."""
        return plugins.load("hosts", self.host).Host


def heads_of(grid: Grid, rounding: Rounding = "floor", *, fitted: bool = False) -> list[HeadSetting]:
    """All combinations of the grid's values; the seed varies fastest, constants slowest.

    `fitted`: those of a host with a closed-form fit, which has neither ratios nor seeds.
    """
    constants = grid.constants()
    each = [tuple(zip(constants, values, strict=True)) for values in itertools.product(*constants.values())]
    if fitted:
        return [HeadSetting(0.0, "instance", "random", 0, constants=own) for own in each]
    usual = itertools.product(each, grid.ratio, grid.donor, grid.selection, grid.seed)
    return [HeadSetting(ratio, donor, chosen, seed, rounding, own) for own, ratio, donor, chosen, seed in usual]


def check_start(params: Params, name: str, head: str) -> None:
    """Raises UserError if host `name` cannot start as asked from a backbone with this `head`."""
    where, backbone, kind = f"hosts.{name}", f"backbones.{params.backbone}", params.kind
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


def check_constants(params: Params, name: str) -> None:
    """Raises UserError for a constant in the grid of host `name` that the host does not have, or a value out of range.

    Also for keys of the grid that a host with a closed-form fit does not take.
    """
    plugin, where = plugins.load("hosts", params.host), f"hosts.{name}"
    for key, values in params.grid.loss.items():
        for value in values:
            build(plugin.Loss, f"{where}.grid.loss", {**params.loss, key: value})
    if not plugin.Host.fitted:
        return
    for key in ("grid", "optimiser", "receiver"):
        taken = key == "grid" and params.grid.model_fields_set == {"loss"}
        if key in params.model_fields_set and not taken:
            raise UserError(
                f"{where}.{key}: host {params.host} has a closed-form fit and takes no {key}"
                f"{' but the key loss' if key == 'grid' else ''}; remove the key"
            )


def check_choice(params: Params, name: str, cache: Cache) -> None:
    """Raises UserError if the grid of host `name` has constants to choose from, and there is nothing to choose on."""
    several = [key for key, values in params.grid.constants().items() if len(values) > 1]
    if several and not params.folds and "val" not in cache.index.splits:
        raise UserError(
            f"hosts.{name}.grid: a choice among values of {', '.join(several)} needs validation images or "
            f"cross-validation; got neither; set hosts.{name}.folds: 5, hold out images "
            "(prepare.validation_per_class), or leave one value"
        )


def check_grid(params: Params, name: str, cache: Cache, heads: list[HeadSetting]) -> None:
    """Raises UserError for settings that do not suit the host or the cache."""
    check_constants(params, name)
    where = f"hosts.{name}"
    if params.experts not in (None, cache.experts):
        raise UserError(
            f"{where}.experts: must be {cache.experts}, as in the cache of backbone {params.backbone}; got "
            f"{params.experts}; change it, or set backbones.{params.backbone}.options.experts and extract again"
        )
    channels = cache.spec.maps[0][0]
    for head in heads:
        if head.ratio and not head.replaced(channels):
            least = math.ceil(1e6 / channels) / 1e6
            raise UserError(
                f"{where}.grid.ratio[{params.grid.ratio.index(head.ratio)}]: must be 0 or replace at least one of "
                f"{counted(channels, 'channel')}; got {head.ratio:g}; use 0 or at least {least:g}"
            )


def check_reads(params: Params, name: str, reads: str, reader: FeatureReader) -> None:
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

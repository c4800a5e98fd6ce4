"""train_backbone (stage I): trains a network with an objective, or loads its weights from a file.

Writes `backbone.safetensors` (the network up to its maps), `head.safetensors` (the stage-I classifier; without one if
`head` is `probe` or `none`) and training curves as tab-separated files in `plots/metrics`, in the layout of DVC's
logger. With `head: probe`, the last saved step stays beside the output, so that other settings of the probe need no
training. The loop is in `training.loop`;
`torchrun --nproc-per-node N -m h2t.pipeline train-backbone ...` runs it in N processes.
"""

import csv
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch

from h2t.cache.reader import Cache
from h2t.pipeline.base import numbers, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import Section, build, plugin
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.base.seeds import torch_seed
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.network_input import Input, of_network
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction.elsewhere import CacheElsewhere
from h2t.pipeline.extraction.recorded import backbone_of
from h2t.pipeline.networks.backbone import Backbone, build_backbone, features_of, frozen_part
from h2t.pipeline.networks.frozen import save_classifier
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.tap import Tapped
from h2t.pipeline.networks.trained import NONE
from h2t.pipeline.networks.weights import (
    fill,
    fit_head,
    load_checkpoint,
    save_weights,
    split_head,
    weights_digest,
    without_head,
)
from h2t.pipeline.training.loop import Curves, StageOne
from h2t.pipeline.training.objective import Objective
from h2t.pipeline.training.parallel import processes
from h2t.pipeline.training.resume import Checkpoint
from h2t.pipeline.training.settings import Training

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Params(Training):
    """An entry of section `backbones`."""

    arch: Annotated[str, plugin("backbones")]
    """The network; an entry that is named like one need not say it."""
    options: dict[str, Any] = {}
    """Options of the network; see below."""
    objective: Annotated[str, plugin("objectives")] = "ce"
    """The loss of stage I, with its classifier."""
    loss: dict[str, Any] = {}
    """Constants of the objective; see below."""
    input: Input = Input()
    """What the network takes; see below."""
    start: str | None = None
    """Weights that training starts from: `pretrained` (or `torchvision`), or a file. Their classifier is not used."""
    weights: str | None = None
    """Finished weights, so nothing is trained: `pretrained`, or a file. With `none` or null the network is trained."""
    sha256: str | None = None
    """Digest that the checkpoint file must have, as hexadecimal text; null accepts any file."""
    head: Literal["trained", "probe", "none"] = "trained"
    """The backbone's classifier: that of stage I, one that stage `probe` fits to the cached rows, or none."""
    probe: Probe = Probe()
    """How stage `probe` fits the classifier."""
    cache: CacheElsewhere | None = None
    """A finished cache elsewhere, which hosts read in place of one that is extracted here; nothing is trained."""

    @property
    def is_trained(self) -> bool:
        """Whether stage I trains the backbone, and not at most a head on it."""
        return self.cache is None and not self.has_weights and not self.frozen

    @property
    def has_weights(self) -> bool:
        """Whether the finished weights are given."""
        return self.weights not in (None, "none")


def run(params: Params, run: Run, samples: Samples, images: Images, cache: Cache | None = None) -> None:
    """Trains or loads the backbone `run.name` and writes it into the directory `run.out`.

    `cache` is the open cache that `params.cache` names, if it does; without weights, only a record of the backbone
    that it was extracted with is written. Raises UserError if the weights are missing or do not fit, or if training
    diverges.
    """
    where = f"backbones.{run.name}"
    if cache is not None and not params.has_weights:
        _write_record(params, run, cache)
        return
    arch, objectives = plugins.load("backbones", params.arch), plugins.load("objectives", params.objective)
    counts = torch.tensor(samples.counts)
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(run.seed, "stage1", "initial"))
        options, stated, backbone = _network(params, arch, where)
        loss = build(objectives.Loss, f"{where}.loss", params.loss)
        objective: Objective = objectives.Objective(loss, features_of(backbone), backbone.experts, counts)
    about = {
        "arch": params.arch,
        "options": options.model_dump(exclude_defaults=True) if hasattr(arch, "resolved") else params.options,
        "channels": backbone.channels,
        "experts": backbone.experts,
        **({"input": stated.model_dump(exclude_none=True)} if stated != Input() else {}),
    }
    if cache is not None:  # so that extract runs again if it is another
        about |= {"elsewhere": cache.spec.fingerprint}
    if params.has_weights:
        about |= {"pretrained": True} if params.weights == "pretrained" or hasattr(arch, "input") else {}
        whole = _weights(params, f"{where}.weights", str(params.weights), arch, options, stated)
        reason = _load(whole, f"{where}.weights", backbone, objective if params.head == "trained" else None)
        source = "pretrained" if params.weights == "pretrained" else Path(str(params.weights)).name
        run.say(f"{run.name}: weights from {source}; nothing is trained")
        if params.weights == "pretrained" and hasattr(arch, "made_for"):
            _compare_inputs(run, samples, stated, arch.made_for(options))
        if reason and params.head == "trained":
            run.say(f"note: {run.name}: the weights' own classifier is left out: {reason}")
        _write(run.out, about, params, backbone, None if reason else objective, [])
        return
    if params.start is not None:
        _start(params, where, arch, options, backbone, stated)
    if params.frozen and params.head != "trained":
        run.say(f"{run.name}: frozen, with head: {params.head}; nothing is trained")
        _write(run.out, about, params, backbone, None, [])
        return
    if objective.first_branch_share(0.0) is not None:
        _check_two_batches(params, where, backbone)
    samples = samples.with_input(stated)
    images = images.prepared_for(samples.transform)
    save = Checkpoint(run.out, _token(params, run, samples, backbone), seconds=0)
    with processes(run.device) as group:
        if params.accumulate % group.size:
            raise UserError(
                f"{where}.accumulate: must be a multiple of the number of processes, {group.size}, which share the "
                f"parts of a batch equally; got {params.accumulate}; set it to {group.size}"
            )
        first = group.rank == 0
        training = StageOne(params, backbone, objective, samples, images, run.seed, group)
        curves = training.run(run.name, save, run.say if first else silent)
    if not all(torch.isfinite(p).all() for p in backbone.state_dict().values()):
        raise UserError(f"{where}: training diverged, weights must be finite; got NaN or infinity; lower {where}.lr")
    if first:
        last = curves[-1]
        _write(run.out, about, params, backbone, objective if params.head == "trained" else None, curves)
        if save.restored == params.epochs and params.head == "probe":
            run.say(f"{run.name}: was trained with these settings before; to train anew, remove {save.folder}")
        if params.head != "probe":  # DVC runs this stage again for every key of the entry, also those of the probe
            save.clear()
        epochs = counted(params.epochs, "epoch")
        run.say(f"{run.name}: {epochs}, loss {last['loss']:.3f}, training accuracy {last['accuracy']:.1f} %")


def _network(params: Params, arch: ModuleType, where: str) -> tuple[Section, Input, Backbone]:
    """(options, input, the network with initial weights) of the plug-in `arch`, by the entry `where`."""
    options = build(arch.Options, f"{where}.options", params.options)
    if hasattr(arch, "resolved"):
        options = arch.resolved(options)
    stated = of_network(arch, options, params.input)
    return options, stated, build_backbone(arch, options, stated.size)


def check_weights(params: Params, file: Path, key: str) -> None:
    """Raises UserError, naming `key`, unless `file` holds weights of the network of `params`."""
    _, _, backbone = _network(params, plugins.load("backbones", params.arch), key)
    _load(load_checkpoint(file), key, backbone, None)


def _compare_inputs(run: Run, samples: Samples, stated: Input, wanted: Input) -> None:
    """Says so if the images are prepared unlike those that the weights were made for."""
    ours, theirs = (samples.with_input(i).transform for i in (stated, wanted))
    keys = [k for k in ("size", "resize", "interpolation", "mean", "std") if getattr(ours, k) != getattr(theirs, k)]
    if keys:
        said = ", ".join(f"{k} {getattr(theirs, k)} (here {getattr(ours, k)})" for k in keys)
        values = ", ".join(f"{k}: {v}" for k, v in wanted.model_dump().items())
        run.say(
            f"note: {run.name}: the weights were made for images of {said}; to follow it set "
            f"backbones.{run.name}.input: {{{values}}}"
        )


def _check_two_batches(params: Params, where: str, backbone: Backbone) -> None:
    """Raises UserError unless the backbone has two branches that can run alone, and nothing else mixes batches."""
    alone = getattr(type(backbone), "alone", Backbone.alone) is not Backbone.alone
    if not alone or backbone.experts != 2:
        got = counted(backbone.experts, "branch", "branches") if alone else "branches that only run together"
        raise UserError(
            f"{where}.objective: {params.objective} needs two branches that can run alone; got {params.arch} with "
            f"{got}; take arch resnet32 or resnet20 with options {{experts: 2, fork: last_block}}"
        )
    if mixed := [key for key in ("mixup", "cmo", "frozen") if getattr(params, key)]:
        raise UserError(
            f"{where}.{mixed[0]}: does not go with objective {params.objective}, which mixes two batches and trains "
            f"both branches; got {getattr(params, mixed[0])}; set it to {'false' if mixed[0] == 'frozen' else 0}"
        )


def _token(params: Params, run: Run, samples: Samples, backbone: Backbone) -> str:
    """Training resumes only if this token is unchanged. It does not depend on the number of processes."""
    table = samples.table.select(["split", "label", "source", "digest"]).to_pydict()
    without_effect = {"head", "probe"} | (set() if params.cmo else {"cmo", "cmo_power"})
    about = {
        "parameters": params.model_dump(exclude=without_effect),
        "samples": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
        "transform": samples.transform.model_dump(mode="json"),
        "numbers": {
            "train_backbone": NUMBER,
            "datasets": numbers.of_plugin("datasets", plugins.load("datasets", samples.facts["dataset"])),
            "backbones": numbers.of_plugin("backbones", plugins.load("backbones", params.arch)),
            "objectives": numbers.of_plugin("objectives", plugins.load("objectives", params.objective)),
        },
        "initial weights": weights_digest(backbone.state_dict()),
        "seed": run.seed,
        "device": run.device.type,
        "torch": torch.__version__,
    }
    return json.dumps(about, sort_keys=True)


def _write(
    out: Path, about: dict[str, Any], params: Params, backbone: Backbone, objective: Objective | None, curves: Curves
) -> None:
    """Writes the stage's files; without an `objective` the head file holds no classifier."""
    with fresh_directory(out) as into:
        save_weights(into / "backbone.safetensors", backbone.state_dict(), about)
        save_classifier(
            into / "head.safetensors",
            objective.state_dict() if objective else {},
            frozen_part(backbone),
            {
                **about,
                "objective": params.objective,
                "classifier": objective.classifier if objective else NONE,
                "scale": objective.scale if objective else 1.0,
                **({"head": params.head} if params.head != "trained" else {}),
                **({"probe": params.probe.model_dump()} if params.head == "probe" else {}),
            },
        )
        _write_curves(into / "plots" / "metrics", curves)


def _write_record(params: Params, run: Run, cache: Cache) -> None:
    """Writes the stage's files for a backbone without weights here: what it is, and the digest of its weights."""
    about = {
        "arch": params.arch,
        "options": params.options,
        **({"input": stated} if (stated := params.input.model_dump(exclude_none=True)) else {}),
        "elsewhere": cache.spec.fingerprint,
        "weights": backbone_of(cache.files, cache.spec),
    }
    head = {"objective": params.objective, "classifier": NONE, "scale": 1.0, "head": params.head}
    probe = {"probe": params.probe.model_dump()} if params.head == "probe" else {}
    with fresh_directory(run.out) as into:
        save_weights(into / "backbone.safetensors", {}, about)
        save_weights(into / "head.safetensors", {}, {**about, **head, **probe})
    run.say(f"{run.name}: its cache is at {cache.files}, its weights are not here; nothing is trained")


def _checkpoint(params: Params, key: str, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in the file `path`, which the parameter `key` names.

    Raises UserError if the file's digest is not `sha256`, or if it changes while it is read.
    """
    if params.sha256 is None or not path.is_file():
        return load_checkpoint(path)
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != params.sha256:
        raise UserError(
            f"{key}: {path.name} must have sha256 {params.sha256}; got {digest}; download the file again, or correct "
            "the key sha256"
        )
    state = load_checkpoint(path)
    after = path.stat()
    if any(getattr(before, k) != getattr(after, k) for k in ("st_ino", "st_size", "st_mtime_ns")):
        raise UserError(f"{key}: {path.name} changed while it was read; run again")
    return state


def _weights(
    params: Params, key: str, named: str, arch: ModuleType, options: Section, stated: Input
) -> Mapping[str, torch.Tensor]:
    """The state dict that the parameter `key` has `named`: a file, or the pretrained weights. Raises UserError."""
    if named not in ("pretrained", "torchvision"):
        return _checkpoint(params, key, Path(named))
    if not hasattr(arch, "weights"):
        raise UserError(f"{key}: {named} has no weights for {params.arch}; name a checkpoint file, or null")
    state: Mapping[str, torch.Tensor] = (
        arch.weights(options, stated.size) if hasattr(arch, "input") else arch.weights(options)
    )
    return state


def _load(whole: Mapping[str, torch.Tensor], where: str, backbone: Backbone, objective: Objective | None) -> str:
    """Loads the weights of a whole network. Returns why its classifier is left out, or nothing if it is kept.

    Without an `objective` the classifier is not looked at.
    """
    if isinstance(backbone, Tapped):
        fill(backbone, {k: v for k, v in whole.items() if k not in backbone.unused}, where)
    elif objective is None:
        fill(backbone, without_head(whole, backbone.state_dict()), where)
    if objective is None:
        return "none is asked for"
    if isinstance(backbone, Tapped):
        names = [f"{backbone.last_layer}.{part}" for part in ("weight", "bias")]
        if backbone.ending.why:
            return backbone.ending.why
        if names[0] not in whole:
            return "there is none"
        head = {part: whole[name][None] for part, name in zip(("weight", "bias"), names, strict=True) if name in whole}
        if head["weight"].dim() > 3:  # a convolution of one pixel
            head["weight"] = head["weight"].flatten(2)
    else:
        body, head = split_head(whole)
        fill(backbone, body, where)
    own = objective.state_dict()
    if objective.classifier == "linear" and head["weight"].shape[::2] == own["weight"].shape[::2]:
        classes, wanted = head["weight"].shape[1], own["weight"].shape[1]
        if classes != wanted:
            return f"it has {counted(classes, 'class', 'classes')}, the dataset has {wanted}"
    objective.load_state_dict(fit_head(head, own, where))
    return ""


def _start(params: Params, where: str, arch: ModuleType, options: Section, backbone: Backbone, stated: Input) -> None:
    """Loads the weights to start from into `backbone`, except those that it declares `fresh`."""
    key = f"{where}.start"
    pretrained = _weights(params, key, str(params.start), arch, options, stated)
    own = backbone.state_dict()
    used = {k: v for k, v in pretrained.items() if k in own}  # without the classifier, whose keys are not in `own`
    kept = {k: v for k, v in own.items() if k.startswith(backbone.fresh)}
    fill(backbone, {**used, **kept}, key)


def _write_curves(folder: Path, curves: Curves) -> None:
    for metric in curves[0] if curves else ():
        path = folder / "train" / f"{metric}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, delimiter="\t", lineterminator="\n")
            lines.writerow(["step", metric])
            lines.writerows([epoch, f"{point[metric]:.6g}"] for epoch, point in enumerate(curves))

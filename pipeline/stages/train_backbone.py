"""train_backbone (stage I): trains a network with an objective, or loads its weights from a file.

Writes `backbone.safetensors` (the network up to its maps), `head.safetensors` (the stage-I classifier; without tensors
if `head` is `probe` or `none`) and training curves as tab-separated files in `plots/metrics`, in the layout of DVC's
logger. The loop is in `training.loop`;
`torchrun --nproc-per-node N -m h2t.pipeline train-backbone ...` runs it in N processes.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import Section, build, plugin
from h2t.pipeline.base.seeds import torch_seed
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.networks.backbone import Backbone, build_backbone, features_of, frozen_part
from h2t.pipeline.networks.probe import Probe
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
from h2t.pipeline.training.loop import Curves, StageOne, Training
from h2t.pipeline.training.objective import Objective
from h2t.pipeline.training.parallel import processes
from h2t.pipeline.training.resume import Checkpoint

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
    start: str | None = None
    """Weights that training starts from: `torchvision`, or a checkpoint file. The classifier in them is not used."""
    weights: str | None = None
    """Checkpoint file with the finished weights: nothing is trained."""
    sha256: str | None = None
    """Digest that the checkpoint file must have, as hexadecimal text; null accepts any file."""
    head: Literal["trained", "probe", "none"] = "trained"
    """The backbone's classifier: that of stage I, one that stage `probe` fits to the cached rows, or none."""
    probe: Probe = Probe()
    """How stage `probe` fits the classifier."""


def run(
    params: Params,
    name: str,
    samples: Samples,
    images: Images,
    seed: int,
    device: torch.device,
    out: Path,
    say: Callable[[str], None],
) -> None:
    """Trains or loads the backbone `name` and writes it into the directory `out`. `seed`: of weights and batches.

    Raises UserError if the weights are missing or do not fit, or if training diverges.
    """
    where = f"backbones.{name}"
    arch, objectives = plugins.load("backbones", params.arch), plugins.load("objectives", params.objective)
    counts = torch.tensor(samples.counts)
    with torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed, "stage1", "initial"))
        options = build(arch.Options, f"{where}.options", params.options)
        backbone = build_backbone(arch, options)
        loss = build(objectives.Loss, f"{where}.loss", params.loss)
        objective: Objective = objectives.Objective(loss, features_of(backbone), backbone.experts, counts)
    if params.weights is not None:
        _load(params, where, backbone, objective)
        say(f"{name}: weights from {Path(params.weights).name}; nothing is trained")
        _write(out, params, backbone, objective, [])
        return
    if params.start is not None:
        _start(params, where, arch, options, backbone)
    if params.frozen and params.head != "trained":
        say(f"{name}: frozen, with head: {params.head}; nothing is trained")
        _write(out, params, backbone, objective, [])
        return
    save = Checkpoint(out, _token(params, samples, backbone, seed, device), seconds=0)
    with processes(device) as group:
        if params.accumulate % group.size:
            raise UserError(
                f"{where}.accumulate: must be a multiple of the number of processes, {group.size}, which share the "
                f"parts of a batch equally; got {params.accumulate}; set it to {group.size}"
            )
        first = group.rank == 0
        training = StageOne(params, backbone, objective, samples, images, seed, group)
        curves = training.run(name, save, say if first else lambda line: None)
    if not all(torch.isfinite(p).all() for p in backbone.state_dict().values()):
        raise UserError(f"{where}: training diverged, weights must be finite; got NaN or infinity; lower {where}.lr")
    if first:
        last = curves[-1]
        _write(out, params, backbone, objective, curves)
        save.clear()
        epochs = counted(params.epochs, "epoch")
        say(f"{name}: {epochs}, loss {last['loss']:.3f}, training accuracy {last['accuracy']:.1f} %")


def _token(params: Params, samples: Samples, backbone: Backbone, seed: int, device: torch.device) -> str:
    """Training resumes only if this token is unchanged. It does not depend on the number of processes."""
    table = samples.table.select(["split", "label", "source", "digest"]).to_pydict()
    about = {
        "params": params.model_dump(),
        "samples": table,
        "initial": weights_digest(backbone.state_dict()),
        "seed": seed,
        "device": device.type,
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _write(out: Path, params: Params, backbone: Backbone, objective: Objective, curves: Curves) -> None:
    about = {"arch": params.arch, "options": params.options, "channels": backbone.channels, "experts": backbone.experts}
    part = frozen_part(backbone)
    tensors, described = part.to_file() if part else ({}, None)
    if params.head == "trained":
        state, head = objective.state_dict(), {"classifier": objective.classifier, "scale": objective.scale}
    else:
        state, head = {}, {"classifier": NONE, "scale": 1.0, "head": params.head}
    if params.head == "probe":
        head["probe"] = params.probe.model_dump()
    if part:
        head["frozen"] = described
    with fresh_directory(out) as into:
        save_weights(into / "backbone.safetensors", backbone.state_dict(), about)
        described_head = {**about, "objective": params.objective, **head}
        save_weights(into / "head.safetensors", {**state, **tensors}, described_head)
        _write_curves(into / "plots" / "metrics", curves)


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


def _load(params: Params, where: str, backbone: Backbone, objective: Objective) -> None:
    state = _checkpoint(params, f"{where}.weights", Path(str(params.weights)))
    if params.head != "trained":
        fill(backbone, without_head(state, backbone.state_dict()), f"{where}.weights")
        return
    body, head = split_head(state)
    fill(backbone, body, f"{where}.weights")
    objective.load_state_dict(fit_head(head, objective.state_dict(), f"{where}.weights"))


def _start(params: Params, where: str, arch: ModuleType, options: Section, backbone: Backbone) -> None:
    """Loads the weights to start from into `backbone`, except those that it declares `fresh`."""
    key = f"{where}.start"
    if params.start == "torchvision":
        if not hasattr(arch, "weights"):
            raise UserError(f"{key}: torchvision has no weights for {params.arch}; name a checkpoint file, or null")
        pretrained = arch.weights(options)
    else:
        pretrained = _checkpoint(params, key, Path(str(params.start)))
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

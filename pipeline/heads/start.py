"""Where a classifier of stage II starts: from the backbone's head, a probe, class means, or vectors in a file.

A backbone's head is the classifier that stage I trained, or, with `backbones.NAME.head: probe`, one that is fitted to
the cached training rows. That probe depends on nothing but the cache and its settings, so whoever needs it takes the
saved one if it is of this cache and these settings, and fits it otherwise.
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch.nn import functional as F

from h2t.cache.memory import available_memory
from h2t.cache.reader import Cache
from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError, in_brief
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Say, silent
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.heads.batches import SampleRows, sample_rows
from h2t.pipeline.heads.features import FeatureReader, first_not_finite, identity_if_pooled, maps_fingerprint
from h2t.pipeline.heads.head import Head
from h2t.pipeline.networks import probe
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.frozen import FrozenPart, load_classifier
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.trained import NONE, StageOneHead, backbone_digest, load_head, save_head

STATISTICS = "stage1"  # a probe is fitted to rows under the statistics that the backbone came with
PROBES: dict[str, str] = {"linear": "head.safetensors", "cosine": "cosine.safetensors"}
COPIES = 4  # copies of the pooled features in memory while a probe is fitted, and of the logits
BLOCK_ROWS = 1024

Kind = Literal["linear", "cosine"]


def _weights(cache: Cache) -> str | None:
    """The digest of the backbone's weights that the cache records; `none` if its features were imported."""
    backbone = cache.spec.fingerprint_inputs.get("backbone")
    return backbone.get("weights") if isinstance(backbone, dict) else None


def imported(cache: Cache) -> bool:
    """Whether the cache holds features that were imported, so that its backbone is unknown."""
    return _weights(cache) == NONE


def check_backbone(cache: Cache, backbone_dir: Path) -> None:
    """Raises UserError unless the cache was extracted by the backbone in `backbone_dir`."""
    expected, recorded = backbone_digest(backbone_dir), _weights(cache)
    if recorded == NONE != expected:
        raise UserError(
            f"{cache.files}: imported features have no backbone; got {backbone_dir}; give none as the backbone, or a "
            "probe of these features"
        )
    if recorded != expected:
        raise UserError(
            f"{cache.files}: this cache was extracted by a backbone with weights {str(recorded)[:12]}, but "
            f"{backbone_dir} has {expected[:12]}; give the backbone that the cache was made with, or extract again"
        )


def fit_probe(
    cache: Cache,
    settings: Probe,
    classifier: Kind,
    device: torch.device,
    frozen: FrozenPart | None,
    say: Say = silent,
    rows: pa.Table | None = None,
) -> StageOneHead:
    """The probe on the pooled training rows of `cache`, view 0 of each sample, after the `frozen` part of the backbone.

    `rows`: some of the cache's rows, to fit to those alone.

    Raises UserError if the cache has several experts, no training rows under `stage1` statistics, maps that are not
    finite, or more of them than fit into memory.
    """
    if cache.experts > 1:
        raise UserError(
            f"{cache.files}: a probe is for backbones of one expert; the cache has {cache.experts}; train this "
            "backbone's own head (head: trained)"
        )
    identity_if_pooled(cache, "gap")  # raises for vectors of another pool
    used = sample_rows(cache.index if rows is None else rows, "train", STATISTICS)
    classes = len(recorded_names(cache.spec.provenance, cache.files))
    channels = cache.spec.maps[0][0]
    width = max(channels, frozen.outputs(channels)) if frozen else channels
    need = 4 * COPIES * len(used.first) * (width + classes)
    if need > (room := available_memory()):
        raise UserError(
            f"{cache.files}: a probe on {counted(len(used.first), 'sample')} needs {sized(need)} of memory; "
            f"{sized(room)} are available; raise the memory limit, or use host crt, which starts from random weights"
        )
    features = FeatureReader(cache, global_average).read(used.first)[0].to(device)
    if not features.isfinite().all() and (row := first_not_finite(cache, used.first)):
        raise UserError(f"{cache.files}: {row} holds NaN or infinity; extract again, or correct and import it again")
    if frozen:
        with torch.no_grad():
            features = frozen.to(device)(features)
    state = probe.fit(features, torch.from_numpy(used.labels).to(device), classes, settings, classifier, say)
    cpu = {name: t.cpu() for name, t in state.items()}
    return StageOneHead(cpu, classifier, settings.scale if classifier == "cosine" else 1.0, frozen)


def save_probe(folder: Path, head: StageOneHead, cache: Cache, settings: Probe) -> None:
    """Writes a probe into `folder`, with what it depends on."""
    save_head(folder / PROBES[head.classifier], head, _of(cache, settings))


def _of(cache: Cache, settings: Probe) -> dict[str, Any]:
    """What a probe depends on, as its file records it."""
    return {
        "head": "probe",
        "probe": settings.model_dump(),
        "cache": maps_fingerprint(cache.spec),
        "backbone": _weights(cache),
    }


def backbone_head(
    cache: Cache, folder: Path, classifier: str, device: torch.device, say: Say, rows: pa.Table | None = None
) -> StageOneHead:
    """The head of the backbone in `folder`: trained in stage I, or a probe of the kind `classifier`.

    `folder` was written by train-backbone or probe, or is `none`; then, and with `head: none`, the result is empty.
    With `rows`, some of the cache's rows, a probe is fitted to those alone. Raises UserError for a probe of another
    cache.
    """
    trained = load_head(folder)
    if str(folder) == NONE or trained.about.get("head") != "probe":
        return trained
    kind: Kind = "cosine" if classifier == "cosine" else "linear"
    settings = build(Probe, f"{folder}: probe", trained.about["probe"])
    if rows is not None:
        return fit_probe(cache, settings, kind, device, trained.frozen, say, rows)
    expected = _of(cache, settings)
    saved = folder if "cache" in trained.about else folder.parent.parent / "probe" / folder.name
    if (saved / PROBES[kind]).is_file():
        state, frozen, about = load_classifier(saved / PROBES[kind])
        if all(about.get(key) == value for key, value in expected.items()):
            return StageOneHead(state, kind, about["scale"], frozen, about)
        if saved == folder:
            raise UserError(
                f"{folder}: must be a probe of this cache, {expected['cache'][:12]}; got one of "
                f"{str(about['cache'])[:12]}; run h2t probe again"
            )
    say(f"fitting the {kind} probe, as {saved} has none of this cache with these settings; h2t probe saves it")
    return fit_probe(cache, settings, kind, device, trained.frozen, say)


def class_means(
    reader: FeatureReader, head: Head, rows: SampleRows, classes: int, classifier: str, device: torch.device
) -> StageOneHead:
    """The mean m of each class's features as its weight, from `head`'s features of view 0 of each training sample.

    A linear classifier has the bias -|m|^2 / 2, so that the nearest mean wins (Snell et al., "Prototypical Networks for
    Few-shot Learning", NeurIPS 2017, eq. (8)); for a cosine classifier means are scaled to length 1, as in LIFT.
    """
    pool = head.pool_state(device)
    total, labels = torch.zeros(0), rows.labels
    for first in range(0, len(rows.first), BLOCK_ROWS):
        part = rows.first[first : first + BLOCK_ROWS]
        with torch.no_grad():
            x = head.features(pool, reader.read(part).to(device, torch.float32)).cpu().double()  # (E, n, D)
        if not first:
            total = x.new_zeros(len(x), classes, x.shape[-1])
        total.index_add_(1, torch.from_numpy(labels[first : first + BLOCK_ROWS]), x)
    means = total / torch.from_numpy(np.bincount(labels, minlength=classes))[:, None]
    if classifier == "cosine":
        return StageOneHead({"weight": F.normalize(means, dim=-1).float()}, classifier, 1.0)
    return StageOneHead({"weight": means.float(), "bias": -means.square().sum(-1).float() / 2}, classifier, 1.0)


def from_file(
    path: Path, digest: str | None, where: str, names: Sequence[str], channels: int, classifier: str
) -> StageOneHead:
    """A classifier of one expert whose weights are the vectors in `path`, such as embeddings of the class names.

    Safetensors hold one vector (C,) under the name of each class. An .npy file holds all of them, (K, C), in the order
    of the names, one a line, in the text file beside it (same name, .txt). Biases are 0. Raises UserError if `digest`
    is not the file's sha256, or if a class is missing, unknown or twice, or a vector has another shape or is not
    finite.
    """
    try:
        content = path.read_bytes()
        listed = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines() if path.suffix == ".npy" else []
    except (OSError, UnicodeDecodeError) as error:
        beside = "; an .npy file needs the class names in a .txt beside it" if path.suffix == ".npy" else ""
        raise UserError(f"{where}: cannot be read ({error}){beside}; name a file of vectors, probe or means") from None
    actual = sha256(content + "\n".join(listed).encode()).hexdigest()
    if digest != actual:
        raise UserError(
            f"{where}_sha256: must be the digest of {path.name}, {actual}; got {digest}; write it there, so that a "
            "changed file is noticed"
        )
    found = _vectors(path, content, listed, where)
    if missing := [name for name in names if name not in found]:
        raise UserError(
            f"{where}: {path.name} has no vector for class {missing[0]!r}; name every class as the cache does"
        )
    if unknown := sorted(set(found) - set(names)):
        raise UserError(
            f"{where}: {path.name} has a vector for {unknown[0]!r}, which is no class of the cache; leave it out"
        )
    for name in names:
        vector = found[name]
        if vector.shape != (channels,) or not vector.is_floating_point() or not vector.isfinite().all():
            raise UserError(
                f"{where}: {path.name} must have {counted(channels, 'finite number')} for class {name!r}, as many as "
                f"the features; got {vector.dtype} {tuple(vector.shape)}; use embeddings of the same space"
            )
    weight = torch.stack([found[name].float() for name in names])[None]
    if classifier == "cosine":
        return StageOneHead({"weight": F.normalize(weight, dim=-1)}, classifier, 1.0)
    return StageOneHead({"weight": weight, "bias": torch.zeros(weight.shape[:2])}, classifier, 1.0)


def _vectors(path: Path, content: bytes, listed: list[str], where: str) -> dict[str, torch.Tensor]:
    """The vectors in a file by class name. Raises UserError."""
    if path.suffix == ".safetensors":
        try:
            return dict(load_tensors(content))
        except (SafetensorError, ValueError, json.JSONDecodeError) as error:
            raise UserError(f"{where}: {path.name} is not a safetensors file ({error}); write it again") from None
    if path.suffix != ".npy":
        raise UserError(f"{where}: must be probe, means, or a .safetensors or .npy file; got {path.name}")
    try:
        values = torch.from_numpy(np.load(BytesIO(content), allow_pickle=False))
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise UserError(
            f"{where}: {path.name} is not an .npy file of numbers ({in_brief(error)}); write it again"
        ) from None
    if values.dim() != 2 or len(values) != len(listed) or len(set(listed)) != len(listed):
        raise UserError(
            f"{where}: {path.name} must have a row for each of the different names in {path.with_suffix('.txt').name}; "
            f"got {tuple(values.shape)} and {counted(len(listed), 'name')}; write both again"
        )
    return dict(zip(listed, values, strict=True))

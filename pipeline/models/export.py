"""One head given back: alone, merged with its backbone into a state dict, and as ONNX; checked before it is left.

The backbone carries the batch-norm statistics that the head is evaluated under, from the cache. Every file's logits are
compared with those that `evaluate` computes from the cached maps, on the images of test rows.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.spec import to_float32
from h2t.cache.reader import Cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import build
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.data.images import Images, Transform, open_images
from h2t.pipeline.evaluation.scoring import head_logits, load_heads_for
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.models.model import Model, load_model, save_model
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import save_weights

CHECKED = 32  # images whose logits are compared
#: What the storage type of the maps may cost in logits, max|d| / max|logit|; arithmetic alone stays below the first.
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
ONNX_TOLERANCE = 1e-4
NEEDS_ONNX = "onnx: needs the packages onnx, onnxscript and onnxruntime; type: pip install 'h2t[onnx]'"


@dataclass(frozen=True)
class Choice:
    """Which head of a stack: its number, or what tells it from the others. What is None is not asked for."""

    number: int | None = None
    ratio: float | None = None
    seed: int | None = None
    donor: str | None = None
    selection: str | None = None


def choose(heads: Heads, choice: Choice, where: str) -> int:
    """The number of the one head that `choice` describes. Raises UserError for none or several."""
    asked = {k: v for k, v in vars(choice).items() if v is not None}
    lines = [h for h in heads.table.to_pylist() if all(h[k] == v for k, v in asked.items())]
    if len(lines) == 1:
        return int(lines[0]["number"])
    has = "; ".join(
        f"{k} {', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in dict.fromkeys(column.to_pylist()))}"
        for k, column in zip(heads.table.column_names, heads.table.columns, strict=True)
        if k in ("ratio", "seed", "donor", "selection") and len(set(column.to_pylist())) > 1
    )
    wanted = ", ".join(f"{k} {v}" for k, v in asked.items()) or "no choice"
    raise UserError(
        f"{where}: {wanted} fits {len(lines)} of {len(heads.table)} heads; "
        f"choose one by --head 0 to {len(heads.table) - 1}" + (f", or of {has}" if has else "")
    )


def only(heads: Heads, number: int) -> Heads:
    """The stack of that one head."""
    state = {name: t[number : number + 1] for name, t in heads.state.items()}
    table = heads.table.slice(number, 1)
    return Heads(state, table.set_column(0, "number", pa.array([0], pa.int64())), heads.about)


def run(
    cache: Cache,
    heads_dir: Path,
    backbone_dir: Path,
    choice: Choice,
    prepare: Mapping[str, Any],
    device: torch.device,
    out: Path,
    say: Callable[[str], None],
    *,
    onnx: bool = False,
    with_images: bool = True,
) -> dict[str, float]:
    """Writes `head.safetensors`, `model.safetensors` and, if asked for, `model.onnx` into the directory `out`.

    `prepare` is that section of the parameters: it tells where images are and how they become input. Without images the
    head is checked on cached maps alone. Returns what the check found: name -> max|d| / max|logit|. Raises UserError.
    """
    if onnx:
        need_onnx()
    heads = load_heads_for(cache, heads_dir, backbone_dir)
    number = choose(heads, choice, str(heads_dir))
    setting = heads.table.to_pylist()[number]
    one = only(heads, number)
    backbone, identity = load_backbone(backbone_dir)
    statistics = batchnorm.from_bytes(cache.statistics)
    kind = heads.about["evaluate"]
    if kind not in statistics:
        raise UserError(f"{cache.files}: holds no {kind!r} batch-norm statistics; extract again")
    batchnorm.use(backbone, statistics[kind])
    images = _images(cache, prepare)
    about = {
        "arch": identity["arch"],
        "options": identity["options"],
        "classes": recorded_names(cache.spec.provenance, cache.files),
        "transform": images.transform.model_dump(),
        "statistics": kind,
        "host": heads.about["host"],
        "setting": {k: setting[k] for k in ("ratio", "donor", "selection", "seed")},
        "backbone": identity["weights"],
        "cache": heads.about["cache"],
    }
    state = {name: t[0] for name, t in one.state.items()}
    rows = _rows(cache, kind)
    expected = head_logits(cache, one, rows, device)[0].cpu()
    with fresh_directory(out) as into:
        head = {**about, "kind": "h2t head 1", "parts": vars(heads.parts)}
        save_weights(into / "head.safetensors", state, head)
        path = into / "model.safetensors"
        plain = save_model(path, backbone, heads.parts, heads.context, state, about)
        model = load_model(path)
        found = _check(model, cache, rows, expected, images if with_images else None, device, say)
        if onnx:
            found["onnx"] = write_onnx(model, into / "model.onnx")
    what = "a state dict of its architecture" if plain else "no plain state dict (the head is not one linear layer)"
    say(
        f"{out}: head {number} (ratio {setting['ratio']:g}, seed {setting['seed']}) under {kind} statistics; "
        f"model.safetensors is {what}; logits agree with evaluate: "
        + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    )
    return found


def _images(cache: Cache, prepare: Mapping[str, Any]) -> Images:
    """The images behind the rows of a cache, by row number."""
    dataset = plugins.load("datasets", prepare["dataset"])
    options = build(dataset.Options, "prepare.options", prepare.get("options", {}))
    recorded = cache.spec.fingerprint_inputs.get("transform")  # a pooled cache has none
    transform = build(Transform, "cache: transform", recorded) if recorded else dataset.transform(options)
    sources, digests = (cache.rows[name].to_pylist() for name in ("source", "digest"))
    return open_images(dataset, options, sources, digests, transform)


def _rows(cache: Cache, statistics: str) -> np.ndarray:
    """Evenly spaced test rows, int64."""
    first = sample_rows(cache.rows, "test", statistics).first
    return first[np.linspace(0, len(first) - 1, min(CHECKED, len(first))).astype(np.int64)]


def _check(
    model: Model,
    cache: Cache,
    rows: np.ndarray,
    expected: torch.Tensor,
    images: Images | None,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, float]:
    """Compares the model with `expected`, the logits (n, K) of evaluate on the cache's `rows`. Raises UserError."""
    allowed = TOLERANCE[cache.spec.dtype]
    if images is None:
        if "pool" in cache.spec.fingerprint_inputs:
            raise UserError(f"{cache.files}: is pooled, so without images nothing can be compared; give the images")
        say("not compared on images: the head is checked on cached maps, the backbone by its digest")
        network: Callable[[torch.Tensor], torch.Tensor] = model.network.head
        given: Any = _maps(cache, rows)
        name = "maps"
    else:
        network, name = model.network.to(device), "images"
        given = _views(images, rows).to(device)
    with torch.no_grad():
        found = network(given).cpu()
    model.network.cpu()
    off = distance(found, expected)
    if not off <= allowed:
        raise UserError(
            f"export: logits on {name} differ from those of evaluate by {off:.1e} of the largest, {allowed:.0e} is "
            "allowed; the backbone or the head is not the one that the cache and the heads were made with"
        )
    return {name: off}


def _maps(cache: Cache, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Cached maps of every expert, float32."""
    read = (cache.read(rows, expert=e) for e in range(cache.experts))
    return tuple(torch.from_numpy(to_float32(maps, cache.spec.dtype)) for maps in read)


def _views(images: Images, rows: np.ndarray) -> torch.Tensor:
    """The evaluation views of `rows`. Raises UserError for an image that is not there or has changed."""
    try:
        return images.batch(rows.tolist(), [None] * len(rows))
    except (KeyError, IndexError, UserError) as error:  # the first two: sources of another dataset
        said = str(error) if isinstance(error, UserError) else f"prepare: not the dataset of this cache ({error!r})"
        raise UserError(f"{said}; or pass --without-images to compare on cached maps alone") from None


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|d| / max|expected|; infinite where shapes differ or a value is not finite."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def need_onnx() -> None:
    """Raises UserError where the optional packages are missing."""
    if not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise UserError(NEEDS_ONNX)


def write_onnx(model: Model, path: Path) -> float:
    """The model as ONNX: `images` float32 (B, 3, S, S), normalised -> `logits` (B, K); B is free.

    Its metadata key `h2t` is `about` as JSON. Returns the distance to the model's logits. Raises UserError, and leaves
    no file, if they differ.
    """
    import onnx

    from h2t.pipeline.models.predict import onnx_session

    size = model.transform.size
    draws = torch.Generator().manual_seed(0)
    example = torch.randn(3, 3, size, size, generator=draws)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"h2t": json.dumps(dict(model.about), sort_keys=True)})
    onnx.save(proto, str(path))
    wanted = torch.randn(5, 3, size, size, generator=draws)  # another batch size than it was traced with
    with torch.no_grad():
        expected = model.network(wanted)
    session, _ = onnx_session(path)
    off = distance(torch.from_numpy(session.run(["logits"], {"images": wanted.numpy()})[0]), expected)
    if not off <= ONNX_TOLERANCE:
        path.unlink()
        raise UserError(f"{path.name}: its logits differ by {off:.1e} of the largest; {ONNX_TOLERANCE:.0e} is allowed")
    return off

"""Exports one head: alone, merged with its backbone into a state dict, and as ONNX. Every file is checked first.

The exported backbone has the batch-norm statistics that the head is evaluated under, taken from the cache. The logits
of the exported model on the images of some test rows are compared with those that `evaluate` computes from the cache.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from h2t.cache.format.spec import to_float32
from h2t.cache.reader import Cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError, first_line
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import Section, build
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.data.images import Images, Transform, open_images
from h2t.pipeline.evaluation.calibration import of_heads
from h2t.pipeline.evaluation.folds import load_folds
from h2t.pipeline.evaluation.scoring import STAGE1, head_logits, load_heads_for, score_heads
from h2t.pipeline.evaluation.tested_groups import groups_of
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.models import stage_one
from h2t.pipeline.models.card import Measured, Stated, card
from h2t.pipeline.models.model import Model, load_model, save_head, save_model
from h2t.pipeline.networks.pretrained import made_with
from h2t.pipeline.networks.trained import load_backbone

CHECKED = 32  # most images whose logits are compared
#: Allowed difference of logits, max|d| / max|logit|, by the storage type of the maps; it is mostly their rounding.
TOLERANCE = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}
ONNX_TOLERANCE = 1e-4
SETTING = ("ratio", "donor", "selection", "seed")  # columns of heads.parquet that every host has
NEEDS_ONNX = "onnx: needs onnx, onnxscript, onnxruntime and torch 2.8 or newer; type: pip install 'h2t[onnx]'"


@dataclass(frozen=True)
class Choice:
    """Selects a head of a stack by its number or by its settings. A field that is None matches every head.

    `constants`: values of constants that the grid of the host has, such as {"lr": 0.05, "loss.tau": 1.0}.
    """

    number: int | None = None
    ratio: float | None = None
    seed: int | None = None
    donor: str | None = None
    selection: str | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)


def choose(heads: Heads, choice: Choice, where: str) -> int:
    """The number of the one head that matches `choice`. Raises UserError if none or several match.

    `where` names the stack in the message.
    """
    asked = {k: v for k, v in vars(choice).items() if v is not None and k != "constants"} | dict(choice.constants)
    if unknown := choice.constants.keys() - set(heads.constants):
        raise UserError(
            f"{where}: --constant {min(unknown)}: no such constant in its grid; it has: "
            f"{', '.join(heads.constants) or 'none'}; leave the option out"
        )
    lines = [h for h in heads.table.to_pylist() if all(h[k] == v for k, v in asked.items())]
    if len(lines) == 1:
        return int(lines[0]["number"])
    values = {k: list(dict.fromkeys(heads.table[k].to_pylist())) for k in (*SETTING, *heads.constants)}
    has = "; ".join(
        (f"--constant {k}=" if k in heads.constants else f"--{k} ")
        + ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found)
        for k, found in values.items()
        if len(found) > 1
    )
    wanted = f"{', '.join(f'{k} {v}' for k, v in asked.items())} matches" if asked else "without a choice there are"
    raise UserError(
        f"{where}: exactly one head must be chosen; {wanted} {len(lines)} of {len(heads.table)}; "
        f"pass --head 0 to {len(heads.table) - 1}" + (f", or a combination of {has}" if has else "")
    )


def run(
    run: Run,
    cache: Cache,
    heads_dir: Path,
    backbone_dir: Path,
    choice: Choice,
    prepare: Mapping[str, Any],
    *,
    onnx: bool = False,
    with_images: bool = True,
    stated: Stated = Stated(),  # noqa: B008 - frozen
) -> dict[str, float]:
    """Writes `head.safetensors`, `model.safetensors`, README.md and, with `onnx`, `model.onnx` into `run.out`.

    With `backbone_dir` in place of `heads_dir`, the head is stage I's own, or the probe. `prepare` is the section
    `prepare` of the parameters; it says where the images are and how they are transformed. Without `with_images`, no
    image is read and only the head is checked, on cached maps. Returns the difference that each check measured: its
    name ("images", "maps" or "onnx") -> max|d| / max|logit|. Raises UserError, and writes nothing, if the inputs do not
    belong together or a difference is too large.
    """
    if onnx:
        need_onnx()
    own = stage_one.is_asked(heads_dir, backbone_dir)
    with stage_one.as_heads(run, cache, backbone_dir) if own else contextlib.nullcontext(heads_dir) as folder:
        heads, folds = load_heads_for(cache, folder, backbone_dir), load_folds(folder)
    number = choose(heads, choice, str(heads_dir))
    setting = heads.table.to_pylist()[number]
    one = heads.of([number])
    backbone, identity = load_backbone(backbone_dir)
    statistics = batchnorm.from_bytes(cache.statistics)
    kind = heads.about["evaluate"]
    if kind not in statistics:
        raise UserError(f"{cache.files}: holds no {kind!r} batch-norm statistics; extract again")
    batchnorm.use(backbone, statistics[kind])
    dataset = plugins.load("datasets", prepare["dataset"])
    options = build(dataset.Options, "prepare.options", prepare.get("options", {}))
    recorded = cache.spec.fingerprint_inputs.get("transform")  # a pooled cache records none
    transform = build(Transform, "cache: transform", recorded) if recorded else dataset.transform(options)
    images = _images(cache, dataset, options, transform) if with_images else None
    about: dict[str, Any] = {
        "arch": identity["arch"],
        "options": identity["options"],
        "classes": recorded_names(cache.spec.provenance, cache.files),
        "transform": transform.model_dump(),
        **({"input": identity["input"]} if "input" in identity else {}),
        "statistics": kind,
        "host": STAGE1 if own else heads.about["host"],
        "setting": {k: setting[k] for k in (*SETTING, *heads.constants)},
        "backbone": identity["weights"],
        "cache": heads.about["cache"],
        "made_with": made_with(identity["arch"]),
    }
    fitted = of_heads(cache, heads, [number], folds, run.device)
    about |= {"temperature": fitted[0]} if fitted else {}
    rows = _rows(cache, kind)
    expected = head_logits(cache, one, rows, run.device)[0]
    with fresh_directory(run.out) as into:
        save_head(into / "head.safetensors", one, about)
        tested = score_heads(cache, one, "test", kind, run.device)
        on_tests = Measured(tested.labels, tested.said[0].guesses, groups_of(cache, kind))
        origin = str(cache.spec.provenance.get("dataset", "unknown"))
        text = card(about, heads.about["counts"], origin, on_tests, stated)
        (into / "README.md").write_text(text, encoding="utf-8")
        path = into / "model.safetensors"
        plain = save_model(path, backbone, one, about)
        model = load_model(path)
        measured = _check(model, run, cache, rows, expected, images)
        if onnx:
            measured["onnx"] = write_onnx(model, into / "model.onnx")
    what = "a state dict of its architecture" if plain else "no plain state dict (the head is not one linear layer)"
    named = "stage I" if own else f"head {number} (ratio {setting['ratio']:g}, seed {setting['seed']})"
    run.say(
        f"{run.out}: {named} under {kind} statistics; "
        f"model.safetensors is {what}; logits agree with evaluate, largest relative difference: "
        + ", ".join(f"{name} {value:.1e}" for name, value in measured.items())
    )
    return measured


def _images(cache: Cache, dataset: Any, options: Section, transform: Transform) -> Images:
    """The images that a cache's rows were made from, indexed by row."""
    sources, digests = (cache.rows[name].to_pylist() for name in ("source", "digest"))
    return open_images(dataset, options, sources, digests, transform)


def _rows(cache: Cache, statistics: str) -> np.ndarray:
    """At most `CHECKED` evenly spaced test rows, int64 (n,)."""
    first = sample_rows(cache.index, "test", statistics).first
    return first[np.linspace(0, len(first) - 1, min(CHECKED, len(first))).astype(np.int64)]


def _check(
    model: Model, run: Run, cache: Cache, rows: np.ndarray, expected: torch.Tensor, images: Images | None
) -> dict[str, float]:
    """Compares the model's logits with `expected` (n, K), which evaluate computes on the cache's `rows` (n,).

    With `images`, the whole model is checked; without, its head on the cached maps. The vectors of a cache pooled by
    gap are maps of one pixel. Raises UserError if the logits differ.
    """
    allowed = TOLERANCE[cache.spec.dtype]
    if images is None:
        pool = cache.spec.fingerprint_inputs.get("pool", "gap")
        if pool != "gap":
            raise UserError(
                f"{cache.files}: without images, a head is checked on maps or their averages (pool gap); got a cache "
                f"pooled by {pool}; export without --without-images"
            )
        run.say("checked without images: the head on cached maps, the backbone by its digest")
        network: Callable[[Any], torch.Tensor] = model.network.on_maps
        given: Any = _maps(cache, rows)
        name = "maps"
    else:
        network, name = model.network.to(run.device), "images"
        given = _views(images, rows).to(run.device)
    with torch.no_grad():
        computed = network(given).cpu()
    model.network.cpu()
    off = distance(computed, expected)
    if not off <= allowed:
        raise UserError(
            f"export: logits on {name} may differ from evaluate's by {allowed:.0e} of the largest; got {off:.1e}; "
            "give the backbone and the cache that the heads were trained with, or extract and train again"
        )
    return {name: off}


def _maps(cache: Cache, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Cached maps of every expert, each float32 (n, C, H, W)."""
    read = (cache.read(rows, expert=e) for e in range(cache.experts))
    return tuple(torch.from_numpy(to_float32(maps, cache.spec.dtype)) for maps in read)


def _views(images: Images, rows: np.ndarray) -> torch.Tensor:
    """The evaluation views of `rows`, (n, 3, S, S). Raises UserError for an image that is missing or has changed."""
    try:
        return images.batch(rows.tolist(), [None] * len(rows))
    except (KeyError, IndexError, UserError) as error:  # the first two: the sources are of another dataset
        said = str(error) if isinstance(error, UserError) else f"prepare: not the dataset of this cache ({error!r})"
        raise UserError(f"{said}; or pass --without-images to check the head on cached maps only") from None


def distance(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """max|computed - expected| / max|expected|; infinity if shapes differ or a value is not finite."""
    if computed.shape != expected.shape or not torch.isfinite(computed).all():
        return float("inf")
    return float((computed - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def need_onnx() -> None:
    """Raises UserError if an optional package for ONNX is missing."""
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
    if old or not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise UserError(NEEDS_ONNX)


def write_onnx(model: Model, path: Path) -> float:
    """Writes the model as ONNX: `images`, normalised float32 (B, 3, S, S) -> `logits`, float32 (B, K), for any B.

    The metadata key `h2t` holds `model.about` as JSON. Returns the `distance` between both models' logits. Raises
    UserError, and leaves no file, if it is above ONNX_TOLERANCE or torch cannot write the network as ONNX.
    """
    import onnx

    from h2t.pipeline.models.predict import onnx_session

    size = model.transform.size
    draws = torch.Generator().manual_seed(0)
    example = torch.randn(3, 3, size, size, generator=draws)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model.network,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"{path.name}: torch must be able to write this network as ONNX; got: {_cause(error)}; export without "
                "--onnx, or with another version of torch"
            ) from None
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"h2t": json.dumps(dict(model.about), sort_keys=True)})
    onnx.save(proto, str(path))
    images = torch.randn(5, 3, size, size, generator=draws)  # not the batch size of the traced example
    with torch.no_grad():
        expected = model.network(images)
    session, _ = onnx_session(path)
    off = distance(torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), expected)
    if not off <= ONNX_TOLERANCE:
        path.unlink()
        raise UserError(
            f"{path.name}: logits may differ from the model's by {ONNX_TOLERANCE:.0e} of the largest; got {off:.1e}; "
            "export without --onnx, or with other versions of torch and onnxruntime"
        )
    return off


def _cause(error: BaseException) -> str:
    """The first line of the error that `error` came from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)

"""Predicts the classes of image files with an exported model."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import replace_file
from h2t.pipeline.base.params import build
from h2t.pipeline.data.images import Images, Transform, decoder
from h2t.pipeline.models.model import load_model

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
BATCH = 64
NEEDS_ONNXRUNTIME = "onnx: needs the package onnxruntime; type: pip install 'h2t[onnx]'"

Logits = Callable[[torch.Tensor], torch.Tensor]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """`paths` with each directory replaced by the image files below it, sorted.

    A file counts as an image by its suffix; a file named in `paths` is taken as it is. Raises UserError for a path that
    does not exist, and if there is no image at all.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or directory; give image files or folders of images")
    if not files:
        raise UserError(
            f"{', '.join(map(str, paths))}: no images there; their names must end in {', '.join(sorted(SUFFIXES))}, "
            "or name each file"
        )
    return files


def onnx_session(path: Path) -> tuple[Any, dict[str, Any]]:
    """An onnxruntime session of a model that `h2t export` wrote, and its metadata.

    Raises UserError if onnxruntime is missing, or the file is missing or of another kind.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(NEEDS_ONNXRUNTIME) from None
    if not path.exists():
        raise UserError(f"{path}: no exported model; make one with h2t export --onnx")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["h2t"])
    except Exception as error:  # noqa: BLE001 - onnxruntime has its own classes of errors
        raise UserError(
            f"{path}: not an ONNX model written by h2t export ({str(error).splitlines()[0]}); export it again"
        ) from None
    return session, about


def open_model(path: Path, device: torch.device) -> tuple[Logits, list[str], Transform]:
    """A model's function from images (B, 3, S, S) to logits (B, K), its class names and its transform.

    Logits are divided by the model's temperature, if it has one, so that their softmax is its confidence.
    `path` is an `.onnx` or `.safetensors` file, or the directory of an export. Raises UserError.
    """
    if path.suffix == ".onnx":
        session, about = onnx_session(path)
        transform = build(Transform, f"{path}: transform", about["transform"])
        temperature = about.get("temperature", 1.0)
        return (
            lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0]) / temperature,
            about["classes"],
            transform,
        )
    model = load_model(path)
    network = model.network.to(device)
    return lambda x: network(x.to(device)).cpu() / model.temperature, model.classes, model.transform


@torch.no_grad()
def predict(
    model: Path, paths: Sequence[Path], device: torch.device, complain: Callable[[str], None], *, top: int = 1
) -> list[dict[str, Any]]:
    """The `top` most probable classes of each image, as lines with the keys image, rank, class and confidence.

    Confidence is the softmax probability, in [0, 1]; rank 1 is the best. `complain` gets one line for each image that
    cannot be read; the image is skipped. Raises UserError if no image is left.
    """
    logits, classes, transform = open_model(model, device)
    files = find_images(paths)
    images = Images([str(f) for f in files], None, lambda name: Path(name).read_bytes(), decoder(transform), transform)
    lines: list[dict[str, Any]] = []
    for batch in _readable(images, len(files), complain):
        best, which = ranked(logits(torch.cat([x for _, x in batch])), top)
        for (number, _), values, indices in zip(batch, best.tolist(), which.tolist(), strict=True):
            lines += [
                {"image": str(files[number]), "rank": rank, "class": classes[index], "confidence": round(value, 6)}
                for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1)
            ]
    if not lines:
        raise UserError(f"predict: no image could be read (given: {len(files)}); the lines above say why")
    return lines


def ranked(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probabilities, float64, and classes, int64, of the `top` largest logits; (n, top) each, best first.

    `logits` is (n, classes). Equal logits stay in class order, as evaluate counts them; `torch.topk` gives no order.
    """
    values = logits.double()
    which = values.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return values.softmax(1).gather(1, which), which


def _readable(images: Images, count: int, complain: Callable[[str], None]) -> Iterator[list[tuple[int, torch.Tensor]]]:
    """Yields batches of at most `BATCH` readable images as (number, input (1, 3, S, S)); complains of the others."""
    batch: list[tuple[int, torch.Tensor]] = []
    for number in range(count):
        try:
            batch.append((number, images.batch([number], [None])))
        except UserError as error:
            complain(str(error))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def as_text(lines: Sequence[dict[str, Any]], kind: str) -> str:
    """`lines` as text; `kind` is `csv` or `json`."""
    if kind == "json":
        return json.dumps(lines, indent=1, ensure_ascii=False) + "\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def save(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Writes `lines` to a .csv or .json file. Raises UserError for another suffix."""
    kind = path.suffix.removeprefix(".")
    if kind not in ("csv", "json"):
        raise UserError(f"{path}: must end in .csv or .json; got {path.suffix or 'no suffix'!r}")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(as_text(lines, kind), encoding="utf-8")
    replace_file(partial, path)

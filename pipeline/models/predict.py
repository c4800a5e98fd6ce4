"""Predicts the classes of images, in files, folders and tables, with an exported model, batch by batch."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from h2t.pipeline.base.errors import UserError, first_line
from h2t.pipeline.base.params import build
from h2t.pipeline.base.progress import progress
from h2t.pipeline.data import list_files, parquet_files, tables
from h2t.pipeline.data.decoding import FORMATS, endings
from h2t.pipeline.data.images import BadImage, Images, Transform
from h2t.pipeline.data.views import decoder
from h2t.pipeline.models.model import load_model

BATCH = 64  # images in a forward pass
NEEDS_ONNXRUNTIME = "onnx: needs the package onnxruntime; type: pip install 'h2t[onnx]'"

Logits = Callable[[torch.Tensor], torch.Tensor]
Opened = tuple[Logits, list[str], Transform]


@dataclass(frozen=True)
class Inputs:
    """Images by name: the path of a file, or FILE:ROW for an image that lies in a Parquet file. `read` gives bytes.

    `notes` say which files in folders are left out.
    """

    names: list[str]
    read: Callable[[str], bytes]
    notes: list[str]


def find_images(paths: Sequence[Path], column: str | None = None) -> Inputs:
    """The images that `paths` name: those below each directory, sorted, those of each table, and single files.

    A file in a directory counts as an image by its ending, unless it is hidden, as in the dataset `image_folder`; links
    are followed. A table (CSV, TSV, JSON Lines, Parquet) names images in `column`, or one of a usual name; paths start
    from the table's folder. A Parquet file may hold images itself. Raises UserError for a path that does not exist, a
    table without such a column, and if there is no image at all.
    """
    names: list[str] = []
    notes: list[str] = []
    stored: dict[str, Callable[[str], bytes]] = {}
    for path in paths:
        if path.is_dir():
            found, others = _inside(path)
            names += found
            notes += list_files.kinds_left_out(path, others)
        elif not path.is_file():
            raise UserError(f"{path}: no such image or directory; give image files, folders of images or tables")
        elif path.suffix.lower() not in tables.ENDINGS:
            names.append(str(path))
        elif column is None and (inside := tables.bytes_column(path)):
            file = parquet_files.opened("predict", path)
            stored[str(path)] = parquet_files.row_reader({str(path): file}, inside, "--column")
            names += [f"{path}:{row:09d}" for row in range(file.metadata.num_rows)]
        else:
            names += _named_in(path, column)
    if not names:
        raise UserError(
            f"{', '.join(map(str, paths))}: no images there; their names must have an ending of {', '.join(FORMATS)}, "
            "or name each file"
        )

    def read(name: str) -> bytes:
        table, _, row = name.rpartition(":")
        return stored[table](name) if table in stored and row.isdecimal() else list_files.read_plain(name)

    return Inputs(names, read, notes)


def _inside(folder: Path) -> tuple[list[str], Counter[str]]:
    """The paths of the images below `folder`, sorted, and how many other files there are, by ending."""
    names: list[str] = []
    others: Counter[str] = Counter()
    known = endings()
    for inside, _, files in list_files.visible(folder, follow_links=True):
        for name in files:
            ending = list_files.stem_and_ending(name)[1]
            if ending in known:
                names.append(f"{inside}/{name}" if str(inside) != "." else name)
            else:
                others[ending or name] += 1
    return sorted(names), others


def _named_in(table: Path, column: str | None) -> list[str]:
    """The paths in a table, as paths from here."""
    known = tables.column_names(table)
    column = column or tables.usual_column(known, tables.PATHS)
    if column not in known:
        raise UserError(
            f"{table}: which column holds the paths of images? There are: {', '.join(known)}; add --column NAME"
        )
    texts = tables.texts(table, column, tables.columns(table, [column])[column])
    here = str(table.parent)
    separated = (text if os.path.isfile(os.path.join(here, text)) else text.replace("\\", "/") for text in texts)  # noqa: PTH113, PTH118
    return [str(table.parent / Path(text).expanduser()) for text in separated]


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
            f"{path}: not an ONNX model written by h2t export ({first_line(error)}); export it again"
        ) from None
    return session, about


def open_model(path: Path, device: torch.device) -> Opened:
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


def predict(
    model: Opened, inputs: Inputs, complain: Callable[[str], None], *, top: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """Yields, for each batch, the `top` most probable classes of each image: keys image, rank, class and confidence.

    Confidence is the softmax probability, in [0, 1]; rank 1 is the best. Bytes of a name that are no UTF-8 are escaped.
    `complain` gets one line for each image that cannot be read; the image is left out. Raises UserError if no image is
    left.
    """
    logits, classes, transform = model
    images = Images(inputs.names, None, inputs.read, decoder(transform), transform)
    count, done = len(inputs.names), 0
    with progress(None, "predict", unit="image", total=count) as bar:
        for first in range(0, count, BATCH):
            wanted = range(first, min(first + BATCH, count))
            numbers, x = _readable(images, wanted, complain)
            bar.update(len(wanted))
            if not numbers:
                continue
            done += len(numbers)
            with torch.no_grad():
                best, which = ranked(logits(x), top)
            names = (os.fsencode(inputs.names[n]).decode("utf-8", "backslashreplace") for n in numbers)
            yield [
                {"image": name, "rank": rank, "class": classes[index], "confidence": round(value, 6)}
                for name, values, indices in zip(names, best.tolist(), which.tolist(), strict=True)
                for rank, (value, index) in enumerate(zip(values, indices, strict=True), 1)
            ]
    if not done:
        raise UserError(f"predict: no image could be read (given: {count}); the lines above say why")


def ranked(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probabilities, float64, and classes, int64, of the `top` largest logits; (n, top) each, best first.

    `logits` is (n, classes). Equal logits stay in class order, as evaluate counts them; `torch.topk` gives no order.
    """
    values = logits.double()
    which = values.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return values.softmax(1).gather(1, which), which


def _readable(images: Images, wanted: range, complain: Callable[[str], None]) -> tuple[list[int], torch.Tensor]:
    """(numbers of the readable images among `wanted`, their input (B, 3, S, S)); complains of the others."""
    try:
        return list(wanted), images.batch(wanted, [None] * len(wanted))
    except UserError:
        pass
    numbers, inputs = [], []
    for number in wanted:
        try:
            inputs.append(images.batch([number], [None]))
            numbers.append(number)
        except BadImage as bad:
            # A way out by a parameter is one for those who train.
            what, *parameter = re.split("(?:;| and) set ", bad.reason, maxsplit=1)
            complain(f"{bad.source}: {what}" + ("; convert it to what the model was trained on" if parameter else ""))
        except UserError as error:
            complain(str(error))
    return numbers, torch.cat(inputs) if inputs else torch.empty(0)

"""A trained classifier of features: its probabilities, and files that `h2t predict` reads."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from h2t.arguments import place, sources, text, whole
from h2t.features import Features, as_array, as_file
from h2t.pipeline.base import device as devices
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.models import predict as images_predict
from h2t.pipeline.models.card import Measured, Stated, card
from h2t.pipeline.models.features import Extractor
from h2t.pipeline.models.model import load_single_head, save_head, save_model


@dataclass(frozen=True)
class Classifier:
    """One trained head. Classes are in the order of the probabilities; `extractor` makes its features, if known.

    `temperature`: what logits are divided by before the softmax, from validation rows. `measured`: its predictions for
    the test samples, if there were any.
    """

    head: Heads = field(repr=False)
    classes: list[str]
    extractor: Extractor | None = field(default=None, repr=False)
    temperature: float = 1.0
    measured: Measured | None = field(default=None, repr=False)
    dataset: str = "unknown"

    def predict_proba(self, features: Any) -> np.ndarray:
        """Probabilities float64 (n, classes) of features (n, D) or maps (n, C, H, W). Raises UserError."""
        given = as_array(features.values if isinstance(features, Features) else features)
        if given.dtype.kind not in "fiu":
            raise UserError(f"features: must be numbers; got {given.dtype}; convert them")
        values = torch.from_numpy(np.require(given, np.float64, ["C", "W"]))
        context = self.head.context
        if values.dim() not in (2, 4) or values.shape[1] != self.head.about.get("map_channels", context.channels):
            raise UserError(
                f"features: must have shape (n, {context.channels}), as those that it was trained on, or be such maps; "
                f"got {tuple(values.shape)}"
            )
        state = {name: t[0].double() for name, t in self.head.state.items()}
        with torch.no_grad():
            ((_, head),) = self.head.kinds(torch.device("cpu"))
            logits = head.logits(state, values[None]) / self.temperature
        result: np.ndarray = logits.softmax(1).numpy()
        wrong = np.flatnonzero(~np.isfinite(result).all(1))
        if wrong.size:
            raise UserError(f"features: must be finite and not too large; row {wrong[0]} has no probabilities")
        return result

    def predict(self, features: Any) -> np.ndarray:
        """The name of the most probable class of each row, text (n,)."""
        return np.array(self.classes)[self.predict_proba(features).argmax(1)]

    def save(self, folder: str | Path, *, licence: str | None = None, use: str | None = None) -> None:
        """Writes head.safetensors, README.md (a model card) and, if the backbone is known, model.safetensors.

        `h2t predict` and `h2t.api.predict` classify images with the last. `licence` and `use`, what the model is meant
        for, are written into the card. Raises OSError.
        """
        setting = self.head.table.to_pylist()[0]
        about = {
            "classes": self.classes,
            "host": self.head.about["host"],
            "setting": {k: v for k, v in setting.items() if k not in ("number", "replaced")},
            "backbone": self.head.about["backbone"],
            "cache": self.head.about["cache"],
            "statistics": "stage1",
            **({"temperature": self.temperature} if self.temperature != 1 else {}),
        }
        made = self.extractor
        stated = Stated(text("licence", licence), text("use", use))
        with fresh_directory(place("folder", folder)) as into:
            if made is not None:
                about |= {**made.about, "transform": made.transform.model_dump()}
                save_model(into / "model.safetensors", made.backbone, self.head, about)
            save_head(into / "head.safetensors", self.head, about)
            page = card(about, self.head.about["counts"], self.dataset, self.measured, stated)
            (into / "README.md").write_text(page, encoding="utf-8")


def load(folder: str | Path) -> Classifier:
    """The classifier that `Classifier.save` or `h2t export` wrote; it takes features. Raises UserError."""
    path = place("folder", folder)
    path = path / "head.safetensors" if path.is_dir() else path
    head = load_single_head(path)
    return Classifier(head, list(head.about["classes"]), temperature=float(head.about.get("temperature", 1.0)))


def predict(model: str | Path | Classifier, of: Any, *, top: int = 1, device: str = "auto") -> pd.DataFrame:
    """The `top` most probable classes of images or features: a table with the columns image, rank, class, confidence.

    `model`: a Classifier, or the folder that `Classifier.save` or `h2t export` wrote. `of`: a folder of images or a
    list of image files or of images of Pillow, which need a model with its backbone; or features (n, D). Rows of
    features and images of Pillow are numbered. Images that cannot be read are left out with a warning. Raises
    UserError.
    """
    top = whole("top", top)
    chosen = devices.choose(device)
    if isinstance(of, str | Path):
        of = [of]
    if isinstance(of, Sequence) and of and isinstance(of[0], str | Path | Image.Image):
        if isinstance(model, Classifier):
            with TemporaryDirectory() as folder:
                model.save(Path(folder) / "model")
                return predict(Path(folder) / "model", of, top=top, device=device)
        opened = images_predict.open_model(place("model", model), chosen)
        pictures = sum(isinstance(one, Image.Image) for one in of)
        if pictures not in (0, len(of)):
            raise UserError("images: must be all image files or all images of Pillow; got both; predict them apart")
        if pictures:
            found = images_predict.Inputs([str(i) for i in range(len(of))], lambda number: as_file(of[int(number)]), [])
        else:
            found = images_predict.find_images([place("images", path) for path in of])
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        batches = images_predict.predict(opened, found, _warn, top=top)
        return pd.DataFrame([line for lines in batches for line in lines])
    classifier = model if isinstance(model, Classifier) else load(model)
    probabilities = torch.from_numpy(classifier.predict_proba(of))
    best, which = images_predict.ranked(probabilities.log(), top)
    names = (sources(of.source, len(best)) if isinstance(of, Features) else None) or range(len(best))
    lines = [
        {"image": name, "rank": rank, "class": classifier.classes[k], "confidence": value}
        for name, row, ks in zip(names, best.tolist(), which.tolist(), strict=True)
        for rank, (value, k) in enumerate(zip(row, ks, strict=True), 1)
    ]
    return pd.DataFrame(lines, columns=["image", "rank", "class", "confidence"])


def _warn(line: str) -> None:
    warnings.warn(f"skipped: {line}", stacklevel=2)

"""Features of images, of a cache or of arrays: what `h2t.api` trains on and predicts from."""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from PIL import Image

from h2t.arguments import column, keys, place, sources, text, whole
from h2t.cache.format.rows import SPLITS
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Index, Section, build
from h2t.pipeline.data import labels as texts
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.data.decoding import ORIENTATION
from h2t.pipeline.data.images import Collection, Images, open_images
from h2t.pipeline.data.splits import HoldOut, Labelled, SmallClasses, hold_out
from h2t.pipeline.data.transforms import OWN
from h2t.pipeline.data.views import decoder
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.models import predict as images_predict
from h2t.pipeline.models.features import Extractor, extractor
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.project.detect import detect
from h2t.pipeline.sharing.feature_files import channels_seem_last


@dataclass(frozen=True)
class Features:
    """Features of n samples. NumPy and scikit-learn take it as the array `values`, float32 (n, D).

    `source` names each sample. `labels`, `split` (train, val or test) and `group` are None where they are not known.
    `extractor` is the backbone that they were computed by, so that classifiers trained on them can be saved with it.
    """

    values: np.ndarray
    source: list[str]
    labels: list[str] | None = None
    split: list[str] | None = None
    group: list[str] | None = None
    extractor: Extractor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values, for `np.asarray`."""
        return np.array(self.values, dtype, copy=copy)


def extract_features(
    images: str | Path | Iterable[str | Path | np.ndarray | Image.Image] | np.ndarray,
    backbone: str = "resnet50",
    *,
    weights: str = "pretrained",
    options: Mapping[str, Any] | None = None,
    input: Mapping[str, Any] | None = None,
    label: str | None = None,
    split: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> Features:
    """Features of images by a frozen backbone, or those of a cache.

    `images` is one of: a folder or table as `h2t init` reads it, with labels (`label` names their column); a list of
    image files, images of Pillow or arrays, or an array of images, uint8 (n, H, W, 3) or (n, H, W); the path or URL of
    a cache, of which only `split` is read if that is given (view 0 of each sample, averaged over the map, under the
    statistics `stage1`).

    `backbone`: a plug-in or PLUG-IN:MODEL, such as timm:convnext_tiny; `weights`: pretrained, none (random) or a file;
    `options` and `input` as in `backbones.NAME` of params.yaml. Raises UserError.
    """
    batch_size, label, split = whole("batch_size", batch_size), text("label", label), text("split", split)
    if not isinstance(backbone, str):
        raise UserError(f"backbone: must be the name of a plug-in or PLUG-IN:MODEL; got {backbone!r:.60}")
    if not isinstance(weights, str | Path):
        raise UserError(f"weights: must be pretrained, none or a file; got {weights!r:.60}")
    options, input = keys("options", options), keys("input", input)
    cache = as_cache(images)
    if split is not None and (cache is None or split not in SPLITS):
        raise UserError(f"split: must be train, val or test of a cache, or None; got {split!r:.60}")
    if label is not None and (cache is not None or not isinstance(images, str | Path)):
        raise UserError(f"label: must be a column of a table of images, or None; got {label!r:.60}")
    if cache is not None:
        with cache:
            return _of_cache(cache, split)
    collection: Collection | None = None
    if isinstance(images, str | Path):
        found = detect(Path(images), label)
        dataset, collection = plugins.load("datasets", found.dataset), found.collection
        chosen = build(dataset.Options, "options", found.options)
        opened = open_images(dataset, chosen, collection.source, None, dataset.transform(chosen))
    else:
        opened = _opened(images)
    made = extractor(
        backbone,
        opened.transform,
        devices.choose(device),
        weights=str(weights),
        options=options,
        given=input,
        batch_size=batch_size,
    )
    values = made.features(opened)
    if collection is None:
        return Features(values, list(opened.sources), extractor=made)
    names = [collection.classes[j] for j in collection.label]
    splits = collection.split if set(collection.split) != {"train"} else None
    group = None if collection.group is None else list(collection.group)
    return Features(values, list(collection.source), names, splits, group, made)


def as_cache(given: Any) -> Cache | None:
    """The open cache at a path or URL; None for anything else."""
    if isinstance(given, str | Path) and ("://" in str(given) or (place("path", given) / "cache.json").is_file()):
        return open_cache(given)
    return None


def _of_cache(cache: Cache, split: str | None) -> Features:
    names = recorded_names(cache.spec.provenance, cache.files)
    rows = cache.rows
    values, splits, picked = [], [], []
    for part in [split] if split else sorted(set(rows["split"].to_pylist())):
        found = sample_rows(rows, part, "stage1")
        features = FeatureReader(cache, global_average).read(found.first)  # (E, n, C)
        values.append(features.movedim(0, 1).flatten(1).numpy())
        splits += [part] * len(found.first)
        picked.append(found.first)
    at = pa.array(np.concatenate(picked))
    own = [names[j] for j in rows["label"].take(at).to_pylist()]
    return Features(np.concatenate(values), rows["source"].take(at).to_pylist(), own, splits)


def _opened(images: Iterable[str | Path | np.ndarray | Image.Image] | np.ndarray) -> Images:
    """Images in memory or in files. Raises UserError for anything else."""
    if isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[2] == 3:
        raise UserError(f"images: an array {images.shape} is one image; give a list of images, [image]")
    if isinstance(images, Mapping | Set):
        raise UserError(f"images: must be a list, which has an order; got {type(images).__name__}")
    if np.ma.is_masked(images):
        raise UserError("images: must have a value everywhere; got an array with masked values; fill them in")
    many = isinstance(images, Iterable) and getattr(images, "shape", True) != ()
    given: list[Any] = list(images) if many else [images]
    if not given:
        raise UserError("images: must have at least one image; got none")
    numbers = [str(i) for i in range(len(given))]
    if all(isinstance(one, Image.Image) for one in given):
        return Images(numbers, None, lambda number: as_file(given[int(number)]), decoder(OWN), OWN)
    if all(isinstance(one, np.ndarray) for one in given):
        for i, one in enumerate(given):
            if one.dtype != np.uint8 or one.ndim not in (2, 3) or (one.ndim == 3 and one.shape[2] != 3):
                raise UserError(
                    f"images: must be uint8 of shape (H, W, 3) or (H, W); image {i} is {one.dtype} {one.shape}"
                )

        def decode(name: bytes) -> np.ndarray:
            one = given[int(name)]
            return one if one.ndim == 3 else np.repeat(one[..., None], 3, 2)

        return Images(numbers, None, str.encode, decode, OWN)
    if other := [one for one in given if not isinstance(one, str | Path)]:
        raise UserError(
            "images: must be all image files, all images of Pillow, or all arrays of uint8 (H, W, 3) or (H, W); got "
            f"{type(other[0]).__name__}; a tensor (n, 3, H, W) becomes them by tensor.permute(0, 2, 3, 1).numpy()"
        )
    found = images_predict.find_images([place("images", path) for path in given])
    return Images(found.names, None, found.read, decoder(OWN), OWN)


def as_file(image: Image.Image) -> bytes:
    """An image of Pillow as a file, so that its colours and orientation are treated as those of files are."""
    file, exif = io.BytesIO(), Image.Exif()
    image.load()  # which turns a TIFF already, so that its orientation must be asked for afterwards
    if image.mode in ("HSV", "RGBa", "La"):  # no file holds these
        orientation = image.getexif().get(ORIENTATION, 1)
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA" if image.mode == "La" else "RGB")
        image.getexif()[ORIENTATION] = orientation
    exif[ORIENTATION] = image.getexif().get(ORIENTATION, 1)  # other tags of a camera would describe another image
    image.save(file, "TIFF", exif=exif)
    return file.getvalue()


def gathered(
    features: Any, labels: Sequence[Any] | None, split: Sequence[str] | None, groups: Sequence[Any] | None
) -> Features:
    """`features` with what is given beside them. Raises UserError if a list has another length.

    Warns the caller's caller of maps whose channels seem to come last.
    """
    known = features if isinstance(features, Features) else None
    values = as_array(features.values if known else features)
    rows = len(values)
    if not rows:
        raise UserError("features: must have at least one row; got none")
    beside = {"labels": labels, "split": split, "groups": groups}
    if known:
        own = {"labels": known.labels, "split": known.split, "groups": known.group}
        beside = {name: own[name] if given is None else given for name, given in beside.items()}
    labels, split, groups = (column(name, given, rows) for name, given in beside.items())
    if channels_seem_last(values.shape):
        warnings.warn(
            f"features: {values.shape} are taken as (n, C, H, W); if channels come last, give "
            "features.transpose(0, 3, 1, 2)",
            stacklevel=3,
        )
    if unknown := sorted(set(split or ()) - set(SPLITS), key=str):
        raise UserError(f"split: must be train, val or test; got {unknown[0]!r}; rename it")
    names = sources(known.source, rows) if known else None
    names = names or [f"{i:09d}" for i in range(rows)]
    return Features(values, names, labels, split, groups, known.extractor if known else None)


def as_array(features: Any) -> np.ndarray:
    """Features as an array; tensors may lie on any device and carry gradients. Raises UserError."""
    if np.ma.is_masked(features):
        raise UserError("features: must have a value everywhere; got an array with masked values; fill them in")
    try:
        if isinstance(features, torch.Tensor):
            features = features.detach().cpu()
            features = features.float() if features.dtype == torch.bfloat16 else features
        values = np.asarray(features)
    except (ValueError, TypeError, RuntimeError) as error:  # rows of different lengths, a sparse tensor
        raise UserError(f"features: must be numbers of shape (n, C) or (n, C, H, W); {error}") from None
    if not values.ndim:
        raise UserError(f"features: must be numbers of shape (n, C) or (n, C, H, W); got {type(features).__name__}")
    return values


def labels_of(given: Features) -> list[Any]:
    """The label of each row. Raises UserError if there are none, or if they would not stay apart as text."""
    if given.labels is None:
        raise UserError("labels: one for each row is needed; got none")
    texts_among = sum(isinstance(label, str) for label in given.labels)
    if texts_among not in (0, len(given.labels)):
        raise UserError("labels: must be texts or whole numbers throughout; got both; convert them")
    return given.labels


class Shares(Section):
    """What is held out of each class, and the seed that decides which rows."""

    test: HoldOut | None = None
    validation: HoldOut | None = None
    seed: Index = 0


def held_out(given: Features, shares: Shares) -> list[str]:
    """The split of each row, with test and validation rows held out where there are none.

    Raises UserError if no row is left for testing, or all are of one class.
    """
    classes, label = texts.numbered([str(value) for value in labels_of(given)])
    split = given.split or ["train"] * len(given)
    if len(classes) < 2:
        raise UserError(f"labels: must name two or more classes; got one, {classes[0]!r}")
    # As in a table of images, a row without the name of a group is a group of its own.
    rows = zip(given.group or (), given.source, strict=given.group is not None)
    group = [source if pd.isna(name) or name == "" else str(name) for name, source in rows] if given.group else None
    found = Labelled.of(Collection(classes, given.source, label, split, group))
    for part, how in (("test", shares.test), ("val", shares.validation)):
        if how and part not in found.split:
            hold_out(found, part, how, SmallClasses(), shares.seed)
    if "test" not in found.split:
        raise UserError(
            f"test: must leave at least one row for testing; got {shares.test or 0}; give a larger share, or rows with "
            "split test"
        )
    return [str(part) for part in found.split]

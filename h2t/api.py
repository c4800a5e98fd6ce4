"""H2T from Python: features of images, methods compared on them, predictions, and caches to share.

    from h2t.api import compare, extract_features, predict, write_cache

    photos = extract_features("photos", "resnet50")                       # a folder for each class
    found = compare(photos, methods=["crt", "dr"], ratios=[0.0, 0.3])
    print(found.table)
    found.take("dr").save("model")
    predict("model", "new photos")

Everything is computed by the functions of the stages, on a cache in a temporary folder. Errors that a user can mend are
`h2t.pipeline.base.errors.UserError`, one line each. Needs `pip install 'h2t[pipeline]'`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from h2t.cache.format.spec import CacheSpec
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run, Say, silent
from h2t.pipeline.base.text import counted
from h2t.pipeline.data import labels as texts
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.data.images import Collection, Images, open_images
from h2t.pipeline.data.splits import AtMost, Labelled, SmallClasses, hold_out
from h2t.pipeline.data.transforms import OWN
from h2t.pipeline.data.views import decoder
from h2t.pipeline.evaluation.calibration import of_heads
from h2t.pipeline.evaluation.folds import load_folds
from h2t.pipeline.evaluation.image_groups import groups_of
from h2t.pipeline.evaluation.scoring import Scores, score_heads
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.host_entry import heads_of
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.stored import Heads, load_heads
from h2t.pipeline.models import predict as images_predict
from h2t.pipeline.models.card import Measured, Stated, card
from h2t.pipeline.models.features import Extractor, extractor
from h2t.pipeline.models.model import load_single_head, save_head, save_model
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.trained import NONE
from h2t.pipeline.project.detect import detect
from h2t.pipeline.sharing import importing
from h2t.pipeline.sharing.feature_files import channels_seem_last
from h2t.pipeline.stages import evaluate, probe, train_classifier

__all__ = ["Classifier", "Comparison", "Features", "compare", "extract_features", "load", "predict", "write_cache"]

PROBE = "probe"  # the line of the logistic regression that is fitted to the training features
FIGURES = ("top1", "head", "medium", "tail", "ece")
NOT_SETTINGS = ("number", "seed", "replaced")  # columns of the table of heads


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
    images: str | Path | Sequence[str | Path] | np.ndarray,
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
    image files; an array of images, uint8 (n, H, W, 3) or (n, H, W); the path or URL of a cache, of which only `split`
    is read if that is given (view 0 of each sample, averaged over the map, under the statistics `stage1`).

    `backbone`: a plug-in or PLUG-IN:MODEL, such as timm:convnext_tiny; `weights`: pretrained, none (random) or a file;
    `options` and `input` as in `backbones.NAME` of params.yaml. Raises UserError.
    """
    if (cache := _as_cache(images)) is not None:
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
        weights=weights,
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


def write_cache(
    out: str | Path,
    features: Any,
    labels: Sequence[Any] | None = None,
    *,
    split: Sequence[str] | None = None,
    source: Sequence[str] | None = None,
    replace: bool = False,
) -> CacheSpec:
    """Writes arrays as a cache, which a team can share (docs/sharing.md) and every stage after `extract` can read.

    `features`: numbers (n, D) or maps (n, C, H, W), or Features. `labels`: n texts or whole numbers. `split`: train,
    val or test for each row; None makes all rows training rows. `source`: a distinct name for each row. Raises
    UserError, and CacheError `exists` for a cache that is there already, unless `replace`.
    """
    given = _gathered(features, labels, split, None)
    _warn_of_axes(given.values)
    parts = importing.split_parts(given.values, _labels(given), given.split, source or given.source)
    return importing.run(parts, Path(out), silent, replace=replace)


def _warn_of_axes(values: Any) -> None:
    if channels_seem_last(values.shape):
        warnings.warn(
            f"features: {values.shape} are taken as (n, C, H, W); if channels come last, give "
            "features.transpose(0, 3, 1, 2)",
            stacklevel=3,
        )


def compare(
    features: Any,
    labels: Sequence[Any] | None = None,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("crt", "dr"),
    ratios: Sequence[float] = (0.0, 0.3),
    seeds: Sequence[int] = (0, 1, 2),
    split: Sequence[str] | None = None,
    groups: Sequence[Any] | None = None,
    test: float | Mapping[str, int] = 0.2,
    validation: float | Mapping[str, int] = 0.2,
    epochs: int = 10,
    l2: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    say: Say = silent,
) -> "Comparison":
    """Trains methods of stage II on features, without H2T and with it, and measures them on test rows.

    `features`: Features, an array (n, D) or (n, C, H, W) with n `labels`, or the path or URL of a cache with training
    and test rows. `methods`: names of hosts (h2t list hosts), or name -> keys of an entry of `hosts` in params.yaml.
    `ratios`: shares of the channels that H2T replaces; 0 is the method without it. `epochs` is that of every method
    whose keys say nothing else.

    Where `split` (train, val or test for each row) has no test or validation rows, they are held out of each class: a
    share, or `{"at_most": n, "keep": k}`; rows of one of the `groups` stay together. Ratios are chosen on validation
    rows, never on test rows. `l2` is the penalty of the logistic regression (`probe`) that methods start from; it is a
    line of the table, too. Raises UserError.
    """
    chosen = devices.choose(device)
    entries = {name: {} for name in methods} if not isinstance(methods, Mapping) else dict(methods)
    asked = {name: _entry(name, entry, ratios, seeds, epochs) for name, entry in entries.items()}
    made = features.extractor if isinstance(features, Features) else None
    with TemporaryDirectory(prefix="h2t-") as folder:
        root = Path(folder)
        cache = _as_cache(features) if labels is None else None
        if cache is None:
            given = _gathered(features, labels, split, groups)
            _warn_of_axes(given.values)
            held = _held_out(given, test, validation, seed)
            parts = importing.split_parts(given.values, _labels(given), held, given.source)
            importing.run(parts, root / "cache", say)
            if say is silent and (note := importing.scale_note(parts["train"])):  # otherwise it is said
                warnings.warn(note, stacklevel=2)
            cache = open_cache(root / "cache")
        with cache:
            names = recorded_names(cache.spec.provenance, cache.files)
            start = _start(cache, root / "probe", l2, chosen, seed, say)
            stacks, lines = {}, []
            for name, params in asked.items():
                run = Run(name, root / "heads" / name, chosen, seed, say)
                train_classifier.run(params, run, Residency(), cache, start)
                scored = Run(name, root / "evaluate" / name, chosen, seed, say)
                evaluate.run(evaluate.Params(), scored, cache, run.out, start)
                heads = load_heads(run.out)
                figures = pq.ParquetFile(scored.out / "heads.parquet").read()
                lines += _lines(name, figures.to_pylist(), heads.table.column_names)
                tested = score_heads(cache, heads, "test", heads.about["evaluate"], chosen)
                warm = of_heads(cache, heads, range(len(heads.table)), load_folds(run.out), chosen)
                of = sample_rows(cache.index, "test", tested.statistics)
                of_image = groups_of(cache, of.first, of.samples)
                stacks[name] = _Stack(heads, tested, of_image, warm or [1.0] * len(heads.table))
            dataset = str(cache.spec.provenance.get("dataset", "unknown"))
    return Comparison(_table(lines), names, dataset, lines, stacks, made)


@dataclass(frozen=True)
class _Stack:
    """The heads of a method, their predictions for the test rows, the groups of these, and the temperature of each."""

    heads: Heads
    tested: Scores
    groups: np.ndarray
    temperatures: list[float]


@dataclass(frozen=True)
class Comparison:
    """Trained methods. `table` has a line for each method and ratio, figures in percent: the mean over the seeds.

    top1: accuracy on the test rows; head, medium, tail: mean accuracy of the classes of each third, by training count
    (`paper_index`); ece: calibration error; top1_sd: standard deviation over the seeds; val_top1: accuracy on the
    validation rows, which ratios are chosen by, if there are such rows.
    """

    table: pd.DataFrame
    classes: list[str]
    dataset: str
    lines: list[dict[str, Any]] = field(repr=False)
    stacks: Mapping[str, _Stack] = field(repr=False)
    extractor: Extractor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return self.table.to_string(float_format="{:.2f}".format)

    def _repr_html_(self) -> str:
        return str(self.table.to_html(float_format="{:.2f}".format))

    def take(self, method: str, *, ratio: float | None = None, seed: int | None = None) -> "Classifier":
        """One trained classifier; without `ratio` the one of the best validation accuracy, else the largest ratio.

        Without `seed` the first one. Raises UserError if there is no such classifier.
        """
        if method not in self.stacks:
            raise UserError(f"method: must be one of {', '.join(self.stacks)}; got {method!r}")
        mine = [line for line in self.lines if line["method"] == method]
        found = [line for line in mine if ratio in (None, line["settings"]["ratio"])]
        if not found:
            ratios = ", ".join(f"{line['settings']['ratio']:g}" for line in mine)
            raise UserError(f"ratio: must be one of {ratios}; got {ratio}")
        best = max(found, key=lambda line: line.get("val_top1", line["settings"]["ratio"]))
        numbers = best["numbers"]
        if seed is not None and seed not in numbers:
            raise UserError(f"seed: must be one of {', '.join(map(str, numbers))}; got {seed}")
        number = numbers[min(numbers) if seed is None else seed]
        stack = self.stacks[method]
        measured = Measured(stack.tested.labels, stack.tested.said[number].guesses, stack.groups)
        one = stack.heads.of([number])
        return Classifier(one, self.classes, self.extractor, stack.temperatures[number], measured, self.dataset)


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
        values = torch.from_numpy(np.require(np.asarray(features), np.float64, ["C", "W"]))
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
        with fresh_directory(Path(folder)) as into:
            if made is not None:
                about |= {**made.about, "transform": made.transform.model_dump()}
                save_model(into / "model.safetensors", made.backbone, self.head, about)
            save_head(into / "head.safetensors", self.head, about)
            text = card(about, self.head.about["counts"], self.dataset, self.measured, Stated(licence, use))
            (into / "README.md").write_text(text, encoding="utf-8")


def load(folder: str | Path) -> Classifier:
    """The classifier that `Classifier.save` or `h2t export` wrote; it takes features. Raises UserError."""
    path = Path(folder) / "head.safetensors" if Path(folder).is_dir() else Path(folder)
    head = load_single_head(path)
    return Classifier(head, list(head.about["classes"]), temperature=float(head.about.get("temperature", 1.0)))


def predict(model: str | Path | Classifier, of: Any, *, top: int = 1, device: str = "auto") -> pd.DataFrame:
    """The `top` most probable classes of images or features: a table with the columns image, rank, class, confidence.

    `model`: a Classifier, or the folder that `Classifier.save` or `h2t export` wrote. `of`: a folder of images or a
    list of image files, which need a model with its backbone; or features (n, D), whose rows are numbered. Images that
    cannot be read are left out with a warning. Raises UserError.
    """
    if isinstance(of, str | Path) or (isinstance(of, Sequence) and of and isinstance(of[0], str | Path)):
        paths = [Path(of)] if isinstance(of, str | Path) else [Path(path) for path in of]
        if isinstance(model, Classifier):
            with TemporaryDirectory() as folder:
                model.save(Path(folder) / "model")
                return predict(Path(folder) / "model", of, top=top, device=device)
        opened = images_predict.open_model(Path(model), devices.choose(device))
        found = images_predict.find_images(paths)
        for note in found.notes:
            warnings.warn(note, stacklevel=2)
        batches = images_predict.predict(opened, found, _warn, top=top)
        return pd.DataFrame([line for lines in batches for line in lines])
    classifier = model if isinstance(model, Classifier) else load(model)
    probabilities = torch.from_numpy(classifier.predict_proba(of))
    best, which = images_predict.ranked(probabilities.log(), top)
    names = of.source if isinstance(of, Features) else range(len(best))
    lines = [
        {"image": name, "rank": rank, "class": classifier.classes[k], "confidence": value}
        for name, row, ks in zip(names, best.tolist(), which.tolist(), strict=True)
        for rank, (value, k) in enumerate(zip(row, ks, strict=True), 1)
    ]
    return pd.DataFrame(lines, columns=["image", "rank", "class", "confidence"])


def trained(
    features: np.ndarray,
    labels: Sequence[Any],
    method: str,
    entry: Mapping[str, Any],
    *,
    ratio: float,
    epochs: int,
    l2: float,
    seed: int,
    device: torch.device,
    folder: Path,
) -> Classifier:
    """One classifier trained on all rows, with temporary files in `folder`; what is given as in `compare`.

    Raises UserError, also if `entry` asks for several.
    """
    params = _entry(method, entry, [ratio], [seed], epochs)
    fitted = plugins.load("hosts", params.host).Host.fitted
    if (asked := len(heads_of(params.grid, fitted=fitted))) > 1:
        raise UserError(f"methods.{method}.grid: must ask for one classifier; got {asked}; give each key one value")
    importing.run(importing.split_parts(features, labels, None, None), folder / "cache", silent)
    with open_cache(folder / "cache") as cache:
        start = _start(cache, folder / "probe", l2, device, seed, silent)
        train_classifier.run(params, Run(method, folder / "heads", device, seed), Residency(), cache, start)
        return Classifier(load_heads(folder / "heads"), recorded_names(cache.spec.provenance, cache.files))


def _warn(line: str) -> None:
    warnings.warn(f"skipped: {line}", stacklevel=2)


def _as_cache(given: Any) -> Cache | None:
    """The open cache at a path or URL; None for anything else."""
    if isinstance(given, str | Path) and ("://" in str(given) or (Path(given) / "cache.json").is_file()):
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


def _opened(images: Sequence[str | Path] | np.ndarray) -> Images:
    """Images in memory or in files. Raises UserError for anything else."""
    if isinstance(images, np.ndarray) or (len(images) and isinstance(images[0], np.ndarray)):
        arrays = [np.asarray(one) for one in images]
        for i, one in enumerate(arrays):
            if one.dtype != np.uint8 or one.ndim not in (2, 3) or (one.ndim == 3 and one.shape[2] != 3):
                raise UserError(
                    f"images: must be uint8 of shape (H, W, 3) or (H, W); image {i} is {one.dtype} {one.shape}"
                )

        def decode(name: bytes) -> np.ndarray:
            one = arrays[int(name)]
            return one if one.ndim == 3 else np.repeat(one[..., None], 3, 2)

        return Images([str(i) for i in range(len(arrays))], None, str.encode, decode, OWN)
    found = images_predict.find_images([Path(path) for path in images])
    return Images(found.names, None, found.read, decoder(OWN), OWN)


def _gathered(
    features: Any, labels: Sequence[Any] | None, split: Sequence[str] | None, groups: Sequence[Any] | None
) -> Features:
    """`features` with what is given beside them. Raises UserError if a list has another length."""
    if not isinstance(features, Features):
        values = np.asarray(features)
        features = Features(values, [f"{i:09d}" for i in range(len(values))] if values.ndim else [])
    beside = {"labels": labels, "split": split, "group": groups}
    for name, column in beside.items():
        if column is not None and len(column) != len(features):
            raise UserError(
                f"{name}: must have one value for each of {counted(len(features), 'row')}; got {len(column)}"
            )
    own = {name: getattr(features, name) if column is None else list(column) for name, column in beside.items()}
    return Features(features.values, features.source, own["labels"], own["split"], own["group"], features.extractor)


def _labels(given: Features) -> list[Any]:
    if given.labels is None:
        raise UserError("labels: one for each row is needed; got none")
    return given.labels


def _held_out(given: Features, test: Any, validation: Any, seed: int) -> list[str]:
    """The split of each row, with test and validation rows held out where there are none."""
    classes, label = texts.numbered([str(value) for value in _labels(given)])
    split = given.split or ["train"] * len(given)
    group = None if given.group is None else [str(value) for value in given.group]
    found = Labelled.of(Collection(classes, given.source, label, split, group))
    for part, how in (("test", test), ("val", validation)):
        if how and part not in found.split:
            chosen = build(AtMost, part, how) if isinstance(how, Mapping) else float(how)
            hold_out(found, part, chosen, SmallClasses(), seed)
    if "test" not in found.split:
        raise UserError(
            f"test: must leave at least one row for testing; got {test}; give a larger share, or rows with split test"
        )
    return [str(part) for part in found.split]


def _entry(
    name: str, entry: Mapping[str, Any], ratios: Sequence[float], seeds: Sequence[int], epochs: int
) -> train_classifier.Params:
    """The parameters of the method `name`. Raises UserError, which names the key."""
    if not isinstance(entry, Mapping):
        raise UserError(f"methods.{name}: must be keys of an entry of hosts with their values; got {entry!r}")
    own = _plain(entry)
    host = str(own.get("host", name))
    plugins.check("hosts", host)
    values: dict[str, Any] = {"host": host, "backbone": "features", "batchnorm": "stage1"}
    if not plugins.load("hosts", host).Host.fitted:
        values["grid"] = {"ratio": _plain(ratios), "seed": _plain(seeds)}
        values["optimiser"] = {"epochs": _plain(epochs)}
    for key in values.keys() & own.keys():
        if isinstance(values[key], dict) and isinstance(own[key], dict):  # `epochs` stays beside a learning rate
            own[key] = {**values[key], **own[key]}
    return build(train_classifier.Params, f"methods.{name}", {**values, **own})


def _plain(given: Any) -> Any:
    """`given` with NumPy's numbers and arrays as Python's, which parameters are."""
    if isinstance(given, Mapping):
        return {key: _plain(value) for key, value in given.items()}
    if isinstance(given, list | tuple | range):
        return [_plain(value) for value in given]
    return given.tolist() if isinstance(given, np.generic | np.ndarray) else given


def _start(cache: Cache, out: Path, l2: float, device: torch.device, seed: int, say: Say) -> Path:
    """The folder of the probe that methods start from. A cache of a backbone that is known gets one as well."""
    settings = build(Probe, "probe", {"l2": _plain(l2)})
    probe.run("probe", settings, Run("features", out, device, seed, say), cache, Path(NONE))
    return out


def _lines(method: str, heads: list[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each setting of the method, from evaluate's figures of each head: the mean over the seeds.

    `columns` are those of the table of heads, settings among them.
    """
    statistics = heads[0]["statistics"]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    settings = [name for name in columns if name not in NOT_SETTINGS]
    for line in heads:
        if line["statistics"] != statistics and line["number"] >= 0:
            continue
        own = {name: line[name] for name in settings} if line["number"] >= 0 else {}
        key = (method if own else PROBE, *own.values())
        one = found.setdefault(key, {"method": key[0], "settings": own, "numbers": {}, "test": [], "val": []})
        one["numbers"][line["seed"]] = line["number"]
        one[line["split"]].append(line)
    lines = []
    for one in found.values():
        test, val = one.pop("test"), one.pop("val")
        one |= {figure: _mean([line[figure] for line in test]) for figure in FIGURES}
        tops = [line["top1"] for line in test]
        one |= {"top1_sd": float(np.std(tops, ddof=1)) if len(tops) > 1 else None}
        one |= {"val_top1": _mean([line["top1"] for line in val])} if val else {}
        lines.append({**one, "seeds": len(tops)})
    return lines


def _mean(values: list[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def _table(lines: list[dict[str, Any]]) -> pd.DataFrame:
    """The lines without settings that are the same everywhere; the probe once, first."""
    probe_line = [line for line in lines if line["method"] == PROBE][:1]
    once = [*probe_line, *(line for line in lines if line["method"] != PROBE)]
    flat = [{"method": line["method"], **line["settings"], **line} for line in once]
    table = pd.DataFrame(flat).drop(columns=["settings", "numbers"])
    first = ["method", "ratio"]
    same = [c for c in table if c not in (*first, *FIGURES, "val_top1", "top1_sd") and table[c].dropna().nunique() <= 1]
    return table[[*first, *(c for c in table if c not in (*first, *same))]]

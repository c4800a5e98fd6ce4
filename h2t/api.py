"""H2T from Python: features of images, methods compared on them, predictions, and caches to share.

    from h2t.api import compare, extract_features, predict, write_cache

    photos = extract_features("photos", "resnet50")                       # a folder for each class
    found = compare(photos, methods=["crt", "dr"], ratios=[0.0, 0.3])
    print(found)
    found.take("dr").save("model")
    predict("model", "new photos")

Everything is computed by the functions of the stages, on a cache in a temporary folder. Errors that a user can mend are
`h2t.pipeline.base.errors.UserError`, one line each. Needs `pip install 'h2t[pipeline]'`.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch

from h2t.arguments import place, plain, share, sources
from h2t.cache.format.spec import CacheSpec
from h2t.cache.reader import Cache, open_cache
from h2t.classifier import Classifier, load, predict
from h2t.features import Features, Shares, as_cache, extract_features, gathered, held_out, labels_of
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run, Say, silent
from h2t.pipeline.data.classes import recorded_names
from h2t.pipeline.evaluation.calibration import of_heads
from h2t.pipeline.evaluation.folds import load_folds
from h2t.pipeline.evaluation.metrics import AUROC
from h2t.pipeline.evaluation.scoring import Scores, score_heads
from h2t.pipeline.evaluation.tested_groups import groups_of
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.host_entry import heads_of
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.setting import Optimiser
from h2t.pipeline.heads.stored import Heads, load_heads
from h2t.pipeline.models.card import Measured
from h2t.pipeline.models.features import Extractor
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.trained import NONE
from h2t.pipeline.sharing import importing
from h2t.pipeline.stages import evaluate, probe, train_classifier

__all__ = ["Classifier", "Comparison", "Features", "compare", "extract_features", "load", "predict", "write_cache"]

PROBE = "probe"  # the line of the logistic regression that is fitted to the training features
FIGURES = ("top1", "head", "medium", "tail", "ece", AUROC)
NOT_SETTINGS = ("number", "seed", "replaced")  # columns of the table of heads


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
    if not isinstance(replace, bool | np.bool_):
        raise UserError(f"replace: must be True or False; got {replace!r:.60}")
    given = gathered(features, labels, split, None)
    names = sources(source, len(given))
    parts = importing.split_parts(given.values, labels_of(given), given.split, names or given.source)
    return importing.run(parts, place("out", out), silent, replace=bool(replace))


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
    epochs: int | None = None,
    l2: float = 1e-3,
    seed: int = 0,
    device: str = "auto",
    say: Say = silent,
) -> "Comparison":
    """Trains methods of stage II on features, without H2T and with it, and measures them on test rows.

    `features`: Features, an array (n, D) or (n, C, H, W) with n `labels`, or the path or URL of a cache with training
    and test rows. `methods`: names of hosts (h2t list hosts), or name -> keys of an entry of `hosts` in params.yaml.
    `ratios`: shares of the channels that H2T replaces; 0 is the method without it. `epochs` is that of every method
    whose keys say nothing else; None means 10, or as many as make 500 steps.

    Where `split` (train, val or test for each row) has no test or validation rows, they are held out of each class: a
    share, or `{"at_most": n, "keep": k}`; rows of one of the `groups` stay together. Ratios are chosen on validation
    rows, never on test rows. `l2` is the penalty of the logistic regression (`probe`) that methods start from; it is a
    line of the table, too. Raises UserError.
    """
    chosen = devices.choose(device)
    if not callable(say):
        raise UserError(f"say: must be a function of a text; got {say!r:.60}")
    held_back = {"test": share(test), "validation": share(validation), "seed": plain(seed)}
    shares = build(Shares, "compare", held_back)
    plugins.look_again()
    entries = _methods(methods)
    for name, entry in entries.items():  # before anything is computed
        _entry(name, entry, ratios, seeds, epochs)
    made = features.extractor if isinstance(features, Features) else None
    with TemporaryDirectory(prefix="h2t-") as folder:
        root = Path(folder)
        cache = as_cache(features) if labels is None else None
        if cache is None:
            given = gathered(features, labels, split, groups)
            held = held_out(given, shares)
            parts = importing.split_parts(given.values, labels_of(given), held, given.source)
            importing.run(parts, root / "cache", say)
            if say is silent and (note := importing.scale_note(parts["train"])):  # otherwise it is said
                warnings.warn(note, stacklevel=2)
            cache = open_cache(root / "cache")
        with cache:
            names = recorded_names(cache.spec.provenance, cache.files)
            start = _start(cache, root / "probe", l2, chosen, seed, say)
            samples = len(sample_rows(cache.index, "train", "stage1").first)
            stacks, lines = {}, []
            for name, entry in entries.items():
                params = _entry(name, entry, ratios, seeds, epochs, samples)
                run = Run(name, root / "heads" / name, chosen, seed, say)
                train_classifier.run(params, run, Residency(), cache, start)
                scored = Run(name, root / "evaluate" / name, chosen, seed, say)
                evaluate.run(evaluate.Params(), scored, cache, run.out, start)
                heads = load_heads(run.out)
                figures = pq.ParquetFile(scored.out / "heads.parquet").read()
                lines += _lines(name, figures.to_pylist(), heads.table.column_names)
                tested = score_heads(cache, heads, "test", heads.about["evaluate"], chosen)
                warm = of_heads(cache, heads, range(len(heads.table)), load_folds(run.out), chosen)
                of_image = groups_of(cache, tested.statistics)
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
    (`paper_index`); ece: calibration error; auroc, with two classes: area under the ROC curve; top1_sd:
    standard deviation over the seeds; val_top1: accuracy on the validation rows, which ratios are chosen by, if there
    are such rows.
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

    def take(self, method: str, *, ratio: float | None = None, seed: int | None = None) -> Classifier:
        """One trained classifier; without `ratio` the one of the best validation accuracy, else the largest ratio.

        Without `seed` the first one. Raises UserError if there is no such classifier.
        """
        ratio, seed = plain(ratio), plain(seed)
        for name, number in (("ratio", ratio), ("seed", seed)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, Real | Decimal)):
                raise UserError(f"{name}: must be a number; got {number!r:.60}")
        if not isinstance(method, str) or method not in self.stacks:
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


def _methods(given: Any) -> dict[str, Any]:
    """Name -> keys of each method. Raises UserError if there is none, or what is given names no methods."""
    listed = isinstance(given, Iterable) and not isinstance(given, str | bytes) and getattr(given, "shape", True) != ()
    names = list(given) if listed else [given]
    if not names:
        raise UserError("methods: must name at least one host; got none; h2t list hosts prints them")
    if not listed or not all(isinstance(name, str) for name in names):
        raise UserError(f"methods: must be a list of names of hosts, or names with their keys; got {given!r:.60}")
    return dict(given) if isinstance(given, Mapping) else {name: {} for name in names}


def trained(
    features: np.ndarray,
    labels: Sequence[Any],
    method: str,
    entry: Mapping[str, Any],
    *,
    ratio: float,
    epochs: int | None,
    l2: float,
    seed: int,
    device: torch.device,
    folder: Path,
) -> Classifier:
    """One classifier trained on all rows, with temporary files in `folder`; what is given as in `compare`.

    Raises UserError, also if `entry` asks for several.
    """
    plugins.look_again()
    params = _entry(method, entry, [ratio], [seed], epochs, len(labels))
    if (asked := len(heads_of(params.grid, fitted=params.kind.fitted))) > 1:
        raise UserError(f"methods.{method}.grid: must ask for one classifier; got {asked}; give each key one value")
    importing.run(importing.split_parts(features, labels, None, None), folder / "cache", silent)
    with open_cache(folder / "cache") as cache:
        start = _start(cache, folder / "probe", l2, device, seed, silent)
        train_classifier.run(params, Run(method, folder / "heads", device, seed), Residency(), cache, start)
        return Classifier(load_heads(folder / "heads"), recorded_names(cache.spec.provenance, cache.files))


def _entry(
    name: str,
    entry: Mapping[str, Any],
    ratios: Sequence[float],
    seeds: Sequence[int],
    epochs: int | None,
    samples: int = 1,
) -> train_classifier.Params:
    """The parameters of the method `name` for `samples` to train on. Raises UserError, which names the key."""
    if not isinstance(entry, Mapping):
        raise UserError(f"methods.{name}: must be keys of an entry of hosts with their values; got {entry!r}")
    own = plain(entry)
    host = str(own.get("host", name))
    plugins.check("hosts", host)
    values: dict[str, Any] = {"host": host, "backbone": "features", "batchnorm": "stage1"}
    kind = plugins.load("hosts", host).Host
    if kind.only_classifier:
        values["classifier"] = kind.only_classifier
    if not kind.fitted:
        values["grid"] = {"ratio": plain(ratios), "seed": plain(seeds)}
        batch = own["optimiser"].get("batch_size") if isinstance(own.get("optimiser"), dict) else None
        enough = Optimiser.enough_epochs(samples, batch if isinstance(batch, int) and batch > 0 else None)
        values["optimiser"] = {"epochs": enough if epochs is None else plain(epochs)}
    for key in values.keys() & own.keys():
        if isinstance(values[key], dict) and isinstance(own[key], dict):  # `epochs` stays beside a learning rate
            own[key] = {**values[key], **own[key]}
    return build(train_classifier.Params, f"methods.{name}", {**values, **own})


def _start(cache: Cache, out: Path, l2: float, device: torch.device, seed: int, say: Say) -> Path:
    """The folder of the probe that methods start from. A cache of a backbone that is known gets one as well."""
    settings = build(Probe, "probe", {"l2": plain(l2)})
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
        one |= {figure: _mean([line[figure] for line in test]) for figure in FIGURES if figure in test[0]}
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

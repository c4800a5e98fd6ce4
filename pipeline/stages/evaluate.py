"""evaluate: scores the backbone's own head and every stage-II classifier on the validation and test rows.

Writes `metrics.json` (stage1, without_h2t, with_h2t: mean and standard deviation over seeds; difference: with H2T minus
without), `heads.parquet` (the figures of every classifier), `differences.parquet` (of every setting from ratio 0, from
the usual donors and from stage I), `per_class.parquet`, `confusion.parquet` and `predictions.parquet` (for the
classifiers behind metrics.json), and what else the report shows (`evidence.py`). docs/intervals.md lists the fields.
Classifiers are evaluated as they are after the last epoch; nothing is chosen on the test split.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BeforeValidator

from h2t.cache.memory import available_memory, return_freed_arrays
from h2t.cache.reader import Cache
from h2t.cache.sizes import sized
from h2t.pipeline.base import clock, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Index, Ratio, Section
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import by_index, groups
from h2t.pipeline.evaluation.calibration import Calibrated, calibrated
from h2t.pipeline.evaluation.choice import choose
from h2t.pipeline.evaluation.evidence import ROOM, write_about, write_embedding, write_reliability, write_weight_norms
from h2t.pipeline.evaluation.intervals import FIGURES
from h2t.pipeline.evaluation.metrics import AUROC, Graded, over_seeds, summaries
from h2t.pipeline.evaluation.replicates import Loaded, load, score
from h2t.pipeline.evaluation.scoring import STAGE1
from h2t.pipeline.evaluation.tables import (
    STANDARD,
    Comparison,
    Scored,
    compared,
    write_confusion,
    write_differences,
    write_per_class,
    write_predictions,
)
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.replicate import Replicate
from h2t.pipeline.heads.stored import Heads

NUMBER = 2026112703  # other results, another number: docs/numbers.md

MORE = ("balanced_accuracy", "macro_f1", "top5", "nll")  # figures without an interval
OF_TWO_CLASSES = (AUROC, "average_precision")  # the second without an interval
SCALED = ("temperature", "ece_scaled")  # the temperature, and the calibration error of logits divided by it
LITTLE = 2 * 2**30  # bytes of available memory below which freed memory is returned at once
GROUP_NAMES = ("paper_index", "paper_threshold", "oltr")


def _groups(value: Any) -> Any:
    """`value` if `groups` can have it. Raises ValueError."""
    if value in GROUP_NAMES:
        return value
    whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if whole and len(value) == 2 and 0 <= value[0] <= value[1]:
        return value
    raise ValueError(f"must be {', '.join(GROUP_NAMES)} or two class indices in ascending order")


class Params(Section):
    """Section `evaluate`."""

    groups: Annotated[Literal["paper_index", "paper_threshold", "oltr"] | list[Index], BeforeValidator(_groups)] = (
        "paper_index"
    )
    """How classes are divided into head, medium and tail; or two class indices, where medium and tail begin."""
    ratio: Ratio = 0.3
    """Ratio that is reported as `with_h2t` where there are no validation images to choose it by."""


def run(
    params: Params,
    run: Run,
    cache: Cache,
    heads_dir: Path,
    backbone_dir: Path,
    further: Sequence[Replicate] = (),
) -> dict[str, Any]:
    """Evaluates the classifiers of host `run.name`, writes the results to `run.out` and returns the metrics.

    With `further` replicates, figures are means over all, and intervals cover other trainings of the backbone. Raises
    UserError if the classifiers were trained on another cache or backbone, if there are no test rows, or if the
    classifiers and their predictions would not fit into memory.
    """
    clock.begins("evaluation")
    loaded = load(heads_dir, [Replicate(0, cache, backbone_dir), *further], run.device, run.say)
    heads, names, table = loaded[0].heads, loaded[0].names, [line for one in loaded for line in one.table]
    counts = heads.about["counts"]
    group_of = group_choice(params, counts)
    splits: list[str] = [s for s in ("val", "test") if s in cache.index.splits]
    if "test" not in splits:
        raise UserError(
            f"{cache.files}: evaluation needs test rows; the cache has none; give the dataset a test split and extract "
            "again, or import features with --test FILE"
        )

    statistics = heads.about["evaluate"]
    # DR as published is trained and evaluated under balanced statistics alone; with branch-wise ones, an extra line.
    stored = set(cache.index.statistics("test"))
    lines = list(dict.fromkeys([statistics, *({heads.about["receiver"]} & stored)]))
    _check_memory(run, loaded, [(split, kind) for split in splits for kind in lines])
    scored = score(loaded, splits, lines, run.device)
    figures = [figure for one in scored for figure in _figures(one, group_of, len(scored) > 1)]

    of_recipe = [f for f in figures if f["statistics"] == statistics and f["number"] >= 0]
    judged, by = [f for f in of_recipe if f["split"] == "val"], "validation images"
    left_out: list[str] = []
    if folds := loaded[0].folds:  # lines as of validation images
        judged = [
            {**one.table[n], "split": "val", "top1": accuracy}
            for one in loaded
            for n, accuracy in (one.folds.accuracy.items() if one.folds else ())
        ]
        by = counted(folds.folds, "fold")
        left_out = [names[label] for label in folds.left_out]
    chosen = choose(f"hosts.{run.name}.grid", table, heads.constants, judged, by, left_out)
    if heads.constants:
        for f in figures:
            f["tuned"] = chosen.keeps(f) if f["number"] >= 0 else None
    of_recipe = [f for f in (*(f for f in of_recipe if f["split"] == "test"), *judged) if chosen.keeps(f)]
    ratio = reported_ratio(of_recipe, params.ratio)
    seeded = not plugins.load("hosts", heads.parts.host).Host.fitted  # a fit in closed form has neither seed nor donors
    if ratio is None and seeded:
        run.say(
            f"note: {run.name}: no classifier to report as with_h2t, which needs donor instance, selection random and "
            f"ratio {params.ratio:g}"
        )
    without = _chosen(of_recipe, "test", 0.0)
    with_h2t = _chosen(of_recipe, "test", ratio) if ratio else []
    apart = compared([f for f in of_recipe if f["split"] == "test"], scored, statistics, group_of, seeded)
    kept = [f["number"] for f in (*without, *with_h2t)]
    first = [f for f in figures if f["number"] < 0 and f["split"] == "test"]
    if scaled := _calibrated(loaded, kept, run.device):
        for f in figures:
            own = scaled.get(f["number"]) if f["split"] == "test" and f["statistics"] in (statistics, STAGE1) else None
            f |= {"temperature": own and own.temperature, "ece_scaled": own and own.ece}
    standard = [h for h in table if _standard(h) or not h["ratio"]]
    metrics = {
        "stage1": _entry(first, STAGE1, params),
        "without_h2t": _entry(without, statistics, params, lambda f: chosen.as_dict(f, standard)),
        "with_h2t": _entry(with_h2t, statistics, params, lambda f: chosen.as_dict(f, standard)),
        "difference": _difference(apart, ratio),
    }
    with fresh_directory(run.out) as into:
        write_json(into / "metrics.json", metrics)
        pq.write_table(pa.Table.from_pylist(figures, _schema(figures, heads)), into / "heads.parquet")
        write_differences(into, apart)
        write_per_class(into, scored, counts)
        write_confusion(into, scored, statistics, kept, len(counts))
        write_predictions(into, scored, statistics, kept)
        write_reliability(into, (said for one in scored for said in one.kept(statistics, kept)))
        clock.begins("drawing")  # the points of the embedding take most of it
        _write_of_replicate_0(into, loaded[0], scored[0], statistics, without, with_h2t)
        rows = sample_rows(cache.index, "test", statistics).first
        write_about(into, cache, heads, rows, group_of, seeded)
    run.say(f"{run.name}: " + _one_line(metrics))
    return metrics


def _figures(scored: Scored, group_of: Sequence[str | None], several: bool) -> Iterator[dict[str, Any]]:
    """The lines of `heads.parquet` of one replicate of one or `several`: of its classifiers, then of stage I."""
    by_number = {line["number"]: line for line in scored.table}
    for (split, statistics), result in scored.scores.items():
        found = summaries(result.said, result.labels, group_of)
        for (number, _), one in zip(scored.of(split, statistics), found, strict=True):
            yield {**by_number[number], "split": split, "statistics": statistics, **one}
    for split, result in scored.first.items():
        own = {"number": scored.stage1, **({"replicate": scored.replicate} if several else {})}
        yield {**own, "split": split, "statistics": STAGE1, **summaries(result.said, result.labels, group_of)[0]}


def _calibrated(loaded: Sequence[Loaded], kept: Sequence[int], device: torch.device) -> dict[int, Calibrated]:
    """Temperature and calibration error of the classifiers `kept` and of the stage-I heads, by their numbers."""
    found: dict[int, Calibrated] = {}
    for index, one in enumerate(loaded):
        numbers = [line["number"] for line in one.table]
        own = [numbers.index(number) for number in kept if number in numbers]
        scaled = calibrated(one.cache, one.heads, own, one.stage1, one.folds, device)
        found |= {numbers[n] if n >= 0 else -1 - index: value for n, value in scaled.items()}
    return found


def _check_memory(run: Run, loaded: Sequence[Loaded], scored: list[tuple[str, str]]) -> None:
    """Raises UserError unless all heads and their predictions for the rows of each (split, statistics) fit.

    On a CPU each block of rows needs the weights of all heads: where they do not fit, every one reads the file again.
    """
    parts = [part for one in loaded for part in one.cache.index.parts if part[:2] in scored]
    heads, rows = len(loaded[0].table), sum(part.stop - part.start for part in parts)
    each = Graded.bytes_each(len(loaded[0].heads.about["counts"]))
    weights = max(sum(t.nbytes for t in one.heads.state.values()) for one in loaded) if run.device.type == "cpu" else 0
    need, room = rows * heads * each + weights + ROOM, available_memory()
    if need > room:
        raise UserError(
            f"{run.name}: {counted(heads, 'classifier')} and their predictions for {counted(rows, 'row')} need "
            f"{sized(need)} of memory; {sized(room)} are free; free memory, or train fewer classifiers "
            f"(hosts.{run.name}.grid)"
        )
    if room < LITTLE:
        return_freed_arrays()


def group_choice(params: Params, counts: list[int]) -> list[str | None]:
    """The group of each class: head, medium, tail or None. Raises UserError for class indices out of range."""
    if isinstance(params.groups, str):
        return groups(counts)[params.groups]
    if params.groups[1] > len(counts):
        raise UserError(
            f"evaluate.groups: must be {', '.join(GROUP_NAMES)} or two class indices in ascending order up to "
            f"{len(counts)}; got {params.groups}"
        )
    return by_index(len(counts), *params.groups)


def reported_ratio(figures: list[dict[str, Any]], fallback: float) -> float | None:
    """The ratio of `with_h2t`: that of the best mean validation top-1; without validation rows, `fallback`.

    Among equals the smallest ratio is taken. Only classifiers with donor instance, selection random and a ratio above 0
    count; None if there are none.
    """
    ratios = sorted({f["ratio"] for f in figures if f["ratio"] > 0 and _standard(f)})
    if any(f["split"] == "val" for f in figures):
        means = {r: float(np.mean([f["top1"] for f in _chosen(figures, "val", r)])) for r in ratios}
        return max(ratios, key=lambda r: (means[r], -r)) if ratios else None
    return fallback if fallback in ratios else None


def _standard(figure: Mapping[str, Any]) -> bool:
    """True for H2T as published: whole donors drawn instance-wise, random channels."""
    return (figure["donor"], figure["selection"]) == STANDARD


def _chosen(figures: list[dict[str, Any]], split: str, ratio: float) -> list[dict[str, Any]]:
    """The figures of one classifier per replicate and seed at `ratio`. At ratio 0 donor and selection do not matter."""
    by_seed: dict[tuple[int, int], dict[str, Any]] = {}
    for f in figures:
        if f["split"] == split and f["ratio"] == ratio and (ratio == 0 or _standard(f)):
            by_seed.setdefault((f.get("replicate", 0), f["seed"]), f)
    return list(by_seed.values())


def _entry(
    figures: list[dict[str, Any]],
    statistics: str,
    params: Params,
    chosen: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda figure: None,
) -> dict[str, Any] | None:
    """An entry of metrics.json: mean and standard deviation over seeds and replicates; None without `figures`.

    `chosen` tells what was chosen for the setting of one of them.
    """
    if not figures:
        return None
    replicates = {f["replicate"] for f in figures if "replicate" in f}
    two = OF_TWO_CLASSES if AUROC in figures[0] else ()
    return {
        **over_seeds([{k: f.get(k) for k in (*FIGURES, *MORE, *SCALED, *two)} for f in figures]),
        "chosen": chosen(figures[0]),
        "ratio": figures[0].get("ratio"),
        "heads": len(figures),
        **({"replicates": len(replicates)} if replicates else {}),
        "statistics": statistics,
        "groups": params.groups,
    }


def _schema(figures: list[dict[str, Any]], heads: Heads) -> pa.Schema:
    """The columns of `heads.parquet`: those that the heads have, and figures."""
    kinds = {f.name: f.type for f in heads.table.schema}
    kinds |= {"replicate": pa.int64(), "split": pa.string(), "statistics": pa.string(), "tuned": pa.bool_()}
    return pa.schema([(k, kinds.get(k, pa.float64())) for k in figures[0]])


def _difference(apart: list[Comparison], ratio: float | None) -> dict[str, Any] | None:
    """The differences with H2T at `ratio` minus without, by figure; None if one of the two was not trained."""
    for comparison in apart:
        if (comparison.setting, comparison.against) == ((ratio, *STANDARD), "without_h2t"):
            return {figure: found and found.as_dict() for figure, found in comparison.figures.items()}
    return None


def _write_of_replicate_0(
    into: Path,
    loaded: Loaded,
    scored: Scored,
    statistics: str,
    without: list[dict[str, Any]],
    with_h2t: list[dict[str, Any]],
) -> None:
    """Writes weight norms of the classifiers behind metrics.json, and an embedding of the test samples.

    The embedding shows the predictions of the first classifier without H2T and of the first with it.
    """
    said, result = dict(scored.of("test", statistics)), scored.scores[("test", statistics)]
    kept = [f["number"] for f in (*without, *with_h2t) if f["number"] in said]
    write_weight_norms(into, loaded.heads, loaded.stage1, kept)
    rows = sample_rows(loaded.cache.index, "test", statistics).first
    guesses = {
        name: said[figures[0]["number"]].guesses if figures else None
        for name, figures in (("without_h2t", without), ("with_h2t", with_h2t))
    }
    write_embedding(into, loaded.cache, rows, result.samples, result.labels, guesses)


def _one_line(metrics: Mapping[str, Any]) -> str:
    """`metrics` in one line, for the terminal."""
    names = {"stage1": "stage I", "without_h2t": "without H2T", "with_h2t": "with H2T"}
    figures = {"top1": "top-1", "tail": "tail"}
    return "; ".join(
        f"{names[key]} " + ", ".join(f"{figures[f]} {entry[f]:.2f} %" for f in figures if entry[f] is not None)
        for key, entry in metrics.items()
        if entry and key in names
    )

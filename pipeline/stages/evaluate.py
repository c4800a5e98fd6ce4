"""evaluate: scores the backbone's own head and every stage-II classifier on the validation and test rows.

Writes `metrics.json` (stage1, without_h2t, with_h2t: mean and standard deviation over seeds; difference: with H2T minus
without), `heads.parquet` (the figures of every classifier), `differences.parquet` (of every setting from ratio 0, from
the usual donors and from stage I), `per_class.parquet`, `confusion.parquet` and `predictions.parquet` (for the
classifiers behind metrics.json), and what else the report shows (`evidence.py`). docs/intervals.md lists the fields.
Classifiers are evaluated as they are after the last epoch; nothing is chosen on the test split.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BeforeValidator

from h2t.cache.memory import available_memory, return_freed_arrays
from h2t.cache.reader import Cache
from h2t.pipeline.base import clock, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Index, Ratio, Section
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import by_index, groups, recorded_names
from h2t.pipeline.evaluation.calibration import calibrated
from h2t.pipeline.evaluation.choice import choose
from h2t.pipeline.evaluation.evidence import ROOM, write_about, write_embedding, write_reliability, write_weight_norms
from h2t.pipeline.evaluation.folds import load_folds
from h2t.pipeline.evaluation.intervals import FIGURES
from h2t.pipeline.evaluation.metrics import Graded, over_seeds, summary
from h2t.pipeline.evaluation.scoring import STAGE1, Scores, load_heads_for, score_heads, score_stage1
from h2t.pipeline.evaluation.tables import (
    STANDARD,
    Comparison,
    compared,
    each,
    write_confusion,
    write_differences,
    write_per_class,
    write_predictions,
)
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.start import backbone_head
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.networks.trained import StageOneHead

NUMBER = 2026112604  # other results, another number: docs/numbers.md

MORE = ("balanced_accuracy", "macro_f1", "top5", "nll")  # figures without an interval
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


def run(params: Params, run: Run, cache: Cache, heads_dir: Path, backbone_dir: Path) -> dict[str, Any]:
    """Evaluates the classifiers of host `run.name`, writes the results to `run.out` and returns the metrics.

    Raises UserError if the classifiers were trained on another cache or backbone, if there are no test rows, or if the
    predictions would not fit into memory.
    """
    clock.begins("evaluation")
    heads = load_heads_for(cache, heads_dir, backbone_dir)
    stage1 = backbone_head(cache, backbone_dir, "linear", run.device, run.say)
    counts = heads.about["counts"]
    group_of = group_choice(params, counts)
    splits: list[str] = [s for s in ("val", "test") if s in cache.index.splits]
    if "test" not in splits:
        raise UserError(
            f"{cache.files}: evaluation needs test rows; the cache has none; give the dataset a test split and extract "
            "again"
        )

    table = heads.table.to_pylist()
    recipe_statistics = heads.about["evaluate"]
    # DR as published is trained and evaluated under balanced statistics alone; with branch-wise ones, an extra line.
    stored = set(cache.index.statistics("test"))
    lines = list(dict.fromkeys([recipe_statistics, *({heads.about["receiver"]} & stored)]))
    _check_memory(run.name, cache, len(table), [(split, statistics) for split in splits for statistics in lines])
    scores = {
        (split, statistics): score_heads(cache, heads, split, statistics, run.device)
        for split in splits
        for statistics in lines
    }
    of_stage1 = {split: score_stage1(cache, stage1, split, run.device) for split in splits} if stage1.state else {}

    figures: list[dict[str, Any]] = []
    for (split, statistics), result in scores.items():
        for head in table:
            one = summary(result.said[head["number"]], result.labels, group_of)
            figures.append({**head, "split": split, "statistics": statistics, **one})
    for split, result in of_stage1.items():
        one = summary(result.said[0], result.labels, group_of)
        figures.append({"number": -1, "split": split, "statistics": STAGE1, **one})

    of_recipe = [f for f in figures if f["statistics"] == recipe_statistics and f["number"] >= 0]
    folds = load_folds(heads_dir)
    judged, by = [f for f in of_recipe if f["split"] == "val"], "validation images"
    names = recorded_names(cache.spec.provenance, cache.files)
    if folds:  # lines as of validation images
        judged = [{**table[n], "split": "val", "top1": accuracy} for n, accuracy in folds.accuracy.items()]
        by = counted(folds.folds, "fold")
    left_out = [names[label] for label in folds.left_out] if folds else []
    chosen = choose(f"hosts.{run.name}.grid", table, heads.constants, judged, by, left_out)
    if heads.constants:
        for f in figures:
            f["tuned"] = chosen.keeps(f) if f["number"] >= 0 else None
    of_recipe = [f for f in (*(f for f in of_recipe if f["split"] == "test"), *judged) if chosen.keeps(f)]
    ratio = reported_ratio(of_recipe, params.ratio)
    if ratio is None:
        run.say(
            f"note: {run.name}: no classifier to report as with_h2t, which needs donor instance, selection random and "
            f"ratio {params.ratio:g}"
        )
    without = _chosen(of_recipe, "test", 0.0)
    with_h2t = _chosen(of_recipe, "test", ratio) if ratio else []
    # A fit in closed form has no seed.
    seeded = not plugins.load("hosts", heads.parts.host).Host.fitted
    test_lines = [f for f in of_recipe if f["split"] == "test"]
    apart = compared(test_lines, scores[("test", recipe_statistics)], of_stage1.get("test"), group_of, seeded)
    kept = [f["number"] for f in (*without, *with_h2t)]
    first = [f for f in figures if f["number"] == -1 and f["split"] == "test"]
    scaled = calibrated(cache, heads, kept, stage1, folds, run.device)
    for f in figures if scaled else ():
        own = (
            scaled.get(f["number"]) if f["split"] == "test" and f["statistics"] in (recipe_statistics, STAGE1) else None
        )
        f |= {"temperature": own and own.temperature, "ece_scaled": own and own.ece}
    standard = [h for h in table if _standard(h) or not h["ratio"]]
    metrics = {
        "stage1": _entry(first, STAGE1, params),
        "without_h2t": _entry(without, recipe_statistics, params, lambda f: chosen.as_dict(f, standard)),
        "with_h2t": _entry(with_h2t, recipe_statistics, params, lambda f: chosen.as_dict(f, standard)),
        "difference": _difference(apart, ratio),
    }
    with fresh_directory(run.out) as into:
        write_json(into / "metrics.json", metrics)
        pq.write_table(pa.Table.from_pylist(figures, _schema(figures, heads)), into / "heads.parquet")
        write_differences(into, apart)
        write_per_class(into, table, scores, of_stage1, counts)
        write_confusion(into, scores[("test", recipe_statistics)], of_stage1.get("test"), kept, len(counts))
        write_predictions(into, scores[("test", recipe_statistics)], of_stage1.get("test"), kept)
        clock.begins("drawing")  # the points of the embedding take most of it
        _write_evidence(
            into, cache, heads, stage1, scores[("test", recipe_statistics)], of_stage1.get("test"), without, with_h2t
        )
        write_about(into, cache, heads, sample_rows(cache.index, "test", recipe_statistics).first, group_of, seeded)
    run.say(f"{run.name}: " + _one_line(metrics))
    return metrics


def _check_memory(name: str, cache: Cache, heads: int, scored: list[tuple[str, str]]) -> None:
    """Raises UserError unless the predictions of so many heads for the rows of each (split, statistics) fit."""
    rows = sum(part.stop - part.start for part in cache.index.parts if part[:2] in scored)
    need, room = rows * heads * Graded.BYTES + ROOM, available_memory()
    if need > room:
        raise UserError(
            f"{name}: the predictions of {counted(heads, 'classifier')} for {counted(rows, 'row')} need "
            f"{need / 1e6:.0f} MB of memory; {room / 1e6:.0f} MB are free; free memory, or train fewer classifiers "
            f"(hosts.{name}.grid)"
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
    """The figures of one classifier per seed at `ratio`. At ratio 0 donor and selection do not matter."""
    by_seed: dict[int, dict[str, Any]] = {}
    for f in figures:
        if f["split"] == split and f["ratio"] == ratio and (ratio == 0 or _standard(f)):
            by_seed.setdefault(f["seed"], f)
    return list(by_seed.values())


def _entry(
    figures: list[dict[str, Any]],
    statistics: str,
    params: Params,
    chosen: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda figure: None,
) -> dict[str, Any] | None:
    """An entry of metrics.json: mean and standard deviation over seeds; None without `figures`.

    `chosen` tells what was chosen for the setting of one of them.
    """
    if not figures:
        return None
    return {
        **over_seeds([{k: f.get(k) for k in (*FIGURES, *MORE, *SCALED)} for f in figures]),
        "chosen": chosen(figures[0]),
        "ratio": figures[0].get("ratio"),
        "heads": len(figures),
        "statistics": statistics,
        "groups": params.groups,
    }


def _schema(figures: list[dict[str, Any]], heads: Heads) -> pa.Schema:
    """The columns of `heads.parquet`: those that the heads have, and figures."""
    kinds = {f.name: f.type for f in heads.table.schema}
    kinds |= {"split": pa.string(), "statistics": pa.string(), "tuned": pa.bool_()}
    return pa.schema([(k, kinds.get(k, pa.float64())) for k in figures[0]])


def _difference(apart: list[Comparison], ratio: float | None) -> dict[str, Any] | None:
    """The differences with H2T at `ratio` minus without, by figure; None if one of the two was not trained."""
    for comparison in apart:
        if (comparison.setting, comparison.against) == ((ratio, *STANDARD), "without_h2t"):
            return {figure: found and found.as_dict() for figure, found in comparison.figures.items()}
    return None


def _write_evidence(
    into: Path,
    cache: Cache,
    heads: Heads,
    head: StageOneHead,
    result: Scores,
    first: Scores | None,
    without: list[dict[str, Any]],
    with_h2t: list[dict[str, Any]],
) -> None:
    """Writes calibration and weight norms of the classifiers behind metrics.json, and an embedding of the test samples.

    The embedding shows the predictions of the first classifier without H2T and of the first with it.
    """
    kept = [f["number"] for f in (*without, *with_h2t)]
    write_reliability(into, dict(each(result, first, kept)), result.labels)
    write_weight_norms(into, heads, head, kept)
    rows = sample_rows(cache.index, "test", result.statistics).first
    guesses = {
        name: result.said[figures[0]["number"]].guesses if figures else None
        for name, figures in (("without_h2t", without), ("with_h2t", with_h2t))
    }
    write_embedding(into, cache, rows, result.samples, result.labels, guesses)


def _one_line(metrics: Mapping[str, Any]) -> str:
    """`metrics` in one line, for the terminal."""
    return "; ".join(
        f"{name} top-1 {entry['top1']:.2f}, tail {entry['tail']:.2f}" if entry and entry["tail"] is not None else name
        for name, entry in metrics.items()
        if entry and name != "difference"
    )

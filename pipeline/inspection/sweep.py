"""`h2t sweep`: trains and evaluates more classifiers of a host on the cached features, beside the pipeline's outputs.

One process trains, scores the test rows and compares. No output of the pipeline changes.
"""

import io
import itertools
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from h2t.cache.reader import Cache
from h2t.pipeline.base import clock, params
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import rewrite, text_of
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted
from h2t.pipeline.evaluation.intervals import FIGURES, Difference, paired
from h2t.pipeline.evaluation.metrics import main_figures, over_seeds
from h2t.pipeline.evaluation.scoring import load_heads_for, score_heads
from h2t.pipeline.evaluation.tables import Comparison, Scored, compared
from h2t.pipeline.evaluation.tested_groups import groups_of
from h2t.pipeline.heads.features import maps_fingerprint
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.stages import evaluate, train_classifier

SETTING = ("ratio", "donor", "selection", "lr")  # what tells the lines of a sweep apart, besides constants and the seed


@dataclass(frozen=True)
class Line:
    """The test figures of one setting: mean and standard deviation over its seeds, percent.

    `constants`: other constants of the grid, as in `HeadSetting`. `difference`: figure -> difference from ratio 0 of
    the same learning rate and constants, paired by seed and test image; None at ratio 0. `standing`: the difference of
    top-1 from the evaluated classifiers of the same setting in the pipeline's outputs, if there are any, paired by
    seed; what is no part of a grid may have been another when those were trained.
    """

    ratio: float
    donor: str
    selection: str
    lr: float
    constants: dict[str, Any]
    seeds: list[int]
    figures: dict[str, float | None]
    difference: dict[str, Difference] | None
    standing: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """The line of `h2t sweep --json`."""
        differences = None if self.difference is None else {k: d.as_dict() for k, d in self.difference.items()}
        setting = {key: getattr(self, key) for key in (*SETTING, "constants", "seeds")}
        standing = None if self.standing is None else self.standing.as_dict()
        return {**setting, **self.figures, "difference": differences, "standing": standing}


def sweep(
    params: train_classifier.Params,
    run: Run,
    residency: Residency,
    evaluation: evaluate.Params,
    cache: Cache,
    backbone_dir: Path,
    evaluated: Path | None = None,
) -> list[Line]:
    """Trains the classifiers of `params.grid` and compares them on the test rows.

    Ratio 0 is always part of the grid. Heads go to `run.out`/heads. `evaluated`: the directory that evaluate wrote for
    this host, to compare with. Lines are sorted by constants, in the order of the grid, then by donor, selection and
    ratio. Nothing is chosen. Raises UserError for a host with a closed-form fit, and for settings that do not fit the
    cache.
    """
    if params.kind.fitted:
        raise UserError(
            f"hosts.{run.name}: a sweep needs a host that is trained by gradient descent; host {params.host} has a "
            "closed-form fit; give values of its constants in hosts.*.grid.loss, which train-classifier takes"
        )
    grid = params.grid.model_copy(update={"ratio": sorted({0.0, *params.grid.ratio})})
    given = params.model_copy(update={"grid": grid, "folds": None})
    heads_dir = run.out / "heads"
    train_classifier.run(given, replace(run, out=heads_dir), residency, cache, backbone_dir)
    clock.begins("evaluation")
    heads = load_heads_for(cache, heads_dir, backbone_dir)
    group_of = evaluate.group_choice(evaluation, heads.about["counts"])
    scores = score_heads(cache, heads, "test", heads.about["evaluate"], run.device)
    of_tests = {("test", scores.statistics): scores}
    scored = Scored(heads.table.to_pylist(), of_tests, {}, groups=groups_of(cache, scores.statistics))
    standing = _standing(evaluated, cache, run) if evaluated is not None else []
    lines = []
    for own in itertools.product(*grid.constants().values()):
        constants = {"lr": params.optimiser.lr, **dict(zip(grid.constants(), own, strict=True))}
        mine = _with(heads.table.to_pylist(), constants, params.optimiser.lr)
        figures = [{**head, **main_figures(scores.said[head["number"]], scores.labels, group_of)} for head in mine]
        before = _with(standing, constants, params.optimiser.lr)
        lines += _lines(figures, compared(mine, [scored], scores.statistics, group_of), constants, before)
    return lines


def _with(heads: Sequence[Mapping[str, Any]], constants: Mapping[str, Any], lr: float) -> list[Mapping[str, Any]]:
    """The lines of `heads` with these `constants`; `lr` is the learning rate of those that state none."""
    return [h for h in heads if all({"lr": lr, **h}.get(name) == value for name, value in constants.items())]


def _standing(evaluated: Path, cache: Cache, run: Run) -> list[dict[str, Any]]:
    """Test figures of the classifiers that the pipeline evaluated, under their recipe's statistics.

    None if nothing has been evaluated there, or if it was on another cache, which `run.say` is told.
    """
    try:
        host = json.loads((evaluated / "about.json").read_text(encoding="utf-8"))["host"]
        metrics = json.loads((evaluated / "metrics.json").read_text(encoding="utf-8"))
        figures = pq.ParquetFile(evaluated / "heads.parquet").read().to_pylist()
    except FileNotFoundError:
        return []
    if host["cache"] != maps_fingerprint(cache.spec):
        run.say(f"note: {evaluated} is an evaluation of another cache, so nothing is compared with it")
        return []
    under = (metrics["without_h2t"] or metrics["with_h2t"] or {"statistics": None})["statistics"]
    return [f for f in figures if f["number"] >= 0 and f["split"] == "test" and f["statistics"] == under]


def _lines(
    figures: Sequence[Mapping[str, Any]],
    apart: Sequence[Comparison],
    constants: Mapping[str, Any],
    standing: Sequence[Mapping[str, Any]],
) -> list[Line]:
    """One line for each ratio, donor and selection of heads with these `constants`."""

    def of(setting: tuple[float, str, str], found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [f for f in found if (f["ratio"], f["donor"], f["selection"]) == setting]

    lines = []
    for donor, selection, ratio in sorted({(f["donor"], f["selection"], f["ratio"]) for f in figures}):
        setting = (ratio, donor, selection)
        mine, before = of(setting, figures), of(setting, standing)
        difference = next((c.figures for c in apart if (c.setting, c.against) == (setting, "without_h2t")), {})
        lines.append(
            Line(
                *setting,
                constants["lr"],
                {name: value for name, value in constants.items() if name != "lr"},
                [f["seed"] for f in mine],
                over_seeds([{name: f[name] for name in FIGURES} for f in mine]),
                {name: found for name, found in difference.items() if found} or None,
                paired(*({f["seed"]: f["top1"] for f in side} for side in (mine, before))),
            )
        )
    return lines


def table(lines: Sequence[Line]) -> str:
    """The lines as a text of at most 80 columns."""
    names = ("donor", "selection", "lr", *lines[0].constants)
    shown = ["ratio", *(key for key in names if len({_setting(line, key) for line in lines}) > 1)]
    header = [*shown, "top-1", "head", "medium", "tail", "top-1 against ratio 0"]
    rows = [[*(_setting(line, key) for key in shown), *_cells(line)] for line in lines]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    texts = [" ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    seeds = counted(len(lines[0].seeds), "seed")
    against = [
        f"{' '.join(_setting(line, key) for key in shown)}: {_standing_text(line.standing)}"
        for line in lines
        if line.standing
    ]
    said = (
        f"Test accuracy in percent, mean over {seeds}, on the first replicate; a report is over all replicates. "
        "Differences are paired by seed and test image; their 95 % intervals cover both, not backbones."
    )
    if against:
        common = [line.standing.seeds for line in lines if line.standing]
        number = f"{min(common)}" if min(common) == max(common) else f"{min(common)} to {max(common)}"
        over = "seeds" if min(common) == len(lines[0].seeds) else f"the {number} of {seeds} that both have"
        said += (
            f" Top-1 against the pipeline's own classifiers as they were trained (over {over}), by "
            f"{' '.join(shown)}: {'; '.join(against)}."
        )
    return "\n".join([*(text.rstrip() for text in texts), "", textwrap.fill(said, 80)])


def _setting(line: Line, key: str) -> str:
    value = line.constants[key] if key in line.constants else getattr(line, key)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _standing_text(standing: Difference) -> str:
    """`equal` where each seed has the same figure on both sides, else the difference and its interval."""
    return standing.text if standing.mean or standing.low or standing.high else "equal"


def _cells(line: Line) -> list[str]:
    figures = [line.figures[name] for name in ("top1", "head", "medium", "tail")]
    difference = line.difference["top1"].text if line.difference else ""
    return [*("–" if figure is None else f"{figure:.2f}" for figure in figures), difference]


def check_entry(params_file: Path, name: str) -> None:
    """Raises UserError unless `keep_grid` can write to the entry `hosts.NAME` without joining other lines."""
    if not isinstance((params.load(params_file).get("hosts") or {}).get(name), Mapping):
        raise UserError(f"{params_file}: --save needs an entry hosts.{name}; got none; write one")
    text, copy = params_file.read_text(encoding="utf-8"), io.StringIO()
    editor = _editor(text)
    editor.dump(editor.load(text), copy)
    before, after = (
        [(number, line) for number, line in enumerate(whole.splitlines(), 1) if line.strip("- .\t")]
        for whole in (text, copy.getvalue())
    )
    if len(before) != len(after):
        pairs = zip(before, after, strict=False)
        apart = (number for (number, line), (_, copied) in pairs if "".join(line.split()) != "".join(copied.split()))
        raise UserError(
            f"{params_file}: line {next(apart, before[-1][0])}: --save keeps a value only if it stands in one line, or "
            f"as a text after | or >; write it so, or write hosts.{name}.grid yourself"
        )


def _editor(text: str) -> Any:
    """A YAML editor with the indents of `text`. It keeps comments, and makes plain values alone, whatever the tags."""
    from ruamel.yaml import YAML

    editor = YAML(typ="rt")
    editor.width = 2**31  # never wraps a long line
    editor.preserve_quotes = True
    inside = min((len(spaces) for spaces in re.findall(r"^( +)[^\s#-]", text, re.MULTILINE)), default=2)
    dash = re.search(r"^( *)[^\s#-][^\n]*:\n( *)- ", text, re.MULTILINE)  # a key, and the first entry of its list
    offset = len(dash[2]) - len(dash[1]) if dash else 0
    editor.indent(mapping=inside, sequence=offset + 2, offset=offset)
    return editor


def keep_grid(params_file: Path, name: str, lists: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Writes `lists` to `hosts.NAME.grid` of a parameter file and returns what was written; ratio 0 is added.

    Comments, order, values and line ends stay; spaces inside a line may change. The file is replaced at once, so a
    crash or a full disk leaves the old one. Raises UserError as `check_entry` does.
    """
    check_entry(params_file, name)
    text, end = text_of(params_file)
    text = text.replace("\r\n", "\n")
    editor = _editor(text)
    given = editor.load(text)
    entry = given["hosts"][name]
    grid = {key: list(values) for key, values in lists.items()}
    if "ratio" in grid:
        grid["ratio"] = sorted({0.0, *grid["ratio"]})
    if entry.get("grid") is None:
        entry["grid"] = grid
    else:
        entry["grid"].update(grid)
    copy = io.StringIO()
    editor.dump(given, copy)
    rewrite(params_file, copy.getvalue().replace("\n", end))
    return grid

"""Renders the report as one self-contained HTML page. Every string that comes from data is escaped.

`templates/` holds its parts: `page.html` names the sections in their order (`sections/`), `style/` and `scripts/` are
written into the page, as are the libraries in `vendor/`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from h2t.cache.sizes import sized
from h2t.pipeline.base.text import counted, duration
from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.evaluation.metrics import AUROC
from h2t.pipeline.reporting.answer import RANKED, Answer
from h2t.pipeline.reporting.chosen import choices
from h2t.pipeline.reporting.first_screen import first_screen
from h2t.pipeline.reporting.page_data import MOST_CLASSES, host_data
from h2t.pipeline.reporting.results import (
    FIGURES,
    ROWS,
    HostResult,
    against_first,
    as_published,
    figures_of,
    variants_at,
    with_against_without,
)
from h2t.pipeline.reporting.sides import Side, sentence

TEMPLATES = Path(__file__).parent / "templates"
STYLE = ("page", "print")
VENDOR = ("d3.min", "plot.umd.min")
#: Figures without an interval, and what the page calls them.
MORE = {
    AUROC: "area under the ROC curve",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top5": "top-5",
    "nll": "negative log-likelihood",
    "ece_scaled": "ECE after temperature",
    "temperature": "temperature",
}
SCRIPTS = ("base", "first_screen", "ratio", "classes", "confusion", "calibration", "embedding", "start")


def render(title: str, answer: Answer, sides: Sequence[Side] = ()) -> str:
    """The page as HTML text.

    `answer` holds the results, and run records (time, machine, rates) to show. With `sides`, the page begins with A
    against B.
    """
    results, runs = answer.results, answer.runs
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        cell=cell,
        spread=lambda pair: spread(*pair),
        counted=counted,
        number=_number,
        size=sized,
        duration=duration,
        times=_times,
    )
    scripts = [*(f"vendor/{name}.js" for name in VENDOR), *(f"scripts/{name}.js" for name in SCRIPTS)]
    first = first_screen(answer)
    return environment.get_template("page.html").render(
        title=title,
        results=results,
        rows=ROWS,
        figures=figures_of(results),
        more={
            f: name
            for f, name in MORE.items()
            if any((r.metrics[k] or {}).get(f) is not None for r in results for k in ROWS)
        },
        ranked=RANKED,
        headings={**{f: f for f in FIGURES}, "top1": RANKED["top1"], "ece": "ECE", AUROC: "AUROC"},
        first=first,
        sides=sides,
        sides_sentence=sentence(sides),
        published={r.name: p for r in results if (p := as_published(r))},
        changes={r.name: d for r in results if (d := with_against_without(r))},
        hosts_apart=[] if sides else against_first(results),
        data_sets=list(dict.fromkeys(_data_set(r) for r in results)),
        groups=list(dict.fromkeys(_groups(r) for r in results)),
        seeds=_seeds(results),
        trainings=max(r.trainings for r in results),
        neighbours=_neighbours(results),
        choices=choices(results),
        variants=any(variants_at(r, ratio) for r in results for ratio in r.ratios),
        runs=runs,
        places=list(dict.fromkeys(_place(run) for run in runs)),
        place_of=_place,
        estimates=answer.estimates,
        data=_json({"hosts": {r.name: host_data(r) for r in results}, "rows": ROWS, "answers": first.answers}),
        styles=[_part(f"style/{name}.css") for name in STYLE],
        scripts=[_part(name) for name in scripts],
    )


def cell(entry: Mapping[str, Any] | None, figure: str) -> str:
    """One figure of an entry of metrics.json as mean ± std; a dash if there is no entry."""
    return "–" if entry is None else spread(entry[figure], entry[f"{figure}_std"])


def spread(mean: float | None, std: float | None) -> str:
    """Mean ± std as text; a dash if there is no mean."""
    return "–" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def _part(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def _number(value: Any) -> str:
    """A number as text, with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _times(ratio: float | None) -> str:
    """A ratio of two times as text; a dash for None."""
    return "–" if ratio is None else f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element, whatever class names contain."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_set(result: HostResult) -> str:
    """The data that the host was trained and tested on, in one line."""
    counts, about = result.about["counts"], result.about["cache"]
    test = next((n for split, _, n in about["rows_of"] if split == "test"), 0)
    name = about["provenance"].get("dataset")
    parts = [
        *([f"dataset {name}"] if name else []),
        counted(len(counts), "class", "classes"),
        f"{counted(sum(counts), 'training image')} ({max(counts):,} to {min(counts):,} a class)",
        counted(test, "test image"),
    ]
    return " · ".join(parts)


def _groups(result: HostResult) -> str:
    """Which classes are head, medium and tail, in one line."""
    counts, group_of = result.about["counts"], result.about["groups"]
    parts = []
    for group in GROUPS:
        if members := [n for n, g in zip(counts, group_of, strict=True) if g == group]:
            images = f"{max(members):,} to {min(members):,}" if max(members) > min(members) else f"{members[0]:,}"
            parts.append(f"{group}: {counted(len(members), 'class', 'classes')} with {images} training images")
    return " · ".join(parts) or "no class groups"


def _seeds(results: Sequence[HostResult]) -> str:
    """How many backbones, trainings and seeds of stage II stand behind the means. Closed-form fits have no seed."""
    entries = [r.metrics["without_h2t"] or r.metrics["with_h2t"] for r in results if r.about["host"]["seeded"]]
    numbers = sorted({entry["heads"] // entry.get("replicates", 1) for entry in entries if entry})
    times = max(r.trainings for r in results)
    trained = "trained once" if times == 1 else f"trained on {times} divisions of the data"
    backbones = counted(len({r.about["host"]["backbone"] for r in results}), "backbone")
    if not numbers:
        return f"{backbones}, {trained} · closed-form fits, which have no seed"
    seeds = f"{numbers[0]} to {numbers[-1]} seeds" if len(numbers) > 1 else counted(numbers[0], "seed")
    return f"{backbones}, {trained} · {seeds} of stage II"


def _neighbours(results: Sequence[HostResult]) -> str | None:
    """A sentence on how classes are drawn together if there are too many; None if each class is drawn by itself."""
    classes = max(len(r.about["counts"]) for r in results)
    if classes <= MOST_CLASSES:
        return None
    least, more = divmod(classes, MOST_CLASSES)
    each = f"{least} or {least + 1}" if more else f"{least}"
    return f"{classes:,} classes are too many to draw: each position stands for {each} of them"


def _place(run: Mapping[str, Any]) -> tuple[str, str]:
    """Commit and machine of a run, as text."""
    machine = run["machine"]
    system = ", ".join(str(machine[k]) for k in ("processor", "system") if k in machine)
    cores = machine.get("cores")
    known = counted(cores, "core") if isinstance(cores, int) else "unknown number of cores"
    return str(run.get("commit") or "unknown"), f"{known}, {system or 'unknown system'}"

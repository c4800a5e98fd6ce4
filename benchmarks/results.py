"""docs/results.md and docs/images/ratio.svg from finished analyses, beside the paper's figures.

make analysis-ratio analysis-donors analysis-selection analysis-controls analysis-hosts analysis-pooling
python -m benchmarks.analyses grid --published 5
python -m benchmarks.results --data data --out docs
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.errors import UserError
from pipeline.figures import ratio_picture
from pipeline.results import (
    FIGURES,
    HostResult,
    against_zero,
    between_hosts,
    difference,
    load_result,
    mean_and_std,
    ratio_curve,
    variants,
)
from pipeline.stages.report import difference_table, markdown_table

SHORT = ("top1", "head", "medium", "tail")
DONORS = {"reverse": "63.56 / 48.60 / 24.07 / 46.87", "balanced": "62.72 / 49.14 / 25.93 / 47.30"}
DONORS |= {"instance": "62.00 / 50.17 / 27.07 / 47.73", "without": "63.67 / 46.63 / 22.21 / 45.68"}
SELECTIONS = {"first": "47.22", "middle": "47.23", "last": "47.41", "random": "47.73, 47.75, 47.80, 47.71, 47.66"}
SELECTIONS |= {"without": "45.68"}


@dataclass(frozen=True)
class Analysis:
    """A finished analysis: its hosts, and the record of each run."""

    name: str
    results: list[HostResult]
    runs: dict[str, dict[str, Any]]

    def __getitem__(self, host: str) -> HostResult:
        return next(r for r in self.results if r.name == host)

    @property
    def made(self) -> str:
        """The command, commit, time and machine in one line."""
        runs = list(self.runs.values())
        commits = ", ".join(sorted({str(r["commit"]) for r in runs}))
        heads, seconds, cpu = (sum(r[k] for r in runs) for k in ("heads", "seconds", "cpu"))
        machine = runs[0]["machine"]
        return (
            f"`make analysis-{self.name}`; commit {commits}; {heads} heads trained in {seconds:.0f} s ({cpu:.0f} s of "
            f"processor time, {machine['cores']} cores, {machine['processor']}, shared with other work)."
        )


def load_analysis(folder: Path) -> Analysis:
    """What `benchmarks.analyses` wrote into `folder`. Raises UserError."""
    names = [p.parent.name for p in sorted((folder / "evaluate").glob("*/metrics.json"))]
    if not names:
        raise UserError(f"{folder}: no finished analysis; run make analysis-{folder.name}")
    runs = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "runs" / "train_classifier").glob("*.json"))}
    return Analysis(folder.name, [load_result(n, folder / "evaluate" / n) for n in names], runs)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _table(columns: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    return "\n".join([_row(*columns), _row(*["---"] * len(columns)), *(_row(*line) for line in lines)])


def _cell(heads: pd.DataFrame, figure: str) -> str:
    mean, std = mean_and_std(heads, figure)
    return "–" if mean is None else f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def _text(after: pd.DataFrame, before: pd.DataFrame, figure: str) -> str:
    found = difference(after, before, figure)
    return found.text if found else "–"


def ratio_table(result: HostResult) -> str:
    """Every ratio, and what it changes against ratio 0."""
    lines = []
    for ratio in result.ratios:
        apart = against_zero(result, ratio)
        text = [found.text if ratio and (found := apart[f]) else "–" for f in ("top1", "tail")]
        lines.append([f"{ratio:g}", *(_cell(result.at(ratio), f) for f in FIGURES), *text])
    return _table(["ratio", *FIGURES, "top1 against 0", "tail against 0"], lines)


def variant_table(result: HostResult, ratio: float, published: dict[str, str], paper: str) -> str:
    """Donors and selections at one ratio, each against (instance, random), beside the paper's figures."""
    usual = result.at(ratio)
    lines = [["without H2T", *(_cell(result.at(0.0), f) for f in SHORT), _text(result.at(0.0), usual, "top1")]]
    lines.append(["instance, random", *(_cell(usual, f) for f in SHORT), "–"])
    keys = ["without", "random" if "random" in published else "instance"]
    for r, donor, selection in variants(result):
        if r == ratio:
            heads = result.at(r, donor, selection)
            lines.append([f"{donor}, {selection}", *(_cell(heads, f) for f in SHORT), _text(heads, usual, "top1")])
            keys.append(selection if selection in published else donor)
    if published:
        lines = [[*line, published.get(key, "–")] for line, key in zip(lines, keys, strict=True)]
    extra = [paper] if published else []
    return _table(["donor, selection", *SHORT, "top1 against instance, random", *extra], lines)


def parts_table(ratios: Analysis) -> str:
    """What part of the published gain is batch-norm statistics, and what part is fusion."""
    branchwise = ratios["branchwise"]
    heads = branchwise.tables["heads"]
    balanced = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    steps = [
        ("DR as published: trained and evaluated under balanced batches", balanced.sort_values("seed")),
        ("the same heads, evaluated under the mixture: statistics alone", branchwise.at(0.0)),
        ("DR + H2T, ratio 0.3, evaluated under the mixture: fusion on top", branchwise.at(0.3)),
    ]
    lines = []
    for i, (label, found) in enumerate(steps):
        text = [_text(found, steps[i - 1][1], f) if i else "–" for f in ("top1", "tail")]
        lines.append([label, *(_cell(found, f) for f in SHORT), *text])
    return _table(["step", *SHORT, "top1 against the line above", "tail against the line above"], lines)


def grid_text(grid: Analysis, folder: Path) -> str:
    """How long 660 heads took, and the published way beside it."""
    run = grid.runs["grid"]
    found = json.loads((folder / "runs" / "published" / "grid.json").read_text())
    return (
        f"{run['heads']} heads took {run['seconds']:.0f} s of stage II ({run['cpu']:.0f} s of processor time).\n"
        f"The published way runs the backbone twice a step, for every head: {found['step_seconds']:.2f} s a step "
        f"({found['step_cpu']:.2f} s of processor time), measured over {found['steps']:.0f} steps; "
        f"for {found['heads']} heads that is {found['seconds'] / 3600:,.0f} hours "
        f"({found['cpu'] / 3600:,.0f} of processor time), estimated: **{found['seconds'] / run['seconds']:,.0f} times "
        f"the time** and {found['cpu'] / run['cpu']:,.0f} times the processor time. Reading and augmenting images, "
        "which the published way repeats as well, is left out; so is the one extraction, which the cache shares."
    )


def hosts_table(hosts: Analysis) -> str:
    """Every host with H2T against DR with H2T, paired by seed."""
    lines = []
    for result in hosts.results:
        for row, label in (("without_h2t", "without"), ("with_h2t", "with")):
            apart = between_hosts(result, hosts["dr"], row) if result.name != "dr" else None
            if apart:
                lines.append(
                    [result.name, label, *(found.text if (found := apart[f]) else "–" for f in ("top1", "tail"))]
                )
    return _table(["host", "H2T", "top1 against dr", "tail against dr"], lines)


def document(data: Path, template: str) -> str:
    """The text of docs/results.md: `template` with its {{places}} filled from the analyses in `data`."""
    found = {p.name: load_analysis(p) for p in sorted((data / "analyses").iterdir()) if p.is_dir()}
    ratio, donors, selection, controls = (found[n] for n in ("ratio", "donors", "selection", "controls"))
    places = {f"{n} made": a.made for n, a in found.items()}
    places |= {
        "stage I": f"{ratio['stage1'].metrics['stage1']['top1']:.2f}",
        "ratio table": markdown_table(ratio.results),
        "ratio branchwise": ratio_table(ratio["branchwise"]),
        "ratio stage1": ratio_table(ratio["stage1"]),
        "parts": parts_table(ratio),
        "controls branchwise 1": variant_table(controls["branchwise"], 1.0, {}, ""),
        "hosts table": markdown_table(found["hosts"].results),
        "hosts differences": difference_table(found["hosts"].results),
        "hosts apart": hosts_table(found["hosts"]),
        "pooling table": markdown_table(found["pooling"].results),
        "pooling differences": difference_table(found["pooling"].results),
        "grid text": grid_text(found["grid"], data / "analyses" / "grid"),
        "grid donors": variant_table(found["grid"]["grid"], 0.3, {}, ""),
    }
    for recipe in ("branchwise", "stage1"):
        places[f"donors {recipe}"] = variant_table(
            donors[recipe], 0.3, DONORS, "paper, CIFAR-100: head / med / tail / all"
        )
        places[f"selection {recipe}"] = variant_table(selection[recipe], 0.3, SELECTIONS, "paper, CIFAR-100: all")
        places[f"controls {recipe}"] = variant_table(controls[recipe], 0.3, {}, "")
    for place, text in places.items():
        template = template.replace("{{" + place + "}}", text)
    return template


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    template = (Path(__file__).parent / "results.md").read_text(encoding="utf-8")
    (given.out / "results.md").write_text(document(given.data, template), encoding="utf-8")
    ratio = load_analysis(given.data / "analyses" / "ratio")
    (given.out / "images").mkdir(exist_ok=True)
    (given.out / "images" / "ratio.svg").write_text(ratio_picture(ratio_curve(ratio["branchwise"])), encoding="utf-8")


if __name__ == "__main__":
    main()

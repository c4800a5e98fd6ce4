"""The tables of docs/results.md, from what evaluate wrote for finished analyses."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import markdown
from h2t.pipeline.reporting.files import text_of
from h2t.pipeline.reporting.page import spread
from h2t.pipeline.reporting.results import (
    FIGURES,
    ROWS,
    HostResult,
    against_zero,
    difference,
    load_result,
    mean_and_std,
    rows_apart,
    variants_at,
)

SHORT = ("top1", "head", "medium", "tail")
DONORS = {"reverse": "63.56 / 48.60 / 24.07 / 46.87", "balanced": "62.72 / 49.14 / 25.93 / 47.30"}
DONORS |= {"instance": "62.00 / 50.17 / 27.07 / 47.73", "without": "63.67 / 46.63 / 22.21 / 45.68"}
SELECTIONS = {"first": "47.22", "middle": "47.23", "last": "47.41", "random": "47.73, 47.75, 47.80, 47.71, 47.66"}
SELECTIONS |= {"without": "45.68"}
#: Analysis of variants -> the paper's figures on CIFAR-100, and the name of their column.
PUBLISHED: dict[str, tuple[dict[str, str], str]] = {
    "donors": (DONORS, "paper, CIFAR-100: head / med / tail / all"),
    "selection": (SELECTIONS, "paper, CIFAR-100: all"),
    "controls": ({}, ""),
}
RECIPES = ("stage1", "calibrated", "branchwise")
VIEWS = ("1 view", "up to 8 views")
REPORTED = 0.3  # the paper's ratio


@dataclass(frozen=True)
class Analysis:
    """A finished analysis: its hosts, and the record of each run."""

    name: str
    results: list[HostResult]
    runs: dict[str, dict[str, Any]]

    def __getitem__(self, host: str) -> HostResult:
        found = [r for r in self.results if r.name == host]
        if not found:
            raise UserError(
                f"analysis {self.name}: host {host!r} was left out; extract the rows it needs, run it again"
            )
        return found[0]

    @property
    def made(self) -> str:
        """The command, commit, time and machine in one line."""
        runs = list(self.runs.values())
        commits = ", ".join(sorted({str(r["commit"]) for r in runs}))
        heads, seconds, cpu = (sum(r[k] for r in runs) for k in ("heads", "seconds", "cpu"))
        machine = runs[0]["machine"]
        loads = [r["load"] for r in runs if r.get("load") is not None]
        shared = f"load average up to {max(loads):g}" if loads else "shared with other work"
        return (
            f"`make -C tests analysis-{self.name}`; commit {commits}; {heads} heads trained in {seconds:.0f} s "
            f"({cpu:.0f} s of processor time, {machine['cores']} cores, {machine['processor']}, {shared})."
        )


def load_analysis(folder: Path) -> Analysis:
    """What `benchmarks.analyses` wrote into `folder`. Raises UserError."""
    names = [p.parent.name for p in sorted((folder / "evaluate").glob("*/metrics.json"))]
    if not names:
        raise UserError(f"{folder}: no finished analysis; run make -C tests analysis-{folder.name}")
    runs = {p.stem: json.loads(p.read_text()) for p in sorted((folder / "runs" / "train_classifier").glob("*.json"))}
    return Analysis(folder.name, [load_result(n, folder / "evaluate" / n) for n in names], runs)


def cell(heads: pd.DataFrame, figure: str) -> str:
    return spread(*mean_and_std(heads, figure))


def apart_text(after: pd.DataFrame, before: pd.DataFrame, figure: str) -> str:
    return text_of(difference(after, before, figure))


def ratio_table(result: HostResult) -> str:
    """Every ratio, and what it changes against ratio 0."""
    lines = []
    for ratio in result.ratios:
        apart = against_zero(result, ratio)
        text = [text_of(apart[f]) if ratio else "–" for f in ("top1", "tail")]
        lines.append([f"{ratio:g}", *(cell(result.at(ratio), f) for f in FIGURES), *text])
    return markdown(["ratio", *FIGURES, "top1 against 0", "tail against 0"], lines)


def variant_table(result: HostResult, ratio: float, published: dict[str, str], paper: str) -> str:
    """Donors and selections at one ratio, each against (instance, random), beside the paper's figures."""
    usual = result.at(ratio)
    lines = [["without H2T", *(cell(result.at(0.0), f) for f in SHORT), apart_text(result.at(0.0), usual, "top1")]]
    lines.append(["instance, random", *(cell(usual, f) for f in SHORT), "–"])
    keys = ["without", "random" if "random" in published else "instance"]
    for v in variants_at(result, ratio):
        lines.append([f"{v.donor}, {v.selection}", *(cell(v.heads, f) for f in SHORT), text_of(v.apart["top1"])])
        keys.append(v.selection if v.selection in published else v.donor)
    if published:
        lines = [[*line, published.get(key, "–")] for line, key in zip(lines, keys, strict=True)]
    extra = [paper] if published else []
    return markdown(["donor, selection", *SHORT, "top1 against instance, random", *extra], lines)


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
        text = [apart_text(found, steps[i - 1][1], f) if i else "–" for f in ("top1", "tail")]
        lines.append([label, *(cell(found, f) for f in SHORT), *text])
    return markdown(["step", *SHORT, "top1 against the line above", "tail against the line above"], lines)


def labelled(ratio: Analysis, views: Analysis) -> dict[str, HostResult]:
    """The ratio grid under every recipe, with one view of an image and with up to 8, by a label that says so."""
    found = {}
    for analysis, words in zip((ratio, views), VIEWS, strict=True):
        for recipe in RECIPES:
            label = f"{recipe}, {words}"
            found[label] = replace(analysis[recipe], name=label)
    return found


def ratios_table(results: dict[str, HostResult], figure: str) -> str:
    """Ratios down, recipes across: mean and spread of one figure."""
    ratios = next(iter(results.values())).ratios
    lines = [[f"{ratio:g}", *(cell(r.at(ratio), figure) for r in results.values())] for ratio in ratios]
    return markdown(["ratio", *results], lines)


def fusion_table(results: dict[str, HostResult]) -> str:
    """What fusion adds under each recipe: at the paper's ratio, and at the ratio where top-1 is best."""
    lines = []
    for label, result in results.items():
        best = max(result.ratios, key=lambda r: result.at(r).top1.mean())
        texts = [
            apart_text(result.at(r), result.at(0.0), f) if r else "–"
            for r in (REPORTED, best)
            for f in ("top1", "tail")
        ]
        lines.append([label, *texts[:2], f"{best:g}", *texts[2:]])
    return markdown(
        ["recipe", f"top1, {REPORTED:g} - 0", f"tail, {REPORTED:g} - 0", "best ratio", "top1", "tail"], lines
    )


def guesses_table(results: dict[str, HostResult]) -> str:
    """What the samples of tail classes are taken for: percent of them by predicted class, and by its group."""
    lines = []
    for label, result in results.items():
        classes = result.tables["per_class"].drop_duplicates("class").sort_values("class")
        groups = classes.paper_index.to_numpy()
        confusion = result.tables["confusion"]
        confusion = confusion[confusion.true.isin(classes["class"][groups == "tail"])]
        for row, words in ROWS.items():
            found = confusion[confusion.number.isin(result.numbers(row))]
            share = 100 * found.groupby("predicted")["count"].sum().reindex(classes["class"], fill_value=0).to_numpy()
            share = share / share.sum() * 100
            cells = [f"{share[groups == g].sum():.1f}" for g in ("head", "medium", "tail")]
            lines.append([label, words, *cells, *(f"{s:.1f}" for s in share)])
    names = [f"class {j} ({n:,})" for j, n in zip(classes["class"], classes["count"], strict=True)]
    return markdown(["recipe", "classifier", "to head", "to medium", "to tail", *names], lines)


def seeds_table(controls: Analysis) -> str:
    """What nothing but other seeds changes: five other head seeds minus the first five, by place in the list."""
    lines = []
    for ratio in (0.0, REPORTED):
        first, other = controls["branchwise"].at(ratio), controls["other_seeds"].at(ratio)
        renumbered = other.assign(seed=first.seed.to_numpy())
        texts = [apart_text(renumbered, first, f) for f in SHORT]
        lines.append([f"{ratio:g}", *texts])
    return markdown(["ratio", *(f"{f}, other seeds - seeds" for f in SHORT)], lines)


def common_places(found: Mapping[str, Analysis], recipes: dict[str, HostResult]) -> dict[str, str]:
    """The places of both pages: how analyses were made, recipes side by side, variants of H2T, other seeds."""
    places = {f"{name} made": analysis.made for name, analysis in found.items()}
    places |= {f"ratios {figure}": ratios_table(recipes, figure) for figure in SHORT}
    for name, beside in PUBLISHED.items():
        for result in found[name].results:
            if result.name != "other_seeds":
                places[f"{name} {result.name}"] = variant_table(result, REPORTED, *beside)
    return {**places, "fusion": fusion_table(recipes), "seeds": seeds_table(found["controls"])}


def peers_table(contestants: Mapping[str, Any]) -> str:
    """The contestants of `bench_peers`, the fastest first."""
    columns = ["contestant", "processor s", "times ours", "s by the clock", "times ours", "mean top-1", "best top-1"]
    ours = contestants["ours"]
    lines = []
    for name, found in sorted(contestants.items(), key=lambda item: item[1]["cpu"]):
        spent = [f"{found[clock] / by:.1f}" for clock in ("cpu", "seconds") for by in (1, ours[clock])]
        lines.append([name, *spent, *(f"{found[figure]:.2f}" for figure in ("mean_top1", "best_top1"))])
    return markdown(columns, lines)


def hosts_table(hosts: Analysis) -> str:
    """Every host with H2T against DR with H2T, paired by seed."""
    lines = []
    for result in hosts.results:
        for row, label in (("without_h2t", "without"), ("with_h2t", "with")):
            apart = rows_apart(result, row, hosts["dr"], row) if result.name != "dr" else None
            if apart:
                lines.append([result.name, label, *(text_of(apart[f]) for f in ("top1", "tail"))])
    return markdown(["host", "H2T", "top1 against dr", "tail against dr"], lines)

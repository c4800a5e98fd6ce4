"""What a report says first: the best classifier, what H2T adds, how certain that is, what it cost, how to export it.

The page, results.md and the terminal say the same sentences.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from h2t.cache.redaction import in_markdown
from h2t.pipeline.base.text import counted, duration, some
from h2t.pipeline.evaluation.intervals import FEWEST_CHANGED, Difference
from h2t.pipeline.reporting.chosen import number
from h2t.pipeline.reporting.luck import Candidates
from h2t.pipeline.reporting.published import Estimate, different_runs, estimates
from h2t.pipeline.reporting.results import ROWS, HostResult, few_tested, of_one_class, rows_apart

RANKED = {"top1": "top-1", "tail": "tail", "medium": "medium", "head": "head", "ece": "calibration error"}
SMALLER_IS_BETTER = {"ece"}
APART = ("higher", "lower")  # verdicts that tell two classifiers apart
LEAST_LUCK = 0.1  # percentage points: less is not seen in a figure with one decimal
TIED = ("too close to tell", "identical")
NAMED = 4  # methods
SOURCES = {"seeds": "seeds of stage II", "images": "test images", "backbones": "trainings of the backbone"}


@dataclass(frozen=True)
class Method:
    """One host as the first screen shows it."""

    result: HostResult

    @property
    def name(self) -> str:
        """The host's name in the parameters."""
        return self.result.name

    @cached_property
    def changes(self) -> dict[str, Difference]:
        """With H2T minus without, by figure; empty for a host that was not trained both ways."""
        stated = self.result.metrics["difference"] or {}
        return {f: Difference.of(d) for f, d in stated.items() if d}

    def figure(self, row: str, figure: str) -> float | None:
        """One figure of a row of metrics.json, in percent; None if there is none."""
        entry = self.result.metrics[row]
        return None if entry is None else entry[figure]

    def best(self, figure: str) -> str | None:
        """The row of stage II with the better `figure`; without H2T if both are equal; None if neither has it."""
        known = [r for r in ("without_h2t", "with_h2t") if self.figure(r, figure) is not None]
        sign = -1 if figure in SMALLER_IS_BETTER else 1
        return max(known, key=lambda r: sign * (self.figure(r, figure) or 0.0), default=None)

    @property
    def ratio(self) -> float | None:
        """The ratio that is reported with H2T."""
        entry = self.result.metrics["with_h2t"]
        return None if entry is None else entry["ratio"]

    @property
    def tuned(self) -> dict[str, str]:
        """What was chosen for the method, ratio included: name -> value, with a remark if it is at an edge of the grid.

        With H2T, where there is such a classifier.
        """
        rows = [e for r in ("with_h2t", "without_h2t") if (e := self.result.metrics[r])]
        chosen = rows[0].get("chosen") if rows else None
        if not chosen:
            return {}
        found = {}
        for name, value in chosen["values"].items():
            end = "largest" if value == max(chosen["tried"][name]) else "smallest"
            found[name] = number(value) + (f", {end} tried" if name in chosen["at_edge"] else "")
        return found

    @property
    def seeds(self) -> int:
        """Number of seeds behind the means of stage II, in each replicate."""
        rows = (self.result.metrics[row] for row in ("without_h2t", "with_h2t"))
        return max((row["heads"] // row.get("replicates", 1) for row in rows if row), default=0)

    def words(self, row: str) -> str:
        """The classifier in words: the host's name, and its ratio if H2T could be used."""
        if row == "with_h2t":
            return f"{self.name} with H2T at ratio {self.ratio:g}"
        return self.name if self.result.metrics["with_h2t"] is None else f"{self.name} without H2T"


@dataclass(frozen=True)
class Ranking:
    """Methods in descending order of one figure, each in its better form.

    `places`: host -> place, from 1; the same place as the best for `ties`, hosts that are too close to it to tell.
    `others`: hosts on another backbone than the best, which cannot be compared with it.
    """

    figure: str
    methods: list[Method]
    places: dict[str, int]
    ties: list[str]
    others: list[str]

    @property
    def best(self) -> Method | None:
        """The method of the first place; None if no method has the figure."""
        return self.methods[0] if self.methods else None


Verdict = Callable[[Method, str, Method, str, str], str | None]


def rank(methods: Sequence[Method], figure: str, verdict: Verdict) -> Ranking:
    """Ranks the methods that have `figure` by it.

    `verdict(method, row, other, other_row, figure)` compares two classifiers.
    """
    sign = 1 if figure in SMALLER_IS_BETTER else -1
    known = [(m, row) for m in methods if (row := m.best(figure))]
    known.sort(key=lambda pair: sign * (pair[0].figure(pair[1], figure) or 0.0))
    places, ties, others = {}, [], []
    for place, (method, row) in enumerate(known, 1):
        places[method.name] = place
        if place == 1:
            continue
        first, first_row = known[0]
        found = verdict(method, row, first, first_row, figure)
        if found is None and method.result.about["host"]["backbone"] != first.result.about["host"]["backbone"]:
            others.append(method.name)
        elif found not in APART:
            ties.append(method.name)
            places[method.name] = 1
    return Ranking(figure, [m for m, _ in known], places, ties, others)


@dataclass(frozen=True)
class Answer:
    """The sentences that a report begins with.

    `runs` are run records, for the cost in seconds. `evaluated`, the folder of evaluated hosts, and `backbones`, the
    backbone of each host, are for the export command.
    """

    results: Sequence[HostResult]
    runs: Sequence[Mapping[str, Any]] = ()
    evaluated: Path | None = None
    backbones: Mapping[str, str] | None = None
    #: What takes long and does not depend on `runs`, by a name. Copies with other `runs` share it.
    found: dict[tuple[str, ...], Any] = field(default_factory=dict, repr=False)

    def _once(self, *name: str, of: Callable[[], Any]) -> Any:
        if name not in self.found:
            self.found[name] = of()
        return self.found[name]

    @cached_property
    def methods(self) -> list[Method]:
        """All hosts, in the order of the parameters."""
        return [Method(r) for r in self.results]

    @cached_property
    def candidates(self) -> Candidates:
        """What the best is chosen from."""
        return Candidates([(r, row) for r in self.results for row in ("without_h2t", "with_h2t")])

    @cached_property
    def rankings(self) -> dict[str, Ranking]:
        """A ranking by each figure that any method has."""
        rankings = {f: rank(self.methods, f, self._verdict) for f in RANKED}
        return {f: r for f, r in rankings.items() if r.methods}

    def _verdict(self, after: Method, row: str, before: Method, before_row: str, figure: str) -> str | None:
        pair = (after.name, row, before.name, before_row)
        apart = self._once(*pair, of=lambda: rows_apart(after.result, row, before.result, before_row) or {})
        found = apart.get(figure)
        return found.verdict if found else None

    def lines(self, figure: str = "top1") -> list[str]:
        """The answer, one sentence group a line: best, H2T, certainty, cost, export command."""
        said = [" ".join(self.best(figure)), *self.sentences()]
        command = self.command(figure)
        return [*said, *([f"To use it: {command}"] if command else [])]

    def sentences(self) -> list[str]:
        """What is said whatever methods are ranked by: H2T, useless classifiers, certainty, cost."""
        useless = self._once("useless", of=lambda: of_one_class(self.results, self.backbones or {}))
        return [*filter(None, (self.share(), useless, self.certainty(), self.cost()))]

    def best(self, figure: str) -> list[str]:
        """Sentences: which classifier is best by `figure`, and which are too close to it to tell or not compared."""
        ranking = self.rankings.get(figure)
        if ranking is None or ranking.best is None:
            return [f"No method has a {RANKED[figure]} figure."]
        first = ranking.best
        row = first.best(figure) or ""
        sentences = [f"Best {RANKED[figure]}: {first.words(row)}; {_figures(first, row, figure)}."]
        if (luck := self._once("luck", figure, of=lambda: self.candidates.luck(figure) or 0.0)) >= LEAST_LUCK:
            rest = (first.figure(row, figure) or 0.0) - luck
            sentences.append(
                f"It is the best of {len(self.candidates)} classifiers on these test images; chosen on nine tenths of "
                f"them, the best has {rest:.1f} % on the rest."
            )
        stage1 = None
        if first.figure("stage1", figure) is not None:
            stage1 = self._verdict(first, "stage1", first, row, figure)
        if stage1 == ("lower" if figure in SMALLER_IS_BETTER else "higher"):
            sentences.append(f"But stage I, the network as it was before, has {_figures(first, 'stage1', figure)}.")
            if command := self.command(figure, stage1=True):
                sentences.append(f"To use that: {command}")
        if ties := [*(["stage I"] if stage1 in TIED else []), *ranking.ties]:
            sentences.append(f"Not clearly behind it: {some(ties, NAMED)}.")
        if figure in first.changes:
            sentences.append(f"H2T: {first.changes[figure].in_words(1)}.")
        if ranking.others:
            sentences.append(f"On another backbone, so not compared: {some(ranking.others, NAMED)}.")
        return sentences

    def share(self) -> str:
        """What H2T changes in top-1 and tail accuracy: by how much in one method, or for how many of several."""
        both = [m for m in self.methods if m.changes]
        if not both:
            return "H2T: no method was trained both with and without it."
        if len(both) == 1:
            changes = both[0].changes
            parts = [f"{RANKED[f]} {changes[f].in_words(1)}" for f in ("top1", "tail") if f in changes]
            return f"H2T in {both[0].name}: {'; '.join(parts)}."
        parts = [f"{RANKED[f]} {tally}" for f in ("top1", "tail") if (tally := _tally(both, f))]
        return f"H2T in {counted(len(both), 'method')}: {'; '.join(parts)}."

    def certainty(self) -> str:
        """What the intervals cover, and what they do not."""
        covers = {c for m in self.methods for change in m.changes.values() for c in change.covers}
        if not covers:
            return "No intervals: they need several seeds, with and without H2T."
        groups = max((change.image_groups or 0 for m in self.methods for change in m.changes.values()), default=0)
        numbers = {
            "seeds": _range(m.seeds for m in self.methods if m.changes),
            "images": f"{counted(groups, 'group')} of {self.test_images:,}" if groups else f"{self.test_images:,}",
            "backbones": _range(m.result.trainings for m in self.methods if m.changes),
        }
        inside = [" ".join(filter(None, (numbers.get(c, ""), SOURCES[c]))) for c in SOURCES if c in covers]
        outside = [f"other {SOURCES[c]}" for c in SOURCES if c not in covers]
        text = f"Intervals (95 %) cover {', '.join(inside[:-1])}{' and ' if inside[1:] else ''}{inside[-1]}"
        limits = f"; not {' or '.join(outside)}" if outside else ""
        few = few_tested(self.results[0])
        no_direction = f" Fewer than {FEWEST_CHANGED} groups never tell methods apart."
        return f"{text}{limits}.{no_direction if 0 < groups < FEWEST_CHANGED else ''}" + (
            f" Few test images: {few}." if few else ""
        )

    def cost(self) -> str:
        """How many classifiers were trained, and what the published way would have taken."""
        heads = sum(len(r.every_head) for r in self.results)
        said = f"Cost: {counted(heads, 'classifier')} on cached maps"
        found = [e for e in self.estimates if e.ours["seconds"]]
        if found:
            ours, theirs = (sum(getattr(e, of)["seconds"] or 0.0 for e in found) for of in ("ours", "theirs"))
            timed = sum(e.heads for e in found)
            those = f"{timed:,} of them " if timed < heads else ""
            return (
                f"{said}, {those}trained in {duration(ours)}; the published way takes about {duration(theirs)} "
                "(estimated)."
            )
        images = self._once("images", of=lambda: sum(self._published_images(r) for r in self.results))
        return f"{said}, no image through the backbone; the published way passes {images:,} through it in every epoch."

    def command(self, figure: str = "top1", *, stage1: bool = False) -> str | None:
        """The command that exports a classifier of the best method, or stage I's; None if its backbone is unknown.

        Hosts evaluated in a folder of another name than `evaluate` leave the folders to fill in: HEADS, CACHE,
        BACKBONE. What lies on the disk does not count, so that a report depends on the evaluated hosts alone. A cache
        pooled by gap is often used where there are no images, so its command asks for none.
        """
        ranking = self.rankings.get(figure)
        if ranking is None or ranking.best is None or self.evaluated is None:
            return None
        first = ranking.best
        backbone = (self.backbones or {}).get(first.name)
        row = first.best(figure)
        if backbone is None or row is None:
            return None
        entry = first.result.metrics[row]
        heads = first.result.at(entry["ratio"])
        home = self.evaluated.parent
        folders = {
            "HEADS": home / "train_classifier" / first.name,
            "CACHE": home / "extract" / backbone,
            "BACKBONE": home / "train_backbone" / backbone,
        }
        several = len(first.result.every_head) > 1 and not stage1
        chosen = ["--head", str(int(heads.number.iloc[0]))] if several else []
        averaged = first.result.about["cache"]["provenance"].get("pool") == "gap"
        usual = self.evaluated.name == "evaluate"
        named = [place.as_posix() if usual else blank for blank, place in folders.items()]
        named[0] = named[2] if stage1 else named[0]
        return shlex.join(["h2t", "export", *named, "model", *chosen, *["--without-images"] * averaged])

    def overview(self) -> list[str]:
        """A table of all methods as text of at most 100 columns, which is Markdown too."""
        lines = [["method", "ratio", "top-1", "H2T", "tail", "H2T"]]
        for m in self._in_order:
            cells = [in_markdown(shortened(m.name)), "–" if m.ratio is None else f"{m.ratio:g}"]
            for figure in ("top1", "tail"):
                cells += [_three(m, figure), _short(m.changes.get(figure))]
            lines.append(cells)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        rows.insert(1, "| " + " | ".join("-" * max(3, w) for w in widths) + " |")
        return [
            *rows,
            "",
            "Top-1 and tail: stage I → without H2T → with H2T, percent of test images. H2T: with minus without;",
            "? too close to tell, = identical. Methods in the order of their better top-1.",
        ]

    @property
    def _in_order(self) -> list[Method]:
        """All methods, the best top-1 first."""
        ranking = self.rankings.get("top1")
        return ranking.methods if ranking else self.methods

    def summary(self) -> dict[str, dict[str, Any]]:
        """At most five numbers a host, for `dvc metrics show` and `dvc exp show`."""
        table: dict[str, dict[str, Any]] = {}
        for m in self.methods:
            line: dict[str, Any] = {
                f"{figure}_{word}": round(value, 2)
                for figure in ("top1", "tail")
                for row, word in (("without_h2t", "without"), ("with_h2t", "with"))
                if (value := m.figure(row, figure)) is not None
            }
            if "top1" in m.changes:
                line["h2t"] = m.changes["top1"].verdict or "no verdict"
            table[m.name] = line
        return table

    @cached_property
    def estimates(self) -> list[Estimate]:
        """What the published way would take, for hosts whose run records are known."""
        return estimates(self.results, self.runs)

    @property
    def test_images(self) -> int:
        """The number of test images; of the first host's cache."""
        rows = self.results[0].about["cache"]["rows_of"]
        return next((n for split, _, n in rows if split == "test"), 0)

    @staticmethod
    def _published_images(result: HostResult) -> int:
        """Images that an epoch of all different classifiers passes through the backbone in the published way."""
        twice, once = different_runs(result.every_head, result.constants)
        return (2 * twice + once) * sum(result.about["counts"])


def _figures(method: Method, row: str, figure: str) -> str:
    """`figure`, top-1 and tail accuracy of a row, those that it has: `top-1 86.2 %, tail 65.8 %`."""
    known = {f: v for f in (figure, "top1", "tail") if (v := method.figure(row, f)) is not None}
    return ", ".join(f"{RANKED[f]} {v:.1f} %" for f, v in known.items())


def _tally(methods: Sequence[Method], figure: str) -> str:
    """How many methods H2T raised and lowered: `higher in 1, lower in 2`; empty if none has the figure."""
    said = [m.changes[figure].verdict for m in methods if figure in m.changes]
    decided = {verdict: said.count(verdict) for verdict in ("higher", "lower", "identical")}
    parts = [f"{verdict} in {n}" for verdict, n in decided.items() if n or verdict != "identical"]
    rest = len(said) - sum(decided.values())
    return ", ".join([*parts, *([f"undecided in {rest}"] if rest else [])]) if said else ""


def _three(method: Method, figure: str) -> str:
    """`figure` of stage I, without and with H2T, as `73.0→83.4→82.1`."""
    values = (method.figure(row, figure) for row in ROWS)
    return "→".join("–" if v is None else f"{v:.1f}" for v in values)


def _short(change: Difference | None) -> str:
    """A change as `-1.3 lower`; `?` and `=` stand for too close to tell and identical."""
    if change is None:
        return "–"
    verdict = {"identical": "=", "higher": "higher", "lower": "lower"}.get(change.verdict or "", "?")
    return f"{change.mean:+.1f} {verdict}"


def shortened(name: str, most: int = 26) -> str:
    """A name that fits a column of `most` characters."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _range(numbers: Iterable[int]) -> str:
    """Whole numbers as `3` or `3 to 5`."""
    found = sorted(set(numbers))
    return "" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"

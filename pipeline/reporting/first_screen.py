"""What the first screen of the page draws: a line per method, with H2T's change as a dot and its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting.answer import Answer, Method

STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # between the ticks of a scale, in percentage points
DRAWN = ("top1", "tail")


@dataclass(frozen=True)
class Scale:
    """Percentage points from `low` to `high`, drawn over the width of a column; both are ticks, and 0 lies between."""

    low: float
    high: float
    step: float

    def at(self, value: float) -> float:
        """The place of `value` in percent of the column's width."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Place and text of each tick."""
        count = round((self.high - self.low) / self.step)
        values = [self.low + i * self.step for i in range(count + 1)]
        return [(self.at(v), f"{v:+g}" if abs(v) > 1e-9 else "0") for v in (round(v, 6) for v in values)]


@dataclass(frozen=True)
class Dot:
    """A change on its scale: places in percent of the width (`low` and `high` None without an interval), and words."""

    at: float
    low: float | None
    high: float | None
    kind: str
    words: str
    interval: str


@dataclass(frozen=True)
class Line:
    """A method on the first screen: its name, dots by figure, figures by row, and remarks on its ratio."""

    method: Method
    place: int | None
    tied: bool
    dots: dict[str, Dot]

    @property
    def steps(self) -> dict[str, list[tuple[str, bool]]]:
        """Top-1 and tail of stage I, without and with H2T as text; True marks the better of the last two."""
        found = {}
        for figure in DRAWN:
            best = self.method.best(figure)
            rows = {row: self.method.figure(row, figure) for row in ("stage1", "without_h2t", "with_h2t")}
            found[figure] = [("–" if v is None else f"{v:.1f}", row == best) for row, v in rows.items()]
        return found


@dataclass(frozen=True)
class FirstScreen:
    """The sentences, scales and lines of the first screen; `answers` is what changes with the figure to rank by."""

    sentences: list[str]
    best: list[str]
    command: str | None
    scales: dict[str, Scale]
    lines: list[Line]
    ranked: list[str]
    answers: dict[str, Any]


def first_screen(answer: Answer) -> FirstScreen:
    """The first screen, ranked by top-1; `answers` holds the other rankings for the page's script."""
    scales = {f: scale([m.changes[f] for m in answer.methods if f in m.changes]) for f in DRAWN}
    rankings = answer.rankings
    start = next(iter(rankings), "top1")
    order = rankings[start].methods if rankings else answer.methods
    rest = [m for m in answer.methods if m not in order]
    return FirstScreen(
        sentences=answer.sentences(),
        best=answer.best(start),
        command=answer.command(start),
        scales=scales,
        lines=[_line(m, answer, start, scales) for m in (*order, *rest)],
        ranked=list(rankings),
        answers={
            f: {
                "best": answer.best(f),
                "command": answer.command(f),
                "order": [m.name for m in r.methods],
                "places": r.places,
                "ties": r.ties,
            }
            for f, r in rankings.items()
        },
    )


def scale(changes: Sequence[Difference]) -> Scale:
    """The scale that shows 0 and all `changes` with their intervals, with at most six steps."""
    ends = [0.0, *(e for c in changes for e in (c.low, c.mean, c.high) if e is not None)]
    low, high = min(ends), max(ends)
    step = next((s for s in STEPS if high - low <= 4 * s), STEPS[-1])
    first, last = int(low // step), -int(-high // step)
    return Scale(first * step, (last if last > first else first + 1) * step, step)


def _line(method: Method, answer: Answer, figure: str, scales: dict[str, Scale]) -> Line:
    ranking = answer.rankings.get(figure)
    place = ranking.places.get(method.name) if ranking else None
    tied = bool(ranking and ranking.ties and place == 1)
    dots = {f: _dot(method.changes[f], scales[f]) for f in DRAWN if f in method.changes}
    return Line(method, place, tied, dots)


def _dot(change: Difference, on: Scale) -> Dot:
    low, high = (None if e is None else on.at(e) for e in (change.low, change.high))
    kind = change.verdict if change.verdict in ("higher", "lower", "identical") else "open"
    return Dot(
        on.at(change.mean),
        low,
        high,
        kind,
        f"{change.mean:+.1f} {change.verdict or 'no verdict'}",
        change.interval(1),
    )

"""A against B: the same hosts in two folders, classifier by classifier."""

from collections.abc import Sequence
from dataclasses import dataclass

from h2t.pipeline.base.text import counted
from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting.results import FIGURES, ROWS, HostResult, rows_apart


@dataclass(frozen=True)
class Side:
    """One classifier of one host in A and in B, and the differences B minus A by figure.

    `seeds` says in words how many seeds both have.
    """

    host: str
    row: str
    a: HostResult
    b: HostResult
    apart: dict[str, Difference | None]
    seeds: str

    @property
    def label(self) -> str:
        """The classifier in words."""
        return ROWS[self.row]


def sides_of(pairs: Sequence[tuple[HostResult, HostResult]]) -> list[Side]:
    """The classifiers that each pair (A, B) has on both sides."""
    return [
        Side(a.name, row, a, b, rows_apart(b, row, a, row) or dict.fromkeys(FIGURES), _seeds(a, b, row))
        for a, b in pairs
        for row in ROWS
        if a.metrics[row] is not None and b.metrics[row] is not None
    ]


def sentence(sides: Sequence[Side]) -> str:
    """For how many classifiers B is higher or lower than A in top-1."""
    said = [d.verdict if (d := s.apart["top1"]) else None for s in sides]
    verdicts = ("higher", "lower", "too close to tell", "identical", None)
    counts = [f"{verdict or 'no verdict'} for {n}" for verdict in verdicts if (n := said.count(verdict))]
    return f"Top-1 of B against A, over {counted(len(sides), 'classifier')}: {', '.join(counts) or 'none'}."


def _seeds(a: HostResult, b: HostResult, row: str) -> str:
    """How many seeds are on both sides: `3 seeds`, or `3 of 5 seeds` where one side has more."""
    if row == "stage1" or not a.about["host"]["seeded"]:
        return "no seed"
    first, second = (set(r.at(r.metrics[row]["ratio"]).seed) for r in (a, b))
    both, most = len(first & second), len(first | second)
    return counted(both, "seed") if both == most else f"{both} of {most} seeds"

"""report: tables and figures of every host, from the results of evaluate.

Writes `index.html` (self-contained), `results.md` (the tables), `results.csv` and `results.tex` (the same for a paper),
`summary.json` (at most five figures a host, for `dvc metrics show`), `metrics.json` (what evaluate wrote, of all hosts)
and `plots/*.csv` (the data behind `dvc plots show`).
Only hosts named in the parameters are read; results of other hosts are named in a note and left out.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from h2t.pipeline.base import clock
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.run import Run

NUMBER = 2026112801  # other results, another number: docs/numbers.md


class Params(Section):
    """Section `report`."""

    title: str = "Long-tailed recognition on cached features"
    """Title of the page."""


def run(
    params: Params,
    run: Run,
    hosts: list[str],
    evaluate_dir: Path,
    runs: Path | None = None,
    backbones: Mapping[str, str] | None = None,
) -> None:
    """Writes a report on `hosts` into the directory `run.out`, and prints the answer and an overview.

    The page also shows the run records in `runs`. `backbones` names the backbone of each host, for the export command.
    Raises UserError for a host that has not been evaluated, and for files that cannot be read.
    """
    # Imported here: every stage checks the section `report`, and pandas takes long to import.
    from h2t.pipeline.reporting.answer import Answer
    from h2t.pipeline.reporting.files import run_records, write
    from h2t.pipeline.reporting.results import load_result

    clock.begins("drawing")
    results = [load_result(name, evaluate_dir / name) for name in hosts]
    leftovers = sorted(p.name for p in evaluate_dir.iterdir() if p.is_dir() and p.name not in hosts)
    if leftovers:
        run.say(f"note: {', '.join(leftovers)}: not among the hosts of the parameters, left out")
    answer = Answer(results, run_records(runs) if runs else [], evaluate_dir, backbones)
    write(params.title, answer, run.out)
    # What is printed may tell of time, what is written may not: equal results give equal bytes.
    printed = replace(answer, runs=answer.runs or _records_beside(evaluate_dir))
    page = f"page: {run.out / 'index.html'}"
    run.say("\n".join([*printed.lines(), "", *printed.overview(), "", page]))


def _records_beside(evaluate_dir: Path) -> list[dict[str, Any]]:
    """The run records in `runs` beside the evaluated hosts; none if there are none, or none that can be read."""
    from h2t.pipeline.reporting.files import run_records

    with suppress(UserError):
        return run_records(evaluate_dir.parent / "runs")
    return []

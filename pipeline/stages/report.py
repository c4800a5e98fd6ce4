"""Stage report: tables and figures of every host, from the results of evaluate.

Writes `index.html` (self-contained), `results.md` (the tables), `metrics.json` (of all hosts, for `dvc metrics show`)
and `plots/*.csv` (the data behind `dvc plots show`). Only hosts named in the parameters are read;
results of other hosts are named in a note and left out.
"""

from pathlib import Path

from h2t.pipeline.base import clock
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.run import Run

NUMBER = 2026112604  # other results, another number: docs/numbers.md


class Params(Section):
    """Section `report`."""

    title: str = "Long-tailed recognition on cached features"
    """Title of the page."""


def run(params: Params, run: Run, hosts: list[str], evaluate_dir: Path, runs: Path | None = None) -> None:
    """Writes a report on `hosts` into the directory `run.out`. The page also shows the run records in `runs`.

    Raises UserError for a host that has not been evaluated, and for files that cannot be read.
    """
    # Imported here: every stage checks the section `report`, and pandas takes long to import.
    from h2t.pipeline.reporting.files import markdown_table, run_records, write
    from h2t.pipeline.reporting.results import load_result

    clock.begins("drawing")
    results = [load_result(name, evaluate_dir / name) for name in hosts]
    leftovers = sorted(p.name for p in evaluate_dir.iterdir() if p.is_dir() and p.name not in hosts)
    if leftovers:
        run.say(f"note: {', '.join(leftovers)}: not among the hosts of the parameters, left out")
    write(params.title, results, run.out, run_records(runs) if runs else [])
    run.say(markdown_table(results))

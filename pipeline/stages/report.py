"""report: tables and pictures of every host, from what evaluate wrote.

Writes `index.html` (self-contained), `results.md` (the tables), `ratio.svg`, `metrics.json` (that of every host, for
`dvc metrics show`) and `plots/*.csv`, the data behind `dvc plots show`. Only hosts named in the parameters are read;
leftovers of earlier runs are named and left out.
"""

from collections.abc import Callable
from pathlib import Path

from h2t.pipeline.base.params import Section

NUMBER = 2026112601  # other results, another number: docs/numbers.md


class Params(Section):
    """Section `report`."""

    title: str = "Long-tailed recognition on cached features"
    """Title of the page."""


def run(
    params: Params,
    hosts: list[str],
    evaluate_dir: Path,
    out: Path,
    say: Callable[[str], None],
    runs: Path | None = None,
) -> None:
    """Reports on `hosts` into the directory `out`. With `runs`, a folder of run records, the page shows them too."""
    # Here and not above: every stage checks the section `report`, and pandas and matplotlib take seconds to import.
    from h2t.pipeline.reporting.files import markdown_table, run_records, write
    from h2t.pipeline.reporting.results import load_result

    results = [load_result(name, evaluate_dir / name) for name in hosts]
    leftovers = sorted(p.name for p in evaluate_dir.iterdir() if p.is_dir() and p.name not in hosts)
    if leftovers:
        say(f"note: {', '.join(leftovers)}: not among the hosts of the parameters, left out")
    write(params.title, results, out, run_records(runs) if runs else [])
    say(markdown_table(results))

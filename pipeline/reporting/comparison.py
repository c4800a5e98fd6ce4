"""`h2t report --compare`: compares two sets of evaluated hosts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from h2t.cache.redaction import in_markdown
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import markdown
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.files import text_of, write
from h2t.pipeline.reporting.page import cell
from h2t.pipeline.reporting.results import FIGURES, HostResult, load_result
from h2t.pipeline.reporting.sides import Side, sentence, sides_of


def compare(
    a: Path, b: Path, out: Path | None, say: Callable[[str], None], names: tuple[str, str] | None = None
) -> None:
    """Prints a table of hosts that are in both folders, with the differences b minus a.

    A folder is the one evaluate writes to (`data/evaluate`), or its parent (`data`). `names` are what the output calls
    them, by default their paths. With `out`, a complete report on both is written too. Raises UserError if no host
    is in both, or a result cannot be read.
    """
    first, second = names or (str(a), str(b))
    folders = [_evaluated(p) for p in (a, b)]
    hosts = [sorted(p.parent.name for p in f.glob("*/metrics.json")) for f in folders]
    shared = [n for n in hosts[0] if n in hosts[1]]
    if not shared:
        raise UserError(
            f"{first}, {second}: no host is in both; got {', '.join(hosts[0]) or 'none'} in the first and "
            f"{', '.join(hosts[1]) or 'none'} in the second; compare folders with a host of the same name"
        )
    pairs = [(load_result(name, folders[0] / name), load_result(name, folders[1] / name)) for name in shared]
    sides = sides_of(pairs)
    say("\n".join([sentence(sides), "", *_table(sides)]))
    alone = sorted(set(hosts[0]) ^ set(hosts[1]))
    if alone:
        say(f"\nnote: {', '.join(alone)}: only in one of the two, not compared")
    if out is not None:
        both = [
            HostResult(f"{label}: {r.name}", r.metrics, r.about, r.tables)
            for pair in pairs
            for label, r in zip("AB", pair, strict=True)
        ]
        write(f"A: {first}, B: {second}", Answer(both), out, sides)


def _evaluated(folder: Path) -> Path:
    """The folder of results at `folder`. `evaluate` comes first, because `data` also has a `report/metrics.json`."""
    return next((p for p in (folder / "evaluate", folder) if any(p.glob("*/metrics.json"))), folder)


def _table(sides: Sequence[Side]) -> list[str]:
    """The Markdown table of A, B and their differences, and its explanation."""
    lines = []
    for side in sides:
        cells = [_top1(r.metrics[side.row]) for r in (side.a, side.b)]
        texts = [text_of(side.apart[f]) for f in FIGURES]
        lines.append([in_markdown(side.host), side.label, *cells, side.seeds, *texts])
    return [
        markdown(["host", "classifier", "A", "B", "seeds of both", *(f"{f}, B - A" for f in FIGURES)], lines),
        "",
        "A and B: top-1 in percent, mean ± standard deviation over seeds; with H2T, at the stated ratio.",
        "Differences: percentage points, with the 95 % interval over the seeds that both have and over test images.",
        "Between two backbones there is no verdict, unless each was trained three times (replicates).",
    ]


def _top1(entry: Mapping[str, Any] | None) -> str:
    """Mean ± std of top-1, and the ratio, because the two sides may have chosen different ones."""
    at = f" at {entry['ratio']:g}" if entry and entry["ratio"] else ""
    return cell(entry, "top1") + at

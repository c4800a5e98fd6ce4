"""Two sets of evaluated hosts side by side: `h2t report --compare`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from h2t.cache.redaction import in_markdown
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.reporting.files import text_of, write
from h2t.pipeline.reporting.intervals import Difference
from h2t.pipeline.reporting.page import cell
from h2t.pipeline.reporting.results import FIGURES, ROWS, HostResult, between_hosts, load_result


def compare(
    a: Path, b: Path, out: Path | None, say: Callable[[str], None], names: tuple[str, str] | None = None
) -> None:
    """Two folders of evaluated hosts side by side: hosts of the same name, b minus a. With `out`, a whole report too.

    A folder is what evaluate writes to (`data/evaluate`), or one that holds it as `evaluate` (`data`). `names`: what to
    call them, by default their paths.
    """
    first, second = names or (str(a), str(b))
    folders = [_evaluated(p) for p in (a, b)]
    hosts = [sorted(p.parent.name for p in f.glob("*/metrics.json")) for f in folders]
    shared = [n for n in hosts[0] if n in hosts[1]]
    if not shared:
        raise UserError(
            f"{first}, {second}: no host is in both ({', '.join(hosts[0]) or 'none'}; {', '.join(hosts[1]) or 'none'})"
        )
    pairs = [[load_result(name, folder / name) for folder in folders] for name in shared]
    say("\n".join(_side_by_side(pairs)))
    alone = sorted(set(hosts[0]) ^ set(hosts[1]))
    if alone:
        say(f"\nnote: {', '.join(alone)}: in one of them only, left out")
    if out is not None:
        both = [
            HostResult(f"{label}: {r.name}", r.metrics, r.about, r.tables)
            for pair in pairs
            for label, r in zip("AB", pair, strict=True)
        ]
        write(f"A: {first}, B: {second}", both, out, against={f"B: {name}": f"A: {name}" for name in shared})


def _evaluated(folder: Path) -> Path:
    """`evaluate` first: `data` itself also holds a `report/metrics.json`."""
    return next((p for p in (folder / "evaluate", folder) if any(p.glob("*/metrics.json"))), folder)


def _side_by_side(pairs: list[list[HostResult]]) -> list[str]:
    lines = ["| host | head | A | B | " + " | ".join(f"{f}, B - A" for f in FIGURES) + " |"]
    lines.append("| --- | --- | --- | --- |" + " --- |" * len(FIGURES))
    for first, second in pairs:
        for row, label in ROWS.items():
            cells = [_top1(r.metrics[row]) for r in (first, second)]
            apart = between_hosts(second, first, row) or _plain(second.metrics[row], first.metrics[row])
            texts = [text_of(apart[f]) for f in FIGURES]
            lines.append(f"| {in_markdown(first.name)} | {label} | " + " | ".join([*cells, *texts]) + " |")
    return [
        *lines,
        "",
        "A and B: top-1, mean ± std over seeds, with H2T at its ratio. Differences: paired by seed, 95 % interval.",
    ]


def _top1(entry: Mapping[str, Any] | None) -> str:
    """Mean ± std, and the ratio, which may have been chosen: another one is no small difference."""
    at = f" at {entry['ratio']:g}" if entry and entry["ratio"] else ""
    return cell(entry, "top1") + at


def _plain(after: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> dict[str, Difference | None]:
    """Without seeds to pair (stage I): the difference alone."""
    found: dict[str, Difference | None] = dict.fromkeys(FIGURES)
    for f in FIGURES if after and before else ():
        x, y = (after or {})[f], (before or {})[f]
        found[f] = Difference(x - y, None, None, None, 1) if x is not None and y is not None else None
    return found

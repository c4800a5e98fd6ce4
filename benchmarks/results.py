"""docs/results.md and its pictures from finished analyses, online runs and the digits, beside the paper's figures.

The commands that make them stand in `benchmarks/results.md`, the template.

    python -m benchmarks.results --data cifar --out docs
"""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import frozen_results
from benchmarks.arena import table as arena_table
from benchmarks.measure import RESULTS, errors_in_one_line, save
from benchmarks.online_results import BOUNDS, Online, bounds_table, load_online, recipes_lines, record
from benchmarks.pictures import ratio_picture
from benchmarks.tables import (
    RECIPES,
    REPORTED,
    VIEWS,
    Analysis,
    common_places,
    guesses_table,
    hosts_table,
    labelled,
    load_analysis,
    parts_table,
    peers_table,
    ratio_table,
    variant_table,
)
from h2t.pipeline.base import params
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import markdown
from h2t.pipeline.reporting.files import difference_table, markdown_table, run_records
from h2t.pipeline.reporting.published import different_runs
from h2t.pipeline.reporting.results import load_result, ratio_curve

ARENAS = ("arena", *(f"arena-{cache}" for cache in ("stage1", "maps", "imagenet", "imagenet-96", "imagenet-maps")))
BESIDE_ONLINE = ("figure", "online", "ours", "ours - online", "bound", "the 95 % interval lies")


def online_tables(online: Online, ours: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Places of the section on the published way: the bounds, and every recipe (heads by its label) against it."""
    return {
        **{
            f"online {words}": markdown(BESIDE_ONLINE, bounds_table(online, ours[f"branchwise, {words}"]))
            for words in VIEWS
        },
        "online recipes": markdown(["recipe", *(f"{f}, ours - online" for f in BOUNDS)], recipes_lines(online, ours)),
        "online made": online.made,
    }


def grid_text(grid: Analysis, online: Online) -> str:
    """How long 660 heads took, and the published way beside it, from whole runs of it."""
    run = grid.runs["grid"]
    twice, once = different_runs(grid["grid"].heads)
    runs = twice + once / 2  # without donors one pass a step is enough
    seconds, cpu = (runs * online.median(clock) for clock in ("seconds", "cpu"))
    return (
        f"{run['heads']} heads took {run['seconds']:.0f} s of stage II ({run['cpu']:.0f} s of processor time). The "
        "published way runs the backbone twice a step: "
        f"{online.median('cpu'):.0f} s of processor time a run (median of the {len(online.runs)} whole runs above), "
        f"half of it without donors. It needs {twice} runs with donors and {once} at ratio 0; the other heads cannot "
        "differ from these (ratio 0 whatever the donor, ratio 1 whatever the channels). That is "
        f"{cpu / 3600:,.0f} hours of processor time, estimated: **{cpu / run['cpu']:,.0f} times** ours, and "
        f"{seconds / run['seconds']:,.0f} times by the clock, on shared cores. The one extraction, which the cache "
        "shares, is left out. The page of the analysis reckons the same from the forward passes of the extraction."
    )


def digits_text(data: Path) -> str:
    """The paper's hosts on digits, from what `make table` left in `data`."""
    names = list(params.load(Path(__file__).parent.parent / "presets" / "digits.yaml")["hosts"])
    results = [load_result(name, data / "evaluate" / name) for name in names]
    runs = run_records(data / "runs")
    commits = ", ".join(sorted({str(r["commit"]) for r in runs}))
    spent = sum(r["seconds"] for r in runs if r["seconds"])
    machine = next(r["machine"] for r in runs if r["machine"])
    made = (
        f"`make table`; commit {commits}; {len(runs)} stage runs, {spent:.0f} s in them ({machine['cores']} cores, "
        f"{machine['processor']}, shared with other work)."
    )
    return "\n\n".join([markdown_table(results), "With H2T minus without:", difference_table(results), made])


def recorded(name: str) -> Any:
    """What a benchmark left in benchmarks/results."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def peers_text(body: Mapping[str, Any]) -> str:
    """The table of `bench_peers` and how busy the machine was."""
    about = body["machine"]
    made = (
        f"`python -m benchmarks.bench_peers`; {body['samples']:,} samples, {body['channels']} channels; "
        f"{about['cores']} cores, load average {about['load_before']:.0f} before, {body['load_after']:.0f} after."
    )
    return "\n\n".join([peers_table(body["contestants"]), made])


def grid_now(grid: Mapping[str, Any], online: Online) -> str:
    """How long `bench_peers` takes for the grid, and how many times as long the published way takes."""
    cpu = (grid["twice"] + grid["once"] / 2) * online.median("cpu")
    return (
        f"Stage II has become faster since: `python -m benchmarks.bench_peers` trains the same {grid['classifiers']} "
        f"heads in {grid['cpu']:.0f} s of processor time, so the published way takes "
        f"**{cpu / grid['cpu']:,.0f} times** as much."
    )


def arena_text(body: Mapping[str, Any]) -> str:
    """The arena's table, the methods that the cache cannot serve, and what all of it cost."""
    cost = {line["method"]: line["cpu_seconds"] for line in body["lines"]}
    left_out = "; ".join(f"`{name}` ({why.split(': ', 1)[1].split(';')[0]})" for name, why in body["left_out"].items())
    return (
        f"{arena_table(body['lines'])}\n\nLeft out: {left_out or 'none'}.\n\n"
        f"{len(cost)} methods: {sum(cost.values()) / 60:.1f} CPU minutes of training, tuning and evaluation."
    )


def document(data: Path, digits: Path, template: str) -> str:
    """The text of docs/results.md: `template` with its {{places}} filled from what `data` and `digits` hold."""
    found = {p.name: load_analysis(p) for p in sorted((data / "analyses").iterdir()) if p.is_dir()}
    ratio = found["ratio"]
    recipes = labelled(ratio, found["views"])
    online, peers = load_online(data, REPORTED), recorded("peers")
    places = {
        **common_places(found, recipes),
        "stage I": f"{ratio['stage1'].metrics['stage1']['top1']:.2f}",
        "cache": cache_text(data / "runs" / "extract"),
        "ratio table": markdown_table(list(recipes.values())),
        "parts": parts_table(ratio),
        "guesses": guesses_table({n: r for n, r in recipes.items() if n.endswith("1 view")}),
        "controls branchwise 1": variant_table(found["controls"]["branchwise"], 1.0, {}, ""),
        "hosts apart": hosts_table(found["hosts"]),
        "grid text": grid_text(found["grid"], online),
        "grid now": grid_now(peers["grid"], online),
        "peers": peers_text(peers),
        "grid donors": variant_table(found["grid"]["grid"], REPORTED, {}, ""),
        "digits": digits_text(digits),
        "frozen": frozen_results.shown(recorded("frozen")),
        "journey": frozen_results.journey(recorded("journey")),
        **online_tables(online, {label: r.at(online.ratio) for label, r in recipes.items()}),
    }
    for name in ("hosts", "pooling"):
        results = found[name].results
        places |= {f"{name} table": markdown_table(results), f"{name} differences": difference_table(results)}
    places |= {f"ratio {recipe}": ratio_table(ratio[recipe]) for recipe in RECIPES}
    places |= {arena.replace("-", " "): arena_text(recorded(arena)) for arena in ARENAS}
    return filled(template, places)


def filled(template: str, places: Mapping[str, str]) -> str:
    """`template` with each {{place}} replaced. Raises UserError for a place that nothing makes."""
    for place, text in places.items():
        template = template.replace("{{" + place + "}}", text)
    left = re.findall(r"{{(.*?)}}", template)
    if left:
        raise UserError(f"the template asks for {', '.join(left)}, which nothing makes")
    return template


def cache_text(runs: Path) -> str:
    """Rows, bytes and time of each cache, from the records of their extraction."""
    lines = []
    for path in sorted(runs.glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        size = f"{run['value_bytes'] / 1e6:.0f} MB"
        lines.append([f"`{path.stem}`", f"{run['rows']:,}", size, f"{run['seconds']:.0f}", run["commit"]])
    return markdown(["cache", "rows", "values", "seconds, shared with other work", "commit"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("cifar"), help="analyses and online runs on CIFAR-10-LT")
    parser.add_argument("--digits", type=Path, default=Path("data/table/digits"), help="what make table wrote")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--record", type=Path, default=RESULTS / "online.json")
    given = parser.parse_args()
    template = (Path(__file__).parent / "results.md").read_text(encoding="utf-8")
    with errors_in_one_line():
        (given.out / "results.md").write_text(document(given.data, given.digits, template), encoding="utf-8")
    ratio, views = (load_analysis(given.data / "analyses" / name) for name in ("ratio", "views"))
    recipes = labelled(ratio, views)
    save(given.record, record(load_online(given.data, REPORTED), {n: r.at(REPORTED) for n, r in recipes.items()}))
    pictures = {"ratio": [ratio["branchwise"]], "recipes": list(recipes.values())}
    (given.out / "images").mkdir(exist_ok=True)
    for name, results in pictures.items():
        curves = pd.concat([ratio_curve(result) for result in results], ignore_index=True)
        (given.out / "images" / f"{name}.svg").write_text(ratio_picture(curves), encoding="utf-8")


if __name__ == "__main__":
    main()

"""docs/results-200.md: the paper's analyses once more, from a backbone of the paper's 200 epochs.

    for name in hosts ratio donors selection samplers controls; do python -m benchmarks.analyses $name --data DATA; done
    python -m benchmarks.online_h2t --data DATA --params PARAMS --seeds 0 1 2 --device cuda             # ratio 0.3
    python -m benchmarks.online_h2t --data DATA --params PARAMS --seeds 0 1 2 --device cuda --ratio 0
    python -m benchmarks.results_200 --data DATA

Fills the places of `benchmarks/results-200.md`, and writes benchmarks/results/online-200.json.
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.measure import RESULTS, errors_in_one_line, save
from benchmarks.online_results import Online, bounds_table, load_online, record
from benchmarks.results import BESIDE_ONLINE, filled
from benchmarks.tables import (
    RECIPES,
    REPORTED,
    SHORT,
    Analysis,
    cell,
    common_places,
    guesses_table,
    load_analysis,
)
from h2t.pipeline.base.text import markdown
from h2t.pipeline.reporting.files import text_of
from h2t.pipeline.reporting.results import HostResult, rows_apart, with_against_without


def hosts_table(hosts: Analysis) -> str:
    """A line for each host: without H2T, with it, and the difference; hosts that are fitted have no H2T."""
    lines = []
    for result in hosts.results:
        apart = with_against_without(result)
        without, with_h2t = result.at(0.0), result.at(REPORTED)
        cells = [cell(h, f) if len(h) else "–" for f in ("top1", "tail") for h in (without, with_h2t)]
        told = [text_of(apart[f]) if apart else "–" for f in ("top1", "tail")]
        lines.append([result.name, result.statistics, *cells[:2], told[0], *cells[2:], told[1]])
    figures = [f"{f}{word}" for f in ("top1", "tail") for word in ("", " with H2T", ", with minus without")]
    return markdown(["host", "test images under", *figures], lines)


def against_table(after: HostResult, before: HostResult) -> list[list[str]]:
    """Lines of `after` minus `before` without and with H2T, paired by seed and test image."""
    lines = []
    for row, words in (("without_h2t", "without"), ("with_h2t", "with")):
        apart = rows_apart(after, row, before, row)
        lines.append([f"{after.name} - {before.name}", words, *(text_of(apart[f]) if apart else "–" for f in SHORT)])
    return lines


def samplers_table(samplers: Analysis) -> str:
    """What shuffled lists change against draws with replacement."""
    pairs = [("cyclic", "balanced"), ("cyclic_stage1", "balanced_stage1")]
    lines = [line for after, before in pairs for line in against_table(samplers[after], samplers[before])]
    return markdown(["receivers", "H2T", *SHORT], lines)


def published_heads(result: HostResult) -> pd.DataFrame:
    """The heads of DR as published: ratio 0, scored under the statistics of balanced batches, by seed."""
    heads = result.tables["heads"]
    found = heads[(heads.split == "test") & (heads.statistics == "balanced") & (heads.ratio == 0)]
    return found.drop_duplicates("seed").sort_values("seed")


def online_text(hosts: Analysis, with_h2t: Online, without: Online) -> str:
    """DR + H2T and DR as published, online beside those on the cache."""
    ours = {
        "DR + H2T": (with_h2t, hosts["dr"].at(REPORTED)),
        "DR as published": (without, published_heads(hosts["dr"])),
    }
    parts = [f"{label}:\n\n{markdown(BESIDE_ONLINE, bounds_table(*both))}" for label, both in ours.items()]
    return "\n\n".join([*parts, with_h2t.made, without.made])


def document(data: Path, template: str) -> str:
    """`template` with its places filled from the analyses in `data`. Raises UserError."""
    names = ("hosts", "ratio", "donors", "selection", "samplers", "controls")
    found = {name: load_analysis(data / "analyses" / name) for name in names}
    kept = {r.name: r for r in found["ratio"].results}
    recipes = {name: kept[name] for name in RECIPES if name in kept}
    places = {
        **common_places(found, recipes),
        "hosts": hosts_table(found["hosts"]),
        "guesses": guesses_table(recipes),
        "samplers": samplers_table(found["samplers"]),
        "online": "Not run yet.",
    }
    if (data / "online").is_dir():
        places["online"] = online_text(found["hosts"], load_online(data, REPORTED), load_online(data, 0.0))
    return filled(template, places)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("cifar200"))
    parser.add_argument("--out", type=Path, default=Path("docs/results-200.md"))
    parser.add_argument("--record", type=Path, default=RESULTS / "online-200.json")
    given = parser.parse_args()
    template = (Path(__file__).parent / "results-200.md").read_text(encoding="utf-8")
    with errors_in_one_line():
        given.out.write_text(document(given.data, template), encoding="utf-8")
        if (given.data / "online").is_dir():
            dr = load_analysis(given.data / "analyses" / "hosts")["dr"]
            ours = {REPORTED: {"DR + H2T": dr.at(REPORTED)}, 0.0: {"DR as published": published_heads(dr)}}
            save(given.record, [record(load_online(given.data, ratio), heads) for ratio, heads in ours.items()])


if __name__ == "__main__":
    main()

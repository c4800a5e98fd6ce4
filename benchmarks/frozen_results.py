"""What benchmarks.frozen found, as the Markdown of docs/results.md.

python -m benchmarks.frozen_results benchmarks/results/frozen.json
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import table
from h2t.pipeline.evaluation.metrics import over_seeds

FIGURES = ("top1", "head", "medium", "tail")
#: The hosts of the journey from images to classifiers, which the plain script is compared with.
JOURNEY = ("dr", "crt", "lws", "mislas", "balanced_softmax", "lift")


def lines_of(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each method, and one with H2T for each that takes it: at the setting best on the validation images.

    `edge`: whether the constant is the smallest or largest of several; a better one may then lie beyond.
    """
    lines = []
    for method in dict.fromkeys(t["method"] for t in body["tried"]):
        mine = [t for t in body["tried"] if t["method"] == method]
        values = {t["value"] for t in mine if t["value"] is not None and not isinstance(t["value"], str)}
        for with_h2t in (False, True):
            some = [t for t in mine if (t["ratio"] > 0) == with_h2t]
            if not some:
                continue
            best = max(some, key=lambda t: np.mean(t["val"]))
            seeds = [
                dict(zip(best["test"], figures, strict=True)) for figures in zip(*best["test"].values(), strict=True)
            ]
            lines.append(
                {
                    "host": method,
                    "with_h2t": with_h2t,
                    "value": best["value"],
                    "tried": sorted(values),
                    "edge": len(values) > 1 and best["value"] in (min(values), max(values)),
                    "ratio": best["ratio"],
                    "validation_top1": float(np.mean(best["val"])),
                    **over_seeds(seeds),
                    "seeds": len(seeds),
                }
            )
    return lines


def shown(body: Mapping[str, Any]) -> str:
    """The results as Markdown: accuracy, failures, time and bytes, and the journey beside the plain script."""
    rows = []
    for line in body["table"]:
        figures = [_figure(line.get(k), line.get(f"{k}_std")) for k in FIGURES]
        apart = [_difference(line.get("differences", {}).get(k)) for k in ("top1", "tail")]
        value = "" if line["value"] is None else f"{line['value']}{' (edge)' if line['edge'] else ''}"
        name = line["host"] + (" + H2T" if line["with_h2t"] else "")
        rows.append([name, value, f"{line['ratio']:g}" if line["ratio"] else "", *figures, *apart])
    header = ["method", "constant", "ratio", *FIGURES, "top1, with H2T - without", "tail, with H2T - without"]
    text = [table(header, rows)]
    if body["failed"]:
        text.append("Not trained: " + "; ".join(f"{step} ({why})" for step, why in body["failed"].items()) + ".")
    costs = body["costs"]
    text.append(
        f"{_images(body)} Extraction took {costs['extract']['seconds']:.0f} s "
        f"({body['cache']['images_per_second']:.0f} images/s), all steps together "
        f"{sum(c['seconds'] for c in costs.values()):.0f} s."
    )
    if "plain" in body:
        text.append(_journey_table(body))
    return "\n\n".join(text)


def journey(body: Mapping[str, Any]) -> str:
    """The journey from images to classifiers beside the plain script, as Markdown."""
    return f"{_images(body)}\n\n{_journey_table(body)}"


def _images(body: Mapping[str, Any]) -> str:
    """The network, the images and the bytes of their maps, in two sentences."""
    cache, count = body["cache"], body["samples"]
    return (
        f"{body['model']} at {body['pixels']} pixels, {body['device']}; {count['train']:,} training, {count['val']:,} "
        f"validation and {count['test']:,} test images of classes with {body['counts'][0]:,} to {body['counts'][-1]:,} "
        f"training images, {cache['views']} view each. Maps {'x'.join(map(str, cache['map']))}: "
        f"{cache['maps_bytes'] / 1e9:.2f} GB; pooled, {cache['pooled_bytes'] / 1e6:.0f} MB."
    )


def _journey_table(body: Mapping[str, Any]) -> str:
    ours, plain = body["journey"], body["plain"]
    fits = plain["fits"]
    before = sum(cost["cpu"] for name, cost in ours["steps"].items() if name.partition(" ")[0] not in JOURNEY)
    done = "" if fits["done"] == fits["wanted"] else f", from {fits['done']} that were fitted"
    return table(
        ["from images to classifiers", "classifiers", "CPU s", "of these before the first classifier"],
        [
            ["h2t", str(ours["heads"]), f"{ours['cpu']:.0f}", f"{before:.0f}"],
            [
                "the network by hand, scikit-learn",
                f"{fits['wanted']}{done}",
                f"{plain['cpu']:.0f}",
                f"{plain['network']['cpu']:.0f}",
            ],
        ],
    )


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return f"{found['mean']:+.2f}{interval} {found['verdict'] or 'no verdict'}"


def _figure(mean: float | None, std: float | None) -> str:
    return "" if mean is None else f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")


if __name__ == "__main__":
    print(shown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))

"""From DR as published to DR + H2T: how much is batch-norm statistics, how much is fusion.

    python -m benchmarks.gain --data DATA          # after python -m benchmarks.analyses hosts --data DATA

DR as published is trained on balanced batches alone and scored under their statistics. H2T passes instance batches as
well, so the running statistics that it is scored under are a mixture. The classifiers without and with H2T are scored
under both here, which separates the two. Differences are paired by seed and test image; intervals cover both.

Writes benchmarks/results/gain.json: `lines`, one for each of the four settings with its mean figures in percent, and
`differences` in points; and docs/images/gain.svg.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS, save
from benchmarks.pictures import gain_picture
from benchmarks.tables import REPORTED, SHORT
from h2t.cache.reader import open_cache
from h2t.pipeline.base.text import markdown
from h2t.pipeline.data.classes import groups
from h2t.pipeline.evaluation.intervals import Difference, differences
from h2t.pipeline.evaluation.metrics import Graded, summaries
from h2t.pipeline.evaluation.scoring import load_heads_for, score_heads

STATISTICS = ("balanced", "mixture")
#: Difference -> (ratio, statistics) after and before.
STEPS = {
    "statistics": ((0.0, "mixture"), (0.0, "balanced")),
    "fusion": ((REPORTED, "mixture"), (0.0, "mixture")),
    "both": ((REPORTED, "mixture"), (0.0, "balanced")),
    "fusion, scored under balanced statistics": ((REPORTED, "balanced"), (0.0, "balanced")),
}
LABELS = {
    (0.0, "balanced"): "DR as published",
    (0.0, "mixture"): "the same classifiers under the mixture",
    (REPORTED, "balanced"): "DR + H2T under balanced statistics",
    (REPORTED, "mixture"): "DR + H2T",
}


def measured(cache_dir: Path, heads_dir: Path, backbone_dir: Path) -> dict[str, Any]:
    """Figures and differences of the heads in `heads_dir`: host dr, recipe branchwise, ratios 0 and 0.3."""
    with open_cache(cache_dir) as cache:
        heads = load_heads_for(cache, heads_dir, backbone_dir)
        scores = {s: score_heads(cache, heads, "test", s, torch.device("cpu")) for s in STATISTICS}
    labels, group_of = scores["mixture"].labels, groups(heads.about["counts"])["paper_index"]
    said: dict[tuple[float, str], list[Graded]] = {}
    for head in sorted(heads.table.to_pylist(), key=lambda h: h["seed"]):
        for name in STATISTICS:
            said.setdefault((head["ratio"], name), []).append(scores[name].said[head["number"]])
    lines = []
    for (ratio, name), label in LABELS.items():
        figures = summaries(said[ratio, name], labels, group_of)
        means = {f: float(np.mean([s[f] for s in figures])) for f in SHORT}
        lines.append({"label": label, "ratio": ratio, "statistics": name, "seeds": len(figures), **means})
    apart = {k: differences(said[after], said[before], labels, group_of) for k, (after, before) in STEPS.items()}
    found = {k: {f: d.as_dict() for f in SHORT if (d := figures[f])} for k, figures in apart.items()}
    return {"lines": lines, "differences": found}


def apart_of(record: Mapping[str, Any]) -> dict[str, dict[str, Difference]]:
    """Step -> figure -> difference, from the JSON record."""
    return {
        step: {f: Difference.of(values) for f, values in figures.items()}
        for step, figures in record["differences"].items()
    }


def shown(record: Mapping[str, Any]) -> str:
    """The record as two Markdown tables."""
    lines = [
        [line["label"], f"{line['ratio']:g}", line["statistics"], *(f"{line[f]:.2f}" for f in SHORT)]
        for line in record["lines"]
    ]
    apart = [[step, *(figures[f].text for f in SHORT)] for step, figures in apart_of(record).items()]
    return "\n\n".join(
        [markdown(["classifiers", "ratio", "scored under", *SHORT], lines), markdown(["difference", *SHORT], apart)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=RESULTS / "gain.json")
    parser.add_argument("--picture", type=Path, default=Path("docs/images/gain.svg"))
    given = parser.parse_args()
    heads = given.data / "analyses" / "hosts" / "train_classifier" / "dr"
    record = measured(given.data / "extract" / "ce_mixup", heads, given.data / "train_backbone" / "ce_mixup")
    save(given.out, record)
    given.picture.write_text(gain_picture(apart_of(record)), encoding="utf-8")
    print(shown(record))


if __name__ == "__main__":
    main()

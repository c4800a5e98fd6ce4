"""Measures `report` on results of the size of ImageNet-LT, fabricated from those of a small host.

    python large_report.py SMALL FOLDER

SMALL: an evaluated host. Prints the peak memory in MB and whether torch was imported.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from h2t.pipeline.base.run import Run
from h2t.pipeline.stages import report

CLASSES, IMAGES, SEEDS = 1000, 50_000, 5
RATIOS = [i / 10 for i in range(11)]
GROUPS = ["head"] * 390 + ["medium"] * 445 + ["tail"] * 165


def enlarge(small: Path, into: Path) -> None:
    """Writes what evaluate would write for 55 heads, 1,000 classes and 50,000 test images, with random figures."""
    draw = np.random.default_rng(0)
    into.mkdir(parents=True)
    tables = {p.stem: pd.read_parquet(p) for p in small.glob("*.parquet")}
    metrics, about = (json.loads((small / f"{n}.json").read_text()) for n in ("metrics", "about"))
    counts = np.maximum(5, 1280 * np.exp(-np.arange(CLASSES) / 180)).astype(int).tolist()
    about |= {"counts": counts, "groups": GROUPS, "classes": [f"class {i}" for i in range(CLASSES)]}
    statistics = about["host"]["evaluate"]
    lines = [
        {"number": number, "ratio": ratio, "seed": seed, "split": split, "statistics": s}
        for number, (ratio, seed) in enumerate((r, s) for r in RATIOS for s in range(SEEDS))
        for split in ("val", "test")
        for s in (statistics, "balanced")
    ]
    own = pd.DataFrame([*lines, {**lines[0], "number": -1, "split": "test", "statistics": "stage1"}])
    filler = tables["heads"].iloc[[0]].drop(columns=own.columns)
    tables["heads"] = own.merge(filler.assign(donor="instance", selection="random"), how="cross")
    for row in ("without_h2t", "with_h2t"):
        metrics[row] |= {"heads": SEEDS}
    kept = [-1, *range(SEEDS), *range(3 * SEEDS, 4 * SEEDS)]
    labels = np.repeat(np.arange(CLASSES), IMAGES // CLASSES)
    tables["predictions"] = pd.concat(
        pd.DataFrame(
            {
                "number": number,
                "sample": np.arange(IMAGES),
                "label": labels.astype(np.int32),
                "predicted": np.where(draw.random(IMAGES) < 0.5, labels, draw.integers(0, CLASSES, IMAGES)).astype(
                    np.int32
                ),
                "confidence": draw.random(IMAGES, np.float32),
            }
        )
        for number in kept
    )
    pairs = tables["predictions"].groupby(["number", "label", "predicted"]).size().reset_index(name="count")
    tables["confusion"] = pairs.rename(columns={"label": "true"})
    each = own[["number", "split", "statistics"]].merge(
        pd.DataFrame({"class": range(CLASSES), "count": counts}), how="cross"
    )
    lacking = tables["per_class"].iloc[[0]].drop(columns=each.columns)
    tables["per_class"] = each.merge(lacking, how="cross").assign(accuracy=draw.uniform(0, 100, len(each)))
    bins = tables["reliability"][tables["reliability"].number == -1]
    tables["reliability"] = pd.concat(bins.assign(number=n) for n in kept)
    norms = pd.DataFrame({"number": kept}).merge(pd.DataFrame({"class": range(CLASSES), "norm": 1.0}), how="cross")
    tables["weight_norms"] = norms
    for name, table in tables.items():
        table.to_parquet(into / f"{name}.parquet")
    for name, body in (("metrics", metrics), ("about", about)):
        (into / f"{name}.json").write_text(json.dumps(body))


def main() -> None:
    small, folder = map(Path, sys.argv[1:])
    enlarge(small, folder / "evaluate" / "large")
    report.run(report.Params(), Run("report", folder / "report"), ["large"], folder / "evaluate")
    status = Path("/proc/self/status").read_text(encoding="ascii")  # getrusage also counts the process that started it
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    sys.stdout.write(f"{peak} {'torch' in sys.modules}")


if __name__ == "__main__":
    main()

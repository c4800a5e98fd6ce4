"""What of the gain is statistics and what fusion: the figures of evaluate, the record, the page and its picture."""

import json
import re

import pandas as pd
import pytest
from pipeline_builders import ROOT
from report_builders import make_evaluated

from benchmarks import gain
from benchmarks.pictures import gain_picture

RECORD = ROOT / "benchmarks" / "results" / "gain.json"


def test_figures_and_fusion_are_those_of_evaluate_and_steps_add_up(tmp_path):
    evaluated = make_evaluated(tmp_path)
    paths = (tmp_path / part for part in ("extract/b0", "train_classifier/dr", "train_backbone/b0"))
    found = gain.measured(*paths)
    heads = pd.read_parquet(evaluated / "dr" / "heads.parquet")
    for line in found["lines"]:
        same = (heads.split == "test") & (heads.ratio == line["ratio"]) & (heads.statistics == line["statistics"])
        assert line["seeds"] == same.sum() == 3
        for figure in ("top1", "head", "medium", "tail"):
            assert line[figure] == pytest.approx(heads[same][figure].mean())
    stated = json.loads((evaluated / "dr" / "metrics.json").read_text())["difference"]
    steps = found["differences"]
    for figure in ("top1", "head", "medium", "tail"):
        for end in ("mean", "low", "high"):
            assert steps["fusion"][figure][end] == pytest.approx(stated[figure][end])
        assert steps["both"][figure]["mean"] == pytest.approx(
            steps["statistics"][figure]["mean"] + steps["fusion"][figure]["mean"]
        )


def marks(picture: str) -> list[float]:
    """Horizontal places of everything that is drawn more than once, markers among them; to a tenth, for other fonts."""
    return [round(float(x), 1) for x in re.findall(r'<use [^>]*x="([\d.]+)"', picture)]


def test_page_and_picture_come_from_the_committed_record():
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    for part in gain.shown(record).split("\n\n"):
        assert part in (ROOT / "docs" / "table6.md").read_text(encoding="utf-8")
    apart = gain.apart_of(record)
    picture = (ROOT / "docs" / "images" / "gain.svg").read_text(encoding="utf-8")
    assert marks(gain_picture(apart)) == marks(picture)
    apart["fusion"]["tail"] = apart["statistics"]["tail"]
    assert marks(gain_picture(apart)) != marks(picture)

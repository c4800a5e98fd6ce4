"""The templates behind `dvc plots show` and `dvc plots diff` draw columns that the report writes."""

import json

import pandas as pd
import pytest
import yaml
from pipeline_builders import ROOT
from report_builders import make_evaluated

from h2t.pipeline.base.run import Run
from h2t.pipeline.stages import report


def fields(value):
    """Every `field` in a Vega-Lite specification."""
    if isinstance(value, dict):
        own = {value["field"]} if isinstance(value.get("field"), str) else set()
        return own.union(*(fields(v) for v in value.values()))
    return set().union(*(fields(v) for v in value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    report.run(report.Params(), Run("report", folder / "report"), ["dr"], make_evaluated(folder))
    return folder / "report"


PLOTS = [p for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for p in entry.items()]


@pytest.mark.parametrize(("title", "plot"), PLOTS, ids=[t for t, _ in PLOTS])
def test_plot(written, title, plot):
    ((path, y),) = plot["y"].items()
    columns = set(pd.read_csv(written / path.removeprefix("data/report/")).columns)
    assert {plot["x"], y} <= columns
    template = json.loads((ROOT / ".dvc" / "plots" / f"{plot['template']}.json").read_text())
    named = {f for f in fields(template) if not f.startswith("<DVC_METRIC")}
    assert named - {"rev"} <= columns
    assert "rev" in named  # so that revisions can be told apart


def test_metrics_are_those_of_evaluate(written):
    kept = json.loads((written / "metrics.json").read_text())
    assert kept == {"dr": json.loads((written.parent / "evaluate" / "dr" / "metrics.json").read_text())}

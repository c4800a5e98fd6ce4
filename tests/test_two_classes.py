"""Two classes: the area under the ROC curve, its interval, and where people see it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_builders import make_evaluated
from scipy.stats import norm, t
from sklearn.metrics import average_precision_score, roc_auc_score

from h2t import api
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation.intervals import Pairs, differences, over_replicates
from h2t.pipeline.evaluation.metrics import Answers, answers, placements, two_class_figures
from h2t.pipeline.reporting.results import FIGURES, figures_of, load_result, rows_apart
from h2t.pipeline.stages import report

GROUPS = ["head", "tail"]


def scored(score):
    """Answers of a classifier of two classes with these scores."""
    score = np.asarray(score, np.float32)
    return Answers((score > 0).astype(np.int32), 1 / (1 + np.exp(-np.abs(score.astype(float)))), score=score)


def drawn(rng, rare, frequent, apart, seeds, shared=None):
    """Scores of one classifier by seed; class 1 lies `apart` higher, all with standard deviation 1."""
    labels = np.repeat([1, 0], [rare, frequent])
    shared = rng.normal(size=len(labels)) if shared is None else shared
    each = [0.8 * shared + 0.6 * rng.normal(size=len(labels)) for _ in range(seeds)]
    return labels, [scored(apart * labels + noise) for noise in each], shared


@pytest.mark.parametrize("decimals", [6, 0])  # without ties and with many
def test_area_and_average_precision_are_those_of_scikit_learn(decimals):
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.1).astype(int)
    logits = np.round(rng.normal(size=(300, 2)) + np.stack([np.zeros(300), labels], 1), decimals).astype(np.float32)
    said = answers(logits, labels)
    found = two_class_figures(said, labels)
    score = logits[:, 1] - logits[:, 0]
    assert found["auroc"] == pytest.approx(100 * roc_auc_score(labels, score))
    assert found["average_precision"] == pytest.approx(100 * average_precision_score(labels, score))
    share = placements(said.score, labels)
    assert share[labels == 1].mean() == pytest.approx(share[labels == 0].mean())


def test_one_class_alone_has_no_area_and_three_have_none_at_all():
    alone = np.zeros(4, int)
    said = answers(np.eye(4, 2, dtype=np.float32), alone)
    assert two_class_figures(said, alone) == {"auroc": None, "average_precision": None}
    assert differences([said], [said], alone, GROUPS)["auroc"] is None
    three = answers(np.eye(4, 3, dtype=np.float32), alone)
    assert two_class_figures(three, alone) == {}
    assert "auroc" not in differences([three], [three], alone, [*GROUPS, None])


def test_the_interval_of_one_seed_is_delongs():
    rng = np.random.default_rng(1)
    labels, (after,), shared = drawn(rng, 12, 50, 1.5, 1)
    _, (before,), _ = drawn(rng, 12, 50, 1.0, 1, shared)
    found = differences([after], [before], labels, GROUPS)["auroc"]

    # The kernel of DeLong et al., pair by pair.
    def kernel(one):
        x, y = one.score[labels == 1].astype(float), one.score[labels == 0].astype(float)
        return (x[:, None] > y) + 0.5 * (x[:, None] == y)

    apart = 100 * (kernel(after) - kernel(before))
    variance = apart.mean(1).var(ddof=1) / 12 + apart.mean(0).var(ddof=1) / 50
    reach = t.ppf(0.975, 11) * variance**0.5
    assert (found.mean, found.low, found.high) == pytest.approx(
        (apart.mean(), apart.mean() - reach, apart.mean() + reach)
    )
    assert (found.covers, found.verdict) == (("images",), None)


def test_the_interval_holds_as_often_as_it_says():
    rng = np.random.default_rng(2)
    truth = 100 * (norm.cdf(2.0 / 2**0.5) - norm.cdf(1.6 / 2**0.5))
    held = 0
    for _ in range(200):
        labels, after, shared = drawn(rng, 20, 150, 2.0, 3)
        _, before, _ = drawn(rng, 20, 150, 1.6, 3, shared)
        found = differences(after, before, labels, GROUPS)["auroc"]
        held += found.low <= truth <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_images_of_one_patient_count_as_one():
    rng = np.random.default_rng(3)
    labels, after, shared = drawn(rng, 4, 60, 1.5, 1)
    _, before, _ = drawn(rng, 4, 60, 1.2, 1, shared)
    single = differences(after, before, labels, GROUPS)["auroc"]
    eight = [[scored(one.score.repeat(8)) for one in side] for side in (after, before)]
    patients = np.arange(len(labels)).repeat(8)
    grouped = differences(*eight, labels.repeat(8), GROUPS, groups=patients)["auroc"]
    alone = differences(*eight, labels.repeat(8), GROUPS)["auroc"]
    assert grouped.mean == pytest.approx(single.mean)
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.02)
    assert alone.high - alone.low < 0.75 * (grouped.high - grouped.low)


@pytest.mark.parametrize(("rare", "frequent", "together"), [(150, 1, None), (1, 150, None), (150, 40, 0), (3, 150, 1)])
def test_few_images_or_patients_of_a_class_seldom_give_a_direction(rare, frequent, together):
    """Equal methods; of the class `together` all images are of one patient, or 20 of each of a few."""
    rng = np.random.default_rng(6)
    directions = 0
    for _ in range(60):
        labels, after, shared = drawn(rng, rare, frequent, 1.5, 3)
        _, before, _ = drawn(rng, rare, frequent, 1.5, 3, shared)
        groups = np.where(labels == 0, -1, np.arange(len(labels))) if together == 0 else None
        if together == 1:
            times = np.where(labels == 1, 20, 1)
            after, before = ([scored(one.score.repeat(times)) for one in side] for side in (after, before))
            labels, groups = labels.repeat(times), np.arange(len(labels)).repeat(times)
        groups = None if groups is None else np.unique(groups, return_inverse=True)[1]
        found = differences(after, before, labels, GROUPS, groups=groups)["auroc"]
        directions += found.verdict in ("higher", "lower")
    assert directions <= 3


def test_replicates_count_as_backbones_and_the_rarest_limits_the_freedom():
    rng = np.random.default_rng(7)
    pairs = []
    for rare in (6, 12, 12):
        labels, after, shared = drawn(rng, rare, 60, 1.5, 3)
        _, before, _ = drawn(rng, rare, 60, 1.2, 3, shared)
        pairs.append(Pairs(after, before, labels, np.arange(len(labels))))
    found = over_replicates(pairs, GROUPS)["auroc"]
    areas = [[100 * roc_auc_score(p.labels, one.score) for one in side] for p in pairs for side in (p.after, p.before)]
    assert found.mean == pytest.approx(np.mean(areas[::2]) - np.mean(areas[1::2]))
    assert found.covers == ("seeds", "images", "backbones")
    lacking = Pairs(*([scored(one.score[:6]) for one in side] for side in (after, before)), labels[:6], np.arange(6))
    assert over_replicates([*pairs, lacking], GROUPS)["auroc"] is None


def test_equal_rankings_are_identical_though_confidence_differs():
    rng = np.random.default_rng(4)
    labels, after, _ = drawn(rng, 15, 60, 1.5, 3)
    found = differences(after, [scored(3 * one.score) for one in after], labels, GROUPS)
    assert found["auroc"].verdict == "identical"
    assert found["ece"].verdict != "identical"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_evaluated(folder, classes=["sound", "ill"])
    return make_evaluated(folder, "crt", classes=["sound", "ill"])


def test_evaluate_writes_figures_differences_and_scores(evaluated):
    metrics = json.loads((evaluated / "dr" / "metrics.json").read_text())
    heads = pq.read_table(evaluated / "dr" / "heads.parquet").to_pandas()
    predictions = pq.read_table(evaluated / "dr" / "predictions.parquet").to_pandas()
    for number, part in predictions.groupby("number"):
        assert (part.predicted == (part.score > 0)).all()
        own = heads[(heads.number == number) & (heads.split == "test")].iloc[0]
        assert own.auroc == pytest.approx(100 * roc_auc_score(part.label, part.score))
        assert own.average_precision == pytest.approx(100 * average_precision_score(part.label, part.score))
    for row in ("stage1", "without_h2t", "with_h2t"):
        assert 0 <= metrics[row]["auroc"] <= 100
    change = metrics["difference"]["auroc"]
    assert change["mean"] == pytest.approx(metrics["with_h2t"]["auroc"] - metrics["without_h2t"]["auroc"])
    assert change["covers"] == ["seeds", "images"]
    written = pq.read_table(evaluated / "dr" / "differences.parquet").to_pandas()
    assert {"without_h2t", "stage1"} <= set(written[written.figure == "auroc"].against)


def test_the_report_shows_it(evaluated, tmp_path):
    report.run(report.Params(), Run("report", tmp_path / "r"), ["dr", "crt"], evaluated)
    dr, crt = (load_result(name, evaluated / name) for name in ("dr", "crt"))
    mean, deviation = dr.metrics["with_h2t"]["auroc"], dr.metrics["with_h2t"]["auroc_std"]
    text = (tmp_path / "r" / "results.md").read_text(encoding="utf-8")
    assert "| host | classifier | ratio | top1 | head | medium | tail | ece | auroc |" in text
    assert f"| {mean:.2f} ± {deviation:.2f} |" in text
    assert f"{dr.metrics['difference']['auroc']['mean']:+.2f}" in text
    page = (tmp_path / "r" / "index.html").read_text(encoding="utf-8")
    assert '<th scope="col">area under the ROC curve</th>' in page
    assert rows_apart(crt, "with_h2t", dr, "with_h2t")["auroc"].mean == pytest.approx(
        crt.metrics["with_h2t"]["auroc"] - mean
    )
    del crt.metrics["with_h2t"]["auroc"]  # as of an evaluation before there was the figure
    assert figures_of([dr]) == (*FIGURES, "auroc")
    assert figures_of([dr, crt]) == FIGURES
    assert "auroc_change" in (tmp_path / "r" / "results.csv").read_text(encoding="utf-8").splitlines()[0]


def test_compare_has_a_column_for_it():
    rng = np.random.default_rng(5)
    y = np.repeat(["sound", "ill"], [80, 16])
    x = rng.normal(size=(96, 8)).astype(np.float32) + (y == "ill")[:, None]
    table = api.compare(x, y, methods=["dr"], ratios=[0.0], seeds=[0]).table
    assert table["auroc"].between(50, 100).all()
    assert "auroc" not in api.compare(x, [*y[:60], *["odd"] * 20, *y[80:]], methods=["ncm"], seeds=[0]).table

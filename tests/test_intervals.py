"""Intervals and verdicts: by hand, against SciPy, and by simulation from a model whose true differences are known."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_builders import ROOT
from scipy.stats import norm, t, ttest_rel

from benchmarks import intervals as simulation
from h2t.pipeline.data.classes import GROUPS
from h2t.pipeline.evaluation.intervals import FIGURES, Difference, differences, paired
from h2t.pipeline.evaluation.metrics import Answers

GROUP_OF = ["head", "medium", "tail", "tail"]


def said(guesses, confidence=0.5):
    guesses = np.asarray(guesses)
    return Answers(guesses.astype(np.int32), np.broadcast_to(np.asarray(confidence, float), guesses.shape).copy())


def noisy(labels, share, seed, classes=4):
    """Predictions that are right for a `share` of the images."""
    rng = np.random.default_rng(seed)
    return said(np.where(rng.random(len(labels)) < share, labels, (labels + 1) % classes), rng.random(len(labels)))


LABELS = np.repeat(np.arange(4), 100)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8))
def test_without_predictions_the_interval_is_that_of_the_paired_t_test(pairs):
    after, before = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    each = np.array(list(after.values())) - np.array(list(before.values()))
    found = paired(after, before)
    assert (found.seeds, found.covers) == (len(pairs), ("seeds",))
    assert found.mean == pytest.approx(each.mean(), abs=1e-9)
    if each.std(ddof=1) > 1e-6:
        interval = ttest_rel(list(after.values()), list(before.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 0.9}, "higher"),
        ({0: -1.0, 1: -1.1, 2: -0.9}, "lower"),
        ({0: 1.0, 1: -1.1, 2: 0.2}, "too close to tell"),
        ({0: 0.0, 1: 0.0}, "too close to tell"),
        ({0: 1.25, 1: 1.25, 2: 1.25}, "too close to tell"),  # no width, so nothing is known of the seeds
        ({0: 5.0}, None),
    ],
)
def test_the_verdict_over_seeds(after, verdict):
    assert paired(after, dict.fromkeys(range(3), 0.0)).verdict == verdict


def test_pairs_are_seeds_that_both_have():
    assert paired({0: 3.0, 1: 5.0, 7: 100.0}, {1: 4.0, 0: 2.0, 9: 0.0}).mean == 1.0
    assert paired({0: 3.0}, {1: 3.0}) is None


def test_pairing_finds_what_the_spread_of_seeds_hides():
    seeds = np.random.default_rng(0).normal(70, 10, 5)
    after, before = dict(enumerate(seeds + 0.5)), dict(enumerate(seeds))
    after[0] += 0.01
    assert paired(after, before).verdict == "higher"


def test_one_classifier_on_each_side_by_hand():
    """Without seeds, top-1's interval is that of the mean of paired differences, images drawn within classes."""
    after, before = noisy(LABELS, 0.7, 1), noisy(LABELS, 0.5, 2)
    each = 100 * ((after.guesses == LABELS).astype(float) - (before.guesses == LABELS))
    found = differences([after], [before], LABELS, GROUP_OF, seeded=False)
    error = np.sqrt(sum(each[c == LABELS].var(ddof=1) for c in range(4)) / 400 / 4)
    reach = t.ppf(0.975, 396) * error
    assert found["top1"].covers == ("images",)
    assert found["top1"].verdict == "higher"
    assert [found["top1"].low, found["top1"].high] == pytest.approx([each.mean() - reach, each.mean() + reach])
    tail = each[LABELS >= 2]
    error = np.sqrt(sum(each[c == LABELS].var(ddof=1) for c in (2, 3)) / 200 / 2)
    assert found["tail"].high == pytest.approx(tail.mean() + t.ppf(0.975, 198) * error)


def test_seeds_that_disagree_widen_the_interval_and_equal_seeds_add_nothing():
    before = said(LABELS)
    worse = [noisy(LABELS, share, 0) for share in (0.9, 0.9, 0.9)]
    equal = differences(worse, [before] * 3, LABELS, GROUP_OF)["top1"]
    single = differences(worse[:1], [before], LABELS, GROUP_OF, seeded=False)["top1"]
    assert [equal.low, equal.high] == pytest.approx([single.low, single.high], rel=1e-6)
    assert (equal.verdict, equal.covers, equal.seeds) == ("lower", ("seeds", "images"), 3)
    spread = differences([noisy(LABELS, s, 0) for s in (0.99, 0.9, 0.81)], [before] * 3, LABELS, GROUP_OF)["top1"]
    assert spread.high - spread.low > 3 * (equal.high - equal.low)
    assert spread.verdict == "too close to tell"


def test_a_group_is_the_mean_over_its_classes_whatever_their_numbers_of_images():
    labels = np.repeat(np.arange(4), [40, 40, 300, 20])
    after, before = said(np.where(labels == 3, 3, 0)), said(np.zeros(400, int))
    found = differences([after] * 3, [before] * 3, labels, GROUP_OF)
    assert found["tail"].mean == 50
    assert found["top1"].mean == pytest.approx(100 * 20 / 400)


def test_equal_predictions_are_identical_and_equal_accuracy_is_not():
    one = [said(LABELS, 0.9)] * 3
    found = differences(one, one, LABELS, GROUP_OF)
    assert {d.verdict for d in found.values()} == {"identical"}
    assert all(d.mean == 0 and d.low < 0 < d.high for d in found.values())
    # Other wrong classes: the same accuracy everywhere, but not the same classifier.
    wrong, other = [said((LABELS + 1) % 4)] * 3, [said((LABELS + 2) % 4)] * 3
    assert differences(wrong, other, LABELS, GROUP_OF)["top1"].verdict == "too close to tell"
    # The same classes with other confidences: identical but for the calibration error.
    found = differences(one, [said(LABELS, 0.8)] * 3, LABELS, GROUP_OF)
    assert (found["top1"].verdict, found["ece"].verdict) == ("identical", "lower")


@pytest.mark.parametrize("changed", [1, 4, 5])
def test_a_verdict_needs_five_changed_images(changed):
    after = np.zeros(len(LABELS), int)
    after[100 : 100 + changed] = 1  # class 1 gains `changed` images, nothing is lost
    found = differences([said(after)] * 3, [said(np.zeros(len(LABELS), int))] * 3, LABELS, GROUP_OF)
    assert found["top1"].mean == pytest.approx(changed / 4)
    assert found["top1"].verdict == ("higher" if changed == 5 else "too close to tell")
    assert (found["top1"].low > 0) == (changed == 5)


def test_where_there_is_no_verdict():
    after, before = ([noisy(LABELS, share, seed) for seed in range(3)] for share in (0.8, 0.3))
    assert differences(after, before, LABELS, GROUP_OF)["top1"].verdict == "higher"
    for seeds in (1, 2):
        found = differences(after[:seeds], before[:seeds], LABELS, GROUP_OF)["top1"]
        assert (found.verdict, found.covers) == (None, ("seeds", "images") if seeds == 2 else ("images",))
        assert found.low > 0
    assert differences(after, before, LABELS, GROUP_OF, verdicts=False)["top1"].verdict is None
    few = slice(None, None, 2)
    fewer = [[Answers(a.guesses[few], a.confidence[few]) for a in side] for side in (after, before)]
    found = differences(*fewer, LABELS[few], GROUP_OF)
    assert (found["top1"].verdict, found["ece"].verdict) == ("higher", None)


def test_groups_and_classes_without_test_images():
    labels = np.repeat([0, 2], [50, 50])
    after, before = ([noisy(labels, share, seed) for seed in range(3)] for share in (0.8, 0.3))
    found = differences(after, before, labels, GROUP_OF)
    assert set(found) == set(FIGURES)
    assert found["medium"] is None
    assert found["tail"].verdict == "higher"


def test_one_test_image_a_class():
    labels = np.arange(200)
    group_of = [GROUPS[c % 3] for c in range(200)]
    after, before = ([noisy(labels, share, seed, 200) for seed in range(3)] for share in (0.9, 0.2))
    found = differences(after, before, labels, group_of)["top1"]
    assert found.verdict == "higher"
    one = differences([said([0])] * 3, [said([1])] * 3, np.array([0]), group_of)["top1"]
    assert (one.mean, one.high, one.verdict) == (100, 100, "too close to tell")


def test_bounds_stay_within_100_points():
    labels = np.repeat(np.arange(4), 3)
    found = differences([said(labels)] * 3, [said((labels + 1) % 4)] * 3, labels, GROUP_OF)
    assert all(-100 <= d.low <= d.mean <= d.high <= 100 for d in found.values() if d)


def test_a_difference_as_text_and_json():
    found = Difference(1.0, -0.5, 2.5, "too close to tell", ("seeds", "images"), 3)
    assert found.text == "+1.00 [-0.50, +2.50] too close to tell"
    assert found.as_dict()["covers"] == ["seeds", "images"]
    assert Difference(1.0, None, None, None, (), 1).text == "+1.00 no verdict"


def test_the_model_of_the_simulation_has_the_differences_that_it_says():
    case = simulation.Case("", seeds=400, images=200, accuracy=0.8, seed_noise=0.3, effect=0.4)
    right, _, true = simulation.draw(case, 20, np.random.default_rng(0))
    assert true == pytest.approx(norm.cdf(norm.ppf(0.8) + 0.4 / case.spread) - 0.8)
    assert right[:, 0].mean() == pytest.approx(0.8, abs=0.01)
    assert right[:, 1].mean() - right[:, 0].mean() == pytest.approx(true, abs=0.01)


@pytest.mark.parametrize("case", simulation.SMALL, ids=lambda case: case.name)
def test_the_intervals_hold_as_often_as_they_say(case):
    """A small version of `python -m benchmarks.intervals`: 400 data sets a case, so ± 3 points are chance."""
    found = simulation.coverage(case, 400, np.random.default_rng(0))
    for figure in ("top1", "tail"):
        if found[figure].judged > 200:
            assert 92 <= found[figure].where_judged <= 99, figure
        assert found[figure].everywhere >= 91, figure


@pytest.mark.parametrize(
    ("name", "kinds"), [("intervals", simulation.CASES), ("intervals_replicates", simulation.REPLICATED_CASES)]
)
def test_the_table_of_coverage_comes_from_the_committed_record(name, kinds):
    record = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    assert record["sets"] >= 1000
    assert [case["name"] for case in record["cases"]] == [case.name for case in kinds]
    found = {
        case["name"]: {figure: simulation.Found(**values) for figure, values in case["found"].items()}
        for case in record["cases"]
    }
    assert simulation.table(kinds, found, record["sets"]) in (ROOT / "docs/intervals.md").read_text(encoding="utf-8")

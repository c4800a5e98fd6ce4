"""How much of the best figure is luck: in draws whose truth is known, with units, and as the answer says it."""

from dataclasses import replace

import numpy as np
import pytest
from report_builders import make_evaluated

from h2t.pipeline.evaluation.luck import PARTS, luck_of_the_best
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.luck import Candidates
from h2t.pipeline.reporting.results import load_result


def told(right, units=None, labels=None):
    """The luck among classifiers that are `right` (classifiers, n), each image weighing the same."""
    n = right.shape[1]
    labels = np.arange(n) % 4 if labels is None else labels
    return luck_of_the_best(right, np.full(n, 1 / n), labels, np.arange(n) if units is None else units)


@pytest.mark.parametrize("classifiers", [2, 20])
@pytest.mark.parametrize("spread", [0, 3])
def test_it_is_the_distance_from_the_truth_on_average(classifiers, spread):
    """200 images; each classifier is right with a chance of its own, that of the best is known."""
    draws = np.random.default_rng(0)
    lucky, said = [], []
    for _ in range(200):
        chance = 70 + spread * draws.standard_normal(classifiers)
        right = 100.0 * (draws.random((classifiers, 200)) < chance[:, None] / 100)
        lucky.append(right.mean(1).max() - chance[right.mean(1).argmax()])
        said.append(told(right))
    error = np.std(np.subtract(said, lucky)) / 200**0.5
    assert np.mean(lucky) > 3 * error  # there is something to tell
    assert abs(np.mean(said) - np.mean(lucky)) < 3 * error + 0.2  # a choice on 180 images is a little worse


def test_a_best_by_far_owes_nothing_to_luck():
    right = 100.0 * (np.random.default_rng(0).random((3, 100)) < np.array([[0.9], [0.5], [0.4]]))
    assert told(right) == pytest.approx(0)
    assert told(right[:1]) == pytest.approx(0)


def test_classes_of_one_image_are_divided_anew_each_time():
    """Where few images of each class are tested, other names of the classes change little."""
    right = 100.0 * (np.random.default_rng(0).random((10, 40)) < 0.6)
    orders = [np.random.default_rng(i).permutation(40) for i in range(20)]
    assert np.std([told(right, labels=order) for order in orders]) < 2.0  # one division for all: 6.0


def test_images_of_a_unit_are_chosen_and_measured_on_together():
    """Forty copies of each of ten images are ten images: each classifier is right on an image of its own."""
    one = 100.0 * np.eye(PARTS)
    copies = np.repeat(one, 40, axis=1)
    units = np.repeat(np.arange(PARTS), 40)
    alone = told(one, labels=np.zeros(PARTS, int))
    assert alone == pytest.approx(10)  # whoever is chosen without an image is wrong on it
    assert told(copies, units, np.zeros(400, int)) == pytest.approx(alone)
    assert told(copies) < 0.7 * alone  # as if copies were images of their own


def test_fewer_than_ten_units_tell_nothing():
    assert told(np.ones((3, PARTS - 1))) is None
    assert told(np.ones((3, 100)), np.arange(100) % (PARTS - 1)) is None
    assert told(np.ones((3, PARTS))) is not None


@pytest.fixture(scope="module")
def dr(tmp_path_factory):
    folder = make_evaluated(tmp_path_factory.mktemp("luck"), grid={"ratio": [0.0, 0.3], "seed": [0, 1]})
    return load_result("dr", folder / "dr")


def drawn(result, name, chance, groups=None):
    """`result` under another name, its classifiers right with this chance on each image, with all test images."""
    table = result.tables["predictions"]
    right = np.random.default_rng(len(name)).random(len(table)) < chance
    table = table.assign(predicted=np.where(right, table.label, (table.label + 1) % 4))
    if groups is not None:
        table = table.assign(image_group=groups(table["sample"]))
    return replace(result, name=name, tables={**result.tables, "predictions": table})


def test_the_answer_says_it_of_the_figure_that_methods_are_ranked_by(dr):
    hosts = [drawn(dr, "a" * n, 0.6) for n in range(1, 11)]
    answer = Answer(hosts)
    luck = answer.candidates.luck("top1")
    assert len(answer.candidates) == 20
    found = hosts[0].predictions("with_h2t")[0]
    assert luck == pytest.approx(told(shares(hosts), found.groups, found.labels), abs=1e-3)
    top1 = max(host.metrics["with_h2t"]["top1"] for host in hosts)
    assert (
        "It is the best of 20 classifiers on these test images; chosen on nine tenths of them, the best has "
        f"{top1 - luck:.1f} % on the rest." in answer.lines()[0]
    )
    assert "nine tenths" not in " ".join(answer.best("ece"))
    assert answer.candidates.luck("tail") is None  # of six images


def shares(hosts):
    """The share of seeds that are right, in percent: (classifiers, n), for hosts with one replicate."""
    every = [host.predictions(row)[0] for host in hosts for row in ("without_h2t", "with_h2t")]
    return np.stack([100 * np.mean([said.guesses == of.labels for said in of.said.values()], 0) for of in every])


def test_a_group_is_told_from_its_own_images_by_class(tmp_path):
    folder = make_evaluated(tmp_path, classes=[f"c{i}" for i in range(8)], grid={"ratio": [0.0, 0.3], "seed": [0]})
    result = load_result("dr", folder / "dr")
    hosts = [drawn(result, "a" * n, 0.6) for n in range(1, 6)]
    labels = hosts[0].predictions("with_h2t")[0].labels
    tail = np.flatnonzero(np.array(result.about["groups"]) == "tail")
    assert len(tail) > 1
    inside = np.isin(labels, tail)
    expected = told(shares(hosts)[:, inside], labels=labels[inside])
    assert expected > 0
    assert Candidates([(h, r) for h in hosts for r in ("without_h2t", "with_h2t")]).luck("tail") == pytest.approx(
        expected, abs=1e-3
    )


def test_replicates_count_alike_and_share_their_images(dr):
    """Two seeds as two replicates, which hold out the same images."""
    heads = dr.tables["heads"]
    tables = {**dr.tables, "heads": heads.assign(replicate=heads["seed"].fillna(0).clip(lower=0).astype(int))}
    hosts = [drawn(replace(dr, tables=tables), "a" * n, 0.6) for n in range(1, 6)]
    rows = [(host, row) for host in hosts for row in ("without_h2t", "with_h2t")]
    every = [host.predictions(row) for host, row in rows]
    right = [
        np.concatenate([100 * (said.guesses == of[r].labels) for r in (0, 1) for said in of[r].said.values()])
        for of in every
    ]
    units, labels = (np.concatenate([getattr(every[0][r], key) for r in (0, 1)]) for key in ("images", "labels"))
    expected = told(np.array(right, float), units, labels)
    assert expected > 0
    assert Candidates(rows).luck("top1") == pytest.approx(expected, abs=1e-3)
    one = drawn(dr, "a", 0.6)
    assert Candidates([*rows, (one, "with_h2t")]).luck("top1") is None


def test_each_tenth_has_images_of_each_class():
    """Ten images of each of two classes; who is right on one class alone is wrong on the other, so all are equal."""
    labels = np.repeat([0, 1], 10)
    right = 100.0 * np.stack([labels == 0, labels == 1])
    assert told(right, labels=labels) == pytest.approx(0)
    assert told(right, labels=np.zeros(20, int)) > 1


def test_nothing_is_said_of_one_classifier_of_few_groups_or_of_different_images(dr):
    hosts = [drawn(dr, "a", 0.6), drawn(dr, "aa", 0.6)]
    assert Answer(hosts).candidates.luck("top1") > 0
    assert Candidates([(hosts[0], "without_h2t")]).luck("top1") is None
    grouped = [drawn(dr, name, 0.6, lambda of: of % 3) for name in ("a", "aa")]
    assert Answer(grouped).candidates.luck("top1") is None
    assert Answer([hosts[0], grouped[1]]).candidates.luck("top1") is None
    table = hosts[1].tables["predictions"]
    for changed in ({"sample": table["sample"] + 1}, {"label": (table["label"] + 1) % 4}):
        other = replace(hosts[1], tables={**hosts[1].tables, "predictions": table.assign(**changed)})
        assert Answer([hosts[0], other]).candidates.luck("top1") is None

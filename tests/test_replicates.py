"""Replicates: intervals that cover trainings of the backbone, the stage that makes them, and stage II on all."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import tree
from golden_cases import workplace
from pipeline_builders import accepted, invoke, make_backbone_dir, make_host, make_params, make_stage2_cache, refused
from scipy.stats import t

from benchmarks import intervals as simulation
from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.replicates import further, seed_of
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation.intervals import Pairs, differences, over_replicates
from h2t.pipeline.evaluation.metrics import Answers
from h2t.pipeline.heads.replicate import Replicate
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.inspection import settings
from h2t.pipeline.reporting.results import load_result, per_class
from h2t.pipeline.stages import evaluate, train_classifier

GROUP_OF = ["head", "medium", "tail", "tail"]
LABELS = np.repeat(np.arange(4), 100)


def noisy(share, seed):
    """Predictions that are right for a `share` of the images."""
    rng = np.random.default_rng(seed)
    guesses = np.where(rng.random(len(LABELS)) < share, LABELS, (LABELS + 1) % 4)
    return Answers(guesses.astype(np.int32), rng.random(len(LABELS)))


AFTER = [noisy(share, i) for i, share in enumerate((0.75, 0.8, 0.7))]
BEFORE = [noisy(0.6, 10 + i) for i in range(3)]


def pairs(images):
    """Three replicates of one seed with these numbers of images, int (3, 400)."""
    return [Pairs([a], [b], LABELS, one) for a, b, one in zip(AFTER, BEFORE, images, strict=True)]


def test_replicates_with_the_same_images_vary_as_seeds_do():
    found = over_replicates(pairs([np.arange(400)] * 3), GROUP_OF)
    expected = differences(AFTER, BEFORE, LABELS, GROUP_OF)
    for figure in ("top1", "tail"):
        assert (found[figure].low, found[figure].high) == pytest.approx((expected[figure].low, expected[figure].high))
        assert found[figure].covers == ("seeds", "images", "backbones")


def test_replicates_without_common_images_give_the_t_interval_of_their_means():
    found = over_replicates(pairs(np.arange(1200).reshape(3, 400)), GROUP_OF)["top1"]
    means = [
        100 * ((a.guesses == LABELS).mean() - (b.guesses == LABELS).mean()) for a, b in zip(AFTER, BEFORE, strict=True)
    ]
    low, high = t.interval(0.95, 2, np.mean(means), np.std(means, ddof=1) / 3**0.5)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(means), low, high))


def test_two_replicates_give_no_verdict_and_equal_predictions_are_identical():
    two = pairs([np.arange(400)] * 3)[:2]
    assert over_replicates(two, GROUP_OF)["top1"].verdict is None
    equal = [Pairs([a], [a], LABELS, np.arange(400)) for a in AFTER]
    assert over_replicates(equal, GROUP_OF)["top1"].verdict == "identical"
    assert over_replicates(pairs([np.arange(400)] * 3), GROUP_OF, seeded=False)["top1"].covers == (
        "images",
        "backbones",
    )


@pytest.mark.parametrize("case", simulation.SMALL_REPLICATED, ids=lambda case: case.name)
def test_intervals_over_replicates_hold_as_often_as_they_say(case):
    """A small version of `python -m benchmarks.intervals --replicates`: of 300 data sets, ± 3.5 points are chance."""
    found = simulation.coverage_over_replicates(case, 300, np.random.default_rng(0))
    assert all(91 <= f.everywhere <= 99.5 for f in found.values()), found


@pytest.mark.parametrize("given", [[], [1], [0, 0], [0, -1], [0, 1.5], [0, True], 3, "0", {}, [0, 2**32]])
def test_replicates_that_cannot_be_are_refused_in_one_line(given):
    with pytest.raises(UserError, match="replicates: must list different whole numbers and begin with 0"):
        settings.check(make_params(replicates=given))


@pytest.mark.parametrize("entry", [{"weights": "backbone.pt"}, {"frozen": True, "head": "none"}])
def test_a_backbone_that_is_not_trained_here_has_no_replicates(entry):
    values = make_params(replicates=[0, 1])
    for name in values["backbones"]:
        values["backbones"][name] |= entry
    with pytest.raises(UserError, match=r"replicates: backbones\.\w+ is not trained here"):
        settings.check(values)
    assert further(make_params()) == []


def test_each_replicate_has_a_seed_of_its_own():
    assert seed_of(7, 0) == 7
    assert len({seed_of(seed, r) for seed in range(3) for r in range(3)}) == 9


CLASSES = ["cat", "dog", "owl"]
ORDERS = (CLASSES, CLASSES, ["dog", "cat", "owl"])  # a replicate may order its classes otherwise


@pytest.fixture(scope="module", params=["dr", "ncm"])
def host(request):
    return (
        make_host(host=request.param, grid={"ratio": [0.0, 0.5], "seed": [0, 1]})
        if request.param == "dr"
        else (train_classifier.Params(host="ncm", backbone="b"))
    )


@pytest.fixture(scope="module")
def evaluated(host, tmp_path_factory):
    """Three replicates evaluated together, and each alone as if it were replicate 0."""
    root = tmp_path_factory.mktemp("replicates")
    with ExitStack() as stack:
        replicates = []
        for number, classes in enumerate(ORDERS):
            backbone = root / f"backbone-{number}"
            digest = make_backbone_dir(backbone, classes=3, seed=number)
            cache = make_stage2_cache(
                root / f"cache-{number}", seed=number, classes=classes, shape=(64, 2, 2), backbone=digest, test=20
            )
            replicates.append(Replicate(number, stack.enter_context(open_cache(cache)), backbone))
        first, *rest = replicates
        run = Run("one", root / "heads")
        train_classifier.run(host, run, Residency(), first.cache, first.backbone, rest)
        evaluate.run(evaluate.Params(ratio=0.5), Run("one", root / "all"), first.cache, run.out, first.backbone, rest)
        for r in replicates:
            folder = root / f"alone-{r.number}"
            evaluate.run(evaluate.Params(ratio=0.5), Run("one", folder), r.cache, r.inside(run.out), r.backbone)
    return root


def test_figures_are_means_over_replicates(evaluated, host):
    every = json.loads((evaluated / "all/metrics.json").read_text())
    each = [json.loads((evaluated / f"alone-{r}/metrics.json").read_text()) for r in range(3)]
    for row in ("stage1", "without_h2t"):
        assert every[row]["replicates"] == 3
        assert "replicates" not in each[0][row]
        for figure in ("top1", "ece", "nll"):
            assert every[row][figure] == pytest.approx(np.mean([one[row][figure] for one in each])), (row, figure)
    if host.host == "dr":
        assert every["difference"]["top1"]["covers"] == ["seeds", "images", "backbones"]
        assert every["without_h2t"]["heads"] == 6


def test_tables_name_the_replicate_and_number_classifiers_through(evaluated):
    heads = pq.read_table(evaluated / "all/heads.parquet").to_pandas()
    alone = pq.read_table(evaluated / "alone-0/heads.parquet")
    assert "replicate" not in alone.column_names
    of_heads = heads[heads.number >= 0].drop_duplicates("number")
    assert of_heads.number.tolist() == list(range(len(of_heads)))
    assert of_heads.groupby("replicate").size().nunique() == 1
    assert sorted(heads[heads.number < 0].number.unique()) == [-3, -2, -1]
    assert not heads[heads.number >= 0].duplicated(["number", "split", "statistics"]).any()


def test_the_report_shows_each_class_of_stage_one_too(evaluated):
    shown, table = per_class(load_result("one", evaluated / "all")), pq.read_table(evaluated / "all/per_class.parquet")
    own = table.to_pandas().query("number < 0 and split == 'test'").groupby("class").accuracy.mean()
    assert shown[shown.row == "stage I"].accuracy.tolist() == own.tolist()


def test_classes_have_the_order_of_replicate_0(evaluated):
    """In replicate 2 cat and dog have changed places."""
    per_class = pq.read_table(evaluated / "all/per_class.parquet").to_pandas()
    alone = pq.read_table(evaluated / "alone-2/per_class.parquet").to_pandas()
    for mine, theirs in ((0, 1), (1, 0), (2, 2)):
        found = per_class[(per_class.number == -3) & (per_class.split == "test") & (per_class["class"] == mine)]
        expected = alone[(alone.number == -1) & (alone.split == "test") & (alone["class"] == theirs)]
        assert found.accuracy.tolist() == expected.accuracy.tolist()


def test_another_set_of_classes_is_refused(tmp_path):
    with ExitStack() as stack:
        found = []
        for number, names in enumerate((CLASSES, ["cat", "dog", "emu"])):
            backbone = tmp_path / f"b{number}"
            digest = make_backbone_dir(backbone, classes=3, seed=number)
            cache = make_stage2_cache(
                tmp_path / f"c{number}", seed=number, classes=names, shape=(64, 2, 2), backbone=digest
            )
            found.append(Replicate(number, stack.enter_context(open_cache(cache)), backbone))
        host, run = train_classifier.Params(host="ncm", backbone="b"), Run("one", tmp_path / "h")
        train_classifier.run(host, run, Residency(), found[0].cache, found[0].backbone, found[1:])
        with pytest.raises(UserError, match="all replicates must have the same classes; class 'emu' is not in all"):
            evaluate.run(evaluate.Params(), run, found[0].cache, run.out, found[0].backbone, found[1:])


@pytest.mark.slow
def test_a_replicate_is_made_once_and_another_one_leaves_it_as_it_is():
    with workplace():
        accepted("replicates", "x", "data/replicates")
        assert tree(Path("data/replicates")) == {"few.json": b"{}\n"}
        accepted("replicates", "x", "data/replicates", "--set", "replicates=[0, 1]")
        before = tree(Path("data/replicates/1"))
        shutil.rmtree("data/replicates")  # as DVC does before it runs the stage again
        shutil.rmtree("data/.replicates/1/extract/few")  # as after a kill
        again = invoke("replicates", "x", "data/replicates", "--set", "replicates=[0, 1, 3]")
        assert "replicate 1: few: 2 epochs" not in again.output
        assert "replicate 3: few: 2 epochs" in again.output
        assert tree(Path("data/replicates/1")) == before
        samples = [Path(f"data/replicates/{r}/prepare/samples.parquet").read_bytes() for r in (1, 3)]
        assert samples[0] != samples[1]
        accepted("replicates", "x", "other", "--set", "replicates=[0, 1]")
        assert tree(Path("other/1")) == before
        train = ("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "heads")
        line = refused(*train, "--set", "replicates=[0, 9]", code=1)
        assert "replicate 9 is missing; run h2t replicates" in line

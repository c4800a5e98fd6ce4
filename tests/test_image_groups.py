"""Intervals where test images come in groups: by hand, against a slow reference, by simulation, and the way of a group
from a table to the report.
"""

import json
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_maps, make_spec, write_cache
from hypothesis import given
from hypothesis import strategies as st
from image_builders import encoded
from own_data import picture
from pipeline_builders import ROOT, extracted, fitted, make_backbone_dir, make_stage2_cache, make_stage2_rows
from scipy.linalg import fractional_matrix_power
from test_evaluate import evaluated

from benchmarks import image_groups as simulation
from benchmarks.intervals import Found
from h2t.cache.errors import CacheError
from h2t.cache.format.spec import parse_record
from h2t.cache.reader import open_cache
from h2t.cache.tools.pooled import pooled
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.samples import SCHEMA, load_samples
from h2t.pipeline.evaluation.image_groups import contributions, freedom
from h2t.pipeline.evaluation.intervals import Pairs, differences, over_replicates
from h2t.pipeline.evaluation.metrics import Answers
from h2t.pipeline.evaluation.tested_groups import groups_of
from h2t.pipeline.extraction import row_plan
from h2t.pipeline.extraction.row_plan import planned
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.results import load_result, rows_apart
from h2t.pipeline.stages import prepare

GROUP_OF = ["head", "medium", "tail", "tail"]
LABELS = np.repeat(np.arange(4), 100)


def said(labels, share, seed):
    """Predictions that are right for some `share` of the images, mostly the same for all seeds with this last digit."""
    hard, rng = np.random.default_rng(seed % 10).random(len(labels)), np.random.default_rng(seed)
    right = 0.9 * hard + 0.1 * rng.random(len(labels)) < share
    guesses = np.where(right, labels, (labels + 1) % 4)
    return Answers(guesses.astype(np.int32), rng.random(len(labels)))


def same(found, expected):
    """Whether two differences are the same but for rounding and the number of groups."""
    numbers = [[d.mean, d.low, d.high] for d in (found, expected)]
    rest = [(d.verdict, d.covers, d.seeds) for d in (found, expected)]
    return numbers[0] == pytest.approx(numbers[1]) and rest[0] == rest[1]


def repeated(answers, times):
    return [Answers(a.guesses.repeat(times), a.confidence.repeat(times)) for a in answers]


AFTER, BEFORE = ([said(LABELS, share, seed + 10 * s) for s in range(3)] for seed, share in ((1, 0.7), (2, 0.6)))


def test_where_each_image_is_a_group_of_its_own_nothing_changes():
    alone = np.random.default_rng(0).permutation(400) * 7
    assert differences(AFTER, BEFORE, LABELS, GROUP_OF, groups=alone) == differences(AFTER, BEFORE, LABELS, GROUP_OF)


@pytest.mark.parametrize("seeds", [1, 3])
def test_copies_give_the_interval_of_the_images_themselves(seeds):
    copies, of = LABELS.repeat(5), np.arange(400).repeat(5)
    after, before = (repeated(side[:seeds], 5) for side in (AFTER, BEFORE))
    once = differences(AFTER[:seeds], BEFORE[:seeds], LABELS, GROUP_OF, seeds > 1)
    narrow = differences(after, before, copies, GROUP_OF, seeds > 1)
    found = differences(after, before, copies, GROUP_OF, seeds > 1, groups=of)
    for figure, expected in once.items():
        assert found[figure].image_groups == {"head": 100, "medium": 100, "tail": 200}.get(figure, 400)
        assert same(found[figure], expected)
        assert narrow[figure].high - narrow[figure].low < found[figure].high - found[figure].low


def slow(values, labels, weights, groups):
    """CR2 with all of its matrices: the least-squares fit of the values to their classes."""
    design = (labels[:, None] == np.unique(labels)).astype(float)
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    rest = values - hat @ values
    total = 0.0
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        adjusted = fractional_matrix_power(np.eye(len(own)) - hat[np.ix_(own, own)], -0.5).real @ rest[own]
        total += float(weights[own] @ adjusted) ** 2
    return total


@given(st.integers(0, 10**6))
def test_the_variance_is_that_of_the_whole_matrices(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(3), [12, 7, 5]))
    groups = rng.permutation(24) % 8
    groups[:2] = 8, 9  # alone, beside groups of several classes
    values, weights = rng.normal(size=24), np.array([0.5, 0.2, 0.3])[labels]
    found = contributions(values[None], labels, weights, groups)
    assert (found**2).sum() == pytest.approx(slow(values, labels, weights, groups))


def test_the_variance_of_single_images_is_that_within_classes():
    rng = np.random.default_rng(0)
    labels, values = np.repeat([0, 2], [30, 50]), rng.normal(size=(2, 80))
    weights = np.where(labels == 0, 0.5 / 30, 0.5 / 50)
    found = (contributions(values, labels, weights, rng.permutation(80)) ** 2).sum(1)
    expected = values[:, :30].var(1, ddof=1) / 4 / 30 + values[:, 30:].var(1, ddof=1) / 4 / 50
    assert found == pytest.approx(expected)
    assert freedom(labels, np.arange(80)) == pytest.approx(78)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (np.arange(400) // 5, 80 - 4),  # within classes
        (np.arange(400) % 7, 6),  # across classes: all groups less one
        (np.arange(400) // 100, 3),  # a class in one group has no variance of its own
        (np.minimum(np.arange(400) // 350, 1), 1),
    ],
)
def test_degrees_of_freedom(groups, expected):
    assert freedom(LABELS, groups) == pytest.approx(expected, rel=0.01)


def test_a_class_in_one_group_adds_its_square():
    labels, weights = np.repeat([0, 1], 10), np.full(20, 0.05)
    groups = np.array([0] * 10 + [1, 2] * 5)
    found = contributions(np.ones((1, 20)), labels, weights, groups)
    assert found.tolist() == [[pytest.approx(0.5), 0, 0]]


def test_a_direction_needs_five_groups():
    before, after = [said(LABELS, 0.2, 0)] * 3, [said(LABELS, 0.9, 0)] * 3
    for many, verdict in ((4, "too close to tell"), (40, "higher")):
        found = differences(after, before, LABELS, GROUP_OF, groups=np.arange(400) % many)
        assert (found["top1"].verdict, found["top1"].image_groups) == (verdict, many)
        assert found["ece"].verdict is None  # fewer than 300 groups


def test_replicates_share_groups():
    """Each replicate tests on one copy of each image, which are other files: the same images, said by their groups."""
    images = np.arange(1200).reshape(3, 400)
    sides = list(zip(AFTER, BEFORE, images, strict=True))
    expected = over_replicates([Pairs([a], [b], LABELS, images[0]) for a, b, _ in sides], GROUP_OF)
    groups = [np.arange(400) for _ in images]
    pairs = [Pairs([a], [b], LABELS, own, of) for (a, b, own), of in zip(sides, groups, strict=True)]
    twice = [replace(p, groups=np.arange(400) // 2) for p in pairs]
    single = [
        Pairs(repeated(p.after, 2), repeated(p.before, 2), LABELS.repeat(2), np.arange(800) + 800 * r, of.repeat(2))
        for r, (p, of) in enumerate(zip(pairs, groups, strict=True))
    ]
    found, divided = over_replicates(single, GROUP_OF), over_replicates(pairs, GROUP_OF)
    for figure in ("top1", "tail", "ece"):
        assert same(found[figure], expected[figure])
        assert same(divided[figure], expected[figure])  # one image of each group in each replicate
        assert found[figure].covers == ("seeds", "images", "backbones")
    assert over_replicates(twice, GROUP_OF)["top1"].image_groups == 200
    apart = [replace(p, groups=p.images // 2) for p in pairs]
    assert over_replicates(apart, GROUP_OF)["top1"] != over_replicates(twice, GROUP_OF)["top1"]


@pytest.mark.parametrize("case", simulation.SMALL, ids=lambda case: case.kind)
def test_the_intervals_hold_as_often_as_they_say(case):
    """A small version of `python -m benchmarks.image_groups`: 300 data sets a case, so ± 4 points are chance."""
    found = simulation.coverage(case, 300, np.random.default_rng(0))
    for figure in ("top1", "tail"):
        assert 90 <= found["in groups"][figure].everywhere <= 99.5, figure
    assert found["each image on its own"]["top1"].everywhere < found["in groups"]["top1"].everywhere


def test_the_table_of_coverage_comes_from_the_committed_record():
    record = json.loads((ROOT / "benchmarks/results/image_groups.json").read_text(encoding="utf-8"))
    assert record["sets"] >= 1000
    found = [
        {way: {figure: Found(**values) for figure, values in of.items()} for way, of in case["found"].items()}
        for case in record["cases"]
    ]
    assert [{**case, "found": 0} for case in record["cases"]] == [{**asdict(c), "found": 0} for c in simulation.CASES]
    page = (ROOT / "docs/intervals.md").read_text(encoding="utf-8")
    assert simulation.table(list(zip(simulation.CASES, found, strict=True))) in page


# --- the way of a group


def table_of_sites(root, order, **options):
    """Prepares 40 images of two classes from eight sites, listed in this `order`; returns what was said."""
    root.mkdir()
    lines = [(f"{i:02}.png", "ab"[i % 2], f"site {'hgfedcba'[i // 5]}") for i in range(40)]
    for i, (name, *_) in enumerate(lines):
        (root / name).write_bytes(encoded(picture(i % 2, i), "PNG"))
    named = pa.table(dict(zip(("f", "y", "site"), zip(*(lines[i] for i in order), strict=True), strict=True)))
    pq.write_table(named, root / "t.parquet")
    spoken = []
    given = {"table": str(root / "t.parquet"), "path": "f", "label": "y", "transform": {"size": 32}, **options}
    params = prepare.Params(dataset="table", options=given, test=0.4)
    prepare.run(params, Run("prepare", root / "out", say=spoken.append))
    return " ".join(spoken)


def test_prepare_numbers_groups_by_name_whatever_the_order(tmp_path):
    shuffled = np.random.default_rng(0).permutation(40).tolist()
    table_of_sites(tmp_path / "1", range(40), group="site")
    table_of_sites(tmp_path / "2", shuffled, group="site")
    one, other = (load_samples(tmp_path / name / "out") for name in "12")
    assert one.table.equals(other.table)
    assert [7 - int(s[:2]) // 5 for s in one.table["source"].to_pylist()] == one.table["group"].to_pylist()
    tests = one.table.filter(pa.compute.equal(one.table["split"], "test"))
    assert planned(one.table, ["stage1"], [1, 1]).test_groups == {"test_groups": tests["group"].to_pylist()}
    assert len(set(tests["group"].to_pylist())) > 1


def test_extract_and_pool_keep_the_groups_of_test_images(tmp_path, few_digits, backbone_dir):
    samples, images = few_digits
    group = pa.array((np.arange(len(samples.table)) // 4).astype(np.int32))
    grouped = replace(samples, table=samples.table.append_column("group", group))
    plain = extracted(tmp_path / "plain", samples, images, backbone_dir)
    assert plain.fingerprint == extracted(tmp_path / "c", grouped, images, backbone_dir).fingerprint
    tests = pa.compute.equal(samples.table["split"], "test")
    with open_cache(tmp_path / "c") as cache:
        pooled(cache, tmp_path / "pooled", lambda maps: maps.mean((2, 3)), "gap")
    for folder in ("c", "pooled"):
        with open_cache(tmp_path / folder) as cache:
            assert groups_of(cache, "stage1").tolist() == group.filter(tests.combine_chunks()).to_pylist()
    with pytest.raises(CacheError, match="holds another cache"):
        extracted(tmp_path / "c", samples, images, backbone_dir)


def test_a_record_has_no_room_for_millions_of_groups(few_digits, monkeypatch):
    monkeypatch.setattr(row_plan, "MOST_GROUPED", 3)
    table = few_digits[0].table
    rows = planned(table.append_column("group", pa.array(range(len(table)), pa.int32())), ["stage1"], [1] * 10)
    assert (rows.grouped, rows.test_groups) == (True, {})


def test_data_without_groups_are_prepared_as_before_and_have_the_same_digest(tmp_path):
    table_of_sites(tmp_path / "1", range(40))
    found = load_samples(tmp_path / "1/out")
    assert found.table.schema == SCHEMA
    assert planned(found.table, ["stage1"], [1, 1]).test_groups == {}
    grouped = replace(found, table=found.table.append_column("group", pa.array(range(40), pa.int32())))
    assert grouped.digest == found.digest  # no map depends on a group, so no cache is another


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache of 60 test images, heads of three seeds, backbone)."""
    folder = tmp_path_factory.mktemp("groups")
    digest = make_backbone_dir(folder / "b", classes=3)
    cache = make_stage2_cache(folder / "c", shape=(64, 2, 2), test=20, backbone=digest)
    fitted(folder / "h", cache, folder / "b", grid={"ratio": [0.0, 0.3], "seed": [0, 1, 2]})
    return cache, folder / "h", folder / "b"


def with_groups(cache, groups):
    """Writes `groups` into the record of the cache; returns the record before."""
    before = (cache / "cache.json").read_bytes()
    commit = parse_record(before)
    spec = replace(commit.spec, provenance={**commit.spec.provenance, "test_groups": groups})
    (cache / "cache.json").write_bytes(spec.record(commit.files))
    return before


def test_groups_reach_the_report(tmp_path, made):
    before = evaluated(tmp_path / "before", *made)
    record = with_groups(made[0], [i // 4 for i in range(60)])
    try:
        after = evaluated(tmp_path / "after", *made)
    finally:
        (made[0] / "cache.json").write_bytes(record)
    assert "image_groups" not in json.dumps(before)
    assert {f: d["image_groups"] for f, d in after["difference"].items()}["top1"] == 15
    assert after["difference"]["top1"]["mean"] == before["difference"]["top1"]["mean"]
    assert after["difference"]["top1"]["low"] != before["difference"]["top1"]["low"]
    lines = pd.read_parquet(tmp_path / "after/differences.parquet")
    assert set(lines[lines.figure == "top1"].image_groups) == {15}
    without, grouped = (load_result("dr", tmp_path / name) for name in ("before", "after"))
    assert "image_group" not in without.tables["predictions"]
    assert "3 seeds of stage II and 60 test images;" in Answer([without]).certainty()
    assert "3 seeds of stage II and 15 groups of 60 test images;" in Answer([grouped]).certainty()
    against = rows_apart(grouped, "with_h2t", grouped, "without_h2t")["top1"].as_dict()
    assert [against[k] for k in ("mean", "low", "high", "image_groups")] == pytest.approx(
        [after["difference"]["top1"][k] for k in ("mean", "low", "high", "image_groups")]
    )
    assert "test_groups" not in json.dumps(grouped.about)


@pytest.mark.parametrize("wrong", [[0] * 59, [0] * 59 + [-1], [True] * 60, "groups", {"0": 1}])
def test_a_record_that_does_not_fit_is_one_line(tmp_path, made, wrong):
    record = with_groups(made[0], wrong)
    try:
        with pytest.raises(UserError, match="its record must give each test image a group"):
            evaluated(tmp_path / "e", *made)
    finally:
        (made[0] / "cache.json").write_bytes(record)


def test_copies_are_found_by_their_digests(tmp_path):
    rows = make_stage2_rows(test=4)
    digests = rows["digest"].to_pylist()
    tests = np.array(rows["split"].to_pylist()) == "test"
    copied = [digests[row // 2 * 2] if test else digests[row] for row, test in enumerate(tests)]
    rows = rows.set_column(rows.schema.get_field_index("digest"), rows.schema.field("digest"), pa.array(copied))
    spec = make_spec(rows=len(rows), maps=((6, 2, 2),), dtype="float32", shard_rows=8)
    write_cache(tmp_path / "c", spec, rows, make_maps(spec))
    with open_cache(tmp_path / "c") as cache:
        groups = groups_of(cache, "mixture")
    assert len(set(groups.tolist())) == 6
    assert (groups[::2] == groups[1::2]).all()

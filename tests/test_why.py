import json
import shutil

import pyarrow as pa
import pytest
from builders import make_cache
from pipeline_builders import CPU, invoke, make_backbone_dir, make_extract, make_samples, write_params

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction.forward import settings as settings_of
from h2t.pipeline.inspection.why import why


def verdict(cache, samples, backbone, *, seed=0, previous=None, settings=None, **params):
    with open_cache(cache) as opened:
        section = make_extract(**{"max_views": 2, **params})
        return why(opened, section, samples, backbone, seed, previous, settings)


def changed(samples: Samples, change) -> Samples:
    """`samples` with its lines as `change` leaves them."""
    lines = samples.table.to_pylist()
    change(lines)
    return Samples(pa.Table.from_pylist(lines, samples.table.schema), samples.facts)


def test_the_cache_that_is_asked_for(digits_cache, digits, backbone_dir):
    found = verdict(digits_cache, digits[0], backbone_dir)
    assert found.reasons == []
    assert found.lines() == ["the cache matches the parameters"]


@pytest.mark.parametrize(
    ("params", "ingredient", "detail", "every"),
    [
        ({"batchnorm_passes": 3}, "batch norm", "passes 2 -> 3", True),
        ({"seed": 1}, "batch norm", "seed 0 -> 1", True),
        ({"dtype": "float16"}, "dtype", "float32 -> float16", True),
        ({"max_views": 1}, "view policy", "max 2 -> 1", False),
        ({"batchnorm": ["stage1"]}, "batch norm", "recipes ['branchwise', 'stage1'] -> ['stage1']", False),
    ],
)
def test_each_ingredient_is_named(digits_cache, digits, backbone_dir, params, ingredient, detail, every):
    found = verdict(digits_cache, digits[0], backbone_dir, **params)
    first = found.reasons[0]
    assert (first.ingredient, first.detail, first.every) == (ingredient, detail, every)
    assert found.rows == found.of  # nothing names a cache to take rows from
    if ingredient == "dtype":
        assert found.lines()[-1] == f"to extract again: all {found.of:,} rows"
    elif every:  # other statistics; rows under those of stage I stay, but for augmentations from another seed
        with open_cache(digits_cache) as cache:
            lines = cache.rows.to_pylist()
        anew = [r for r in lines if r["statistics"] != "stage1" or ("seed" in params and r["view"])]
        assert found.possible == len(anew)
    else:
        assert found.possible == 0
        assert found.lines()[-1].endswith("rows; none with extract.statistics_from set to this cache")


def test_more_views_leave_the_rows_that_are_there(digits_cache, digits, backbone_dir):
    found = verdict(digits_cache, digits[0], backbone_dir, max_views=3)
    assert 0 < found.possible < found.of / 4


def test_other_weights(tmp_path, digits_cache, digits):
    make_backbone_dir(tmp_path / "other", seed=1)
    found = verdict(digits_cache, digits[0], tmp_path / "other")
    assert found.reasons[0].ingredient == "weights"
    assert found.reasons[0].detail.startswith("weights ")
    assert len(found.reasons[0].detail) < 60
    assert found.rows == found.of


def test_another_transform(digits_cache, digits, backbone_dir):
    samples = digits[0]
    facts = {**samples.facts, "transform": {**samples.facts["transform"], "padding": 2}}
    found = verdict(digits_cache, Samples(samples.table, facts), backbone_dir)
    assert [(r.ingredient, r.detail) for r in found.reasons] == [("transform", "padding 1 -> 2")]


def test_changed_test_images_concern_their_own_rows(digits_cache, digits, backbone_dir):
    def change(lines):
        mine = [line for line in lines if line["split"] == "test"]
        mine[0]["digest"] = mine[1]["digest"] = "0" * 64
        mine[2]["source"] = "digits/new"

    found = verdict(digits_cache, changed(digits[0], change), backbone_dir)
    (reason,) = found.reasons
    assert reason.ingredient == "dataset"
    assert "1 image added (digits/new), 1 image removed" in reason.detail
    assert "2 images changed" in reason.detail
    assert found.possible == 2 * 3  # two images under three statistics each; the third has another name only
    assert found.lines()[-1].startswith(f"to extract again: all {found.of:,} rows; 6 of {found.of:,} rows (")
    with open_cache(digits_cache) as previous:
        found = verdict(digits_cache, changed(digits[0], change), backbone_dir, previous=previous)
    assert found.rows == 6
    assert found.lines()[-1].startswith(f"to extract again: 6 of {found.of:,} rows (")
    assert f"the others are taken from {digits_cache} (2 images are new or changed)" in found.lines()[-1]


def test_changed_training_images_concern_all_rows_under_statistics_estimated_on_them(
    digits_cache, digits, backbone_dir
):
    def change(lines):
        next(line for line in lines if line["split"] == "train")["digest"] = "0" * 64

    found = verdict(digits_cache, changed(digits[0], change), backbone_dir)
    assert "the balanced, instance, mixture statistics would be estimated again" in found.reasons[0].detail
    assert found.rows == found.of
    with open_cache(digits_cache) as previous:
        found = verdict(digits_cache, changed(digits[0], change), backbone_dir, previous=previous)
    assert "estimated again" not in found.reasons[0].detail  # they are kept
    assert found.rows == 3  # one view under three statistics


def test_another_layout_is_the_same_values(digits_cache, digits, backbone_dir):
    found = verdict(digits_cache, digits[0], backbone_dir, codec="zstd")
    assert found.lines() == [
        "layout: codec none -> zstd (same values, other bytes)",
        f"to extract again: all {found.of:,} rows; none with extract.statistics_from set to this cache",
    ]


def test_what_computes_decides_too(digits_cache, digits, backbone_dir):
    """Maps of another batch size are within a tolerance, not the same bytes, so they are not taken."""
    with open_cache(digits_cache) as previous:
        same = {**settings_of(32, "float32", CPU), "threads": previous.spec.provenance["threads"]}
        ask = {"previous": previous, "codec": "zstd"}
        assert verdict(digits_cache, digits[0], backbone_dir, settings=same, **ask).rows == 0
        found = verdict(digits_cache, digits[0], backbone_dir, settings={**same, "batch_size": 64}, **ask)
    assert found.rows == found.of
    assert found.lines()[-1].endswith("(batch_size 32 -> 64)")


def test_the_command_finds_its_neighbours(tmp_path, digits_cache, backbone_dir):
    data = tmp_path / "data"
    shutil.copytree(digits_cache, data / "extract/b")
    shutil.copytree(backbone_dir, data / "train_backbone/b")
    params = write_params(
        tmp_path / "params.yaml", extract__batch_size=32, extract__dtype="float32", extract__max_views=2
    )

    def run(*more):
        return invoke("cache", "why", data / "extract/b", "--params", params, *more)

    done = run()
    assert done.exit_code == 0, done.output
    assert "not compared: dataset and transform" in done.stdout
    make_samples(data / "prepare")
    assert run().stdout.splitlines()[-1] == "the cache matches the parameters"
    found = json.loads(run("--json", "--set", "extract.dtype=float16").stdout)
    assert found["reasons"][0]["ingredient"] == "dtype"


def test_pooled_and_imported_caches_have_no_parameters(tmp_path, digits, backbone_dir):
    make_cache(tmp_path / "p", fingerprint_inputs={"parent": "a" * 64, "pool": "gap"})
    make_cache(tmp_path / "i", fingerprint_inputs={"backbone": {"weights": "none"}})
    for name, says in (("p", "is a pooled copy"), ("i", "holds imported features")):
        with pytest.raises(UserError, match=says):
            verdict(tmp_path / name, digits[0], backbone_dir)

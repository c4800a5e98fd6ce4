"""Pooled copies as caches of the pipeline: the same heads, the same metrics, refusals where they would differ."""

import json

import numpy as np
import pytest
import torch
from builders import raises
from pipeline_builders import (
    accepted,
    distance,
    evaluated,
    fitted,
    make_backbone_dir,
    make_stage2_cache,
    pooled_copy,
    refused,
    run_host,
    write_params,
)
from safetensors.torch import load_file

from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.features import FeatureReader, pool_label

SHAPE = (64, 2, 2)  # the channels of the backbone in `maps`


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """A folder with `backbone` and the `cache` of its (random) maps."""
    folder = tmp_path_factory.mktemp("maps")
    weights = make_backbone_dir(folder / "backbone", classes=3)
    inputs = {"backbone": {"arch": "resnet20", "weights": weights}, "views": {"max": 1}}
    facts = {"classes": ["a", "b", "c"], "counts": [9, 5, 2]}
    make_stage2_cache(folder / "cache", shape=SHAPE, fingerprint_inputs=inputs, provenance=facts, dtype="float16")
    return folder


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize(
    ("name", "options"), [("gap", {}), ("max", {}), ("gem", {}), ("gem", {"exponent": 2.0})], ids=str
)
def test_a_copy_holds_what_pooling_while_reading_gives(maps, tmp_path, name, options, codec):
    from h2t.pipeline.base import plugins

    spec = pooled_copy(tmp_path / "copy", maps / "cache", pool=name, pool_options=options, codec=codec)
    module = plugins.load("pools", name)
    made = module.Pool(module.Options(**options), SHAPE[0])
    assert verify(tmp_path / "copy") == []
    with open_cache(maps / "cache") as parent, open_cache(tmp_path / "copy") as cache:
        rows = np.arange(spec.rows)
        expected = FeatureReader(parent, lambda m: made({}, m)).read(rows)
        assert torch.equal(FeatureReader(cache, None).read(rows)[..., 0, 0], expected)
        assert cache.rows == parent.rows
        assert spec.fingerprint_inputs == {
            "backbone": parent.spec.fingerprint_inputs["backbone"],
            "pool": pool_label(name, options),
            "parent": parent.spec.fingerprint,
        }
        assert {**spec.provenance, **parent.spec.provenance} == spec.provenance


def test_labels_are_complete():
    assert pool_label("gap", {}) == "gap"
    assert pool_label("gem", {}) == pool_label("gem", {"exponent": 3.0}) == 'gem {"exponent":3.0,"trained":false}'
    assert pool_label("gem", {"exponent": 2.0}) != pool_label("gem", {})


@pytest.mark.parametrize(
    "host",
    [
        {},
        {"pool": "max"},
        {"pool": "gem", "pool_options": {"exponent": 2.0}},
        {"grid": {"selection": ["mixup", "random"]}},
        {"host": "mislas"},
    ],
    ids=str,
)
def test_heads_trained_on_a_copy_are_those_trained_on_the_maps(maps, tmp_path, host):
    pooled_copy(tmp_path / "copy", maps / "cache", **{k: host[k] for k in ("pool", "pool_options") if k in host})
    expected = fitted(tmp_path / "a", maps / "cache", maps / "backbone", pooled=False, **host)
    found = fitted(tmp_path / "b", tmp_path / "copy", maps / "backbone", **host)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert distance(found[key], tensor) <= 1e-5


def test_a_head_that_is_fitted_at_once_is_the_same_too(maps, tmp_path):
    pooled_copy(tmp_path / "copy", maps / "cache")
    found = []
    for source in (maps / "cache", tmp_path / "copy"):
        out = tmp_path / f"heads-{source.name}"
        run_host(out, source, maps / "backbone", host="ncm")
        found.append(load_file(out / "heads.safetensors"))
    for key, tensor in found[0].items():
        assert distance(found[1][key], tensor) <= 1e-5


def test_either_can_be_evaluated_on_either(maps, tmp_path):
    pooled_copy(tmp_path / "copy", maps / "cache")
    sources = {"maps": maps / "cache", "copy": tmp_path / "copy"}
    metrics = []
    for trained_on, source in sources.items():
        fitted(tmp_path / f"on-{trained_on}", source, maps / "backbone")
        metrics += [
            evaluated(tmp_path / f"{trained_on}-{name}", other, tmp_path / f"on-{trained_on}", maps / "backbone")
            for name, other in sources.items()
        ]
    assert metrics[0]["with_h2t"]["top1"] is not None
    assert all(m == metrics[0] for m in metrics)


@pytest.mark.parametrize(
    ("name", "host", "message"),
    [
        ("max", {}, "the cache was pooled by max, got pool gap"),
        ("gem", {"pool": "gem", "pool_options": {"exponent": 2.0}}, "the cache was pooled by gem"),
        ("gap", {"pool": "attention"}, "the cache was pooled by gap, got pool attention"),
        ("max", {"pool": "max", "grid": {"selection": ["mixup"]}}, "needs whole maps"),
    ],
)
def test_a_copy_by_another_pool_is_refused(maps, tmp_path, name, host, message):
    pooled_copy(tmp_path / "copy", maps / "cache", pool=name)
    with pytest.raises(UserError, match=message):
        fitted(tmp_path / "heads", tmp_path / "copy", maps / "backbone", **host)


def test_the_stage_1_head_is_not_evaluated_on_maxima(maps, tmp_path):
    pooled_copy(tmp_path / "copy", maps / "cache", pool="max")
    fitted(tmp_path / "heads", tmp_path / "copy", maps / "backbone", pool="max")
    with pytest.raises(UserError, match="the cache was pooled by max, got pool gap"):
        evaluated(tmp_path / "out", tmp_path / "copy", tmp_path / "heads", maps / "backbone")
    metrics = evaluated(tmp_path / "out", maps / "cache", tmp_path / "heads", maps / "backbone")
    assert metrics["stage1"]["top1"] is not None


def test_another_backbones_copy_is_refused(maps, tmp_path):
    pooled_copy(tmp_path / "copy", maps / "cache")
    make_backbone_dir(tmp_path / "other", classes=3, seed=1)
    with pytest.raises(UserError, match="extracted by a backbone with weights"):
        fitted(tmp_path / "heads", tmp_path / "copy", tmp_path / "other")


@pytest.mark.parametrize("name", ["attention", "moments"])
def test_only_pools_without_trained_parts_and_of_one_number(maps, tmp_path, name):
    with pytest.raises(UserError, match=rf"pool\.pool.*got {name}"):
        pooled_copy(tmp_path / "copy", maps / "cache", pool=name)
    with pytest.raises(UserError, match=r"pool\.pool"):
        pooled_copy(tmp_path / "copy", maps / "cache", pool="gem", pool_options={"trained": True})
    assert not (tmp_path / "copy").exists()


def test_a_copy_is_not_pooled_again_nor_replaced_unasked(maps, tmp_path):
    pooled_copy(tmp_path / "copy", maps / "cache")
    with pytest.raises(UserError, match="is pooled already"):
        pooled_copy(tmp_path / "copy2", tmp_path / "copy")
    with raises("exists"):
        pooled_copy(tmp_path / "copy", maps / "cache", pool="max")
    assert pooled_copy(tmp_path / "copy", maps / "cache", pool="max", replace=True).fingerprint_inputs["pool"] == "max"


def test_commands(maps, tmp_path):
    params = write_params(tmp_path / "params.yaml", pool={"pool": "gem", "pool_options": {"exponent": 2.0}})
    cache = str(maps / "cache")
    for arguments in (
        ["pool", "b", cache, str(tmp_path / "a"), "--params", str(params)],
        ["cache", "pool", cache, str(tmp_path / "b"), "--pool", "gem", "--option", "exponent=2.0"],
    ):
        assert "rows, " in accepted(*arguments)
    found = [json.loads((tmp_path / name / "cache.json").read_bytes()) for name in ("a", "b")]
    assert found[0] == found[1]
    line = refused("cache", "pool", cache, str(tmp_path / "c"), "--option", "power=2", code=1)
    assert "power" in line


def test_the_section_may_be_left_out():
    from pipeline_builders import make_params

    from h2t.pipeline.inspection import settings

    values = make_params()
    del values["pool"]
    settings.check(values)
    assert values["pool"] == {}
    values["pool"] = {"pool": "gapp"}
    with pytest.raises(UserError, match=r"pool\.pool: no pool 'gapp'.*gap"):
        settings.check(values)

"""A backbone, cache, heads or evaluation of another name than the command's NAME is refused, whatever shapes fit."""

import shutil

import pytest
import yaml
from pipeline_builders import (
    ROOT,
    fitted,
    make_backbone_dir,
    make_params,
    make_samples,
    make_stage2_cache,
    refused,
    write_params,
)
from report_builders import make_evaluated

from h2t.pipeline.command_line.names import folder_name
from h2t.pipeline.networks.weights import load_weights, save_weights


@pytest.fixture
def params(tmp_path):
    """Backbones ce_mixup and gcl, and twin, which differs from ce_mixup in its training alone; hosts dr and other."""
    values = make_params()
    default = yaml.safe_load((ROOT / "presets/digits.yaml").read_text(encoding="utf-8"))
    values["backbones"] = {k: default["backbones"][k] for k in ("ce_mixup", "gcl")}
    values["backbones"]["twin"] = {**values["backbones"]["ce_mixup"], "lr": 0.05}
    values["hosts"]["other"] = {**values["hosts"]["dr"], "host": "mislas"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "params.yaml"


def backbone(folder, objective="ce", **more):
    """What train_backbone writes for that objective."""
    digest = make_backbone_dir(folder, classes=3, **more)
    state, about = load_weights(folder / "head.safetensors")
    save_weights(folder / "head.safetensors", state, {**about, "objective": objective})
    return digest


def asked(command, tmp_path, params, *paths):
    return refused(*command, *paths, tmp_path / "out", "--params", params, "--device", "cpu", leaves=tmp_path / "out")


def test_extract_refuses_the_backbone_of_another_name(tmp_path, params):
    make_samples(tmp_path / "samples")
    for folder in ("b", "gcl"):
        backbone(tmp_path / folder, "gcl")
    line = asked(["extract", "ce_mixup"], tmp_path, params, tmp_path / "samples", tmp_path / "b")
    assert "must be a backbone with objective ce, as in backbones.ce_mixup; got gcl" in line
    line = asked(["extract", "ce_mixup"], tmp_path, params, tmp_path / "samples", tmp_path / "gcl")
    assert "got one with the name of backbones.gcl" in line
    backbone(tmp_path / "twin")
    line = asked(["extract", "ce_mixup"], tmp_path, params, tmp_path / "samples", tmp_path / "twin")
    assert "got one with the name of backbones.twin" in line
    backbone(tmp_path / "large", arch="resnet32")
    line = asked(["extract", "ce_mixup"], tmp_path, params, tmp_path / "samples", tmp_path / "large")
    assert "must be a backbone with arch resnet20, as in backbones.ce_mixup; got resnet32" in line
    backbone(tmp_path / "experts", experts=3)
    line = asked(["extract", "ce_mixup"], tmp_path, params, tmp_path / "samples", tmp_path / "experts")
    assert "got {'experts': 3, 'fork': 'layer2'}" in line


@pytest.mark.parametrize("command", ["extract", "train-backbone"])
def test_an_output_is_not_written_to_the_place_of_another_name(tmp_path, params, command):
    make_samples(tmp_path / "samples")
    backbone(tmp_path / "b")
    out = tmp_path / "data" / "gcl"
    inputs = [tmp_path / "samples", *([tmp_path / "b"] if command == "extract" else [])]
    line = refused(command, "ce_mixup", *inputs, out, "--params", params, leaves=out)
    assert "got one with the name of backbones.gcl" in line


def test_pool_and_why_refuse_the_cache_of_another_name(tmp_path, params):
    make_stage2_cache(tmp_path / "gcl", shape=(64, 2, 2))
    assert "got one with the name of backbones.gcl" in asked(["pool", "ce_mixup"], tmp_path, params, tmp_path / "gcl")
    line = refused("cache", "why", tmp_path / "gcl", "--name", "ce_mixup", "--params", params)
    assert "got one with the name of backbones.gcl" in line


@pytest.fixture
def trained(tmp_path):
    """A backbone `b`, a cache `c` by it and heads `h` of host dr on that."""
    digest = backbone(tmp_path / "b")
    make_stage2_cache(tmp_path / "c", shape=(64, 1, 1), backbone=digest)
    fitted(tmp_path / "h", tmp_path / "c", tmp_path / "b", optimiser={"epochs": 1})
    return tmp_path


def test_stage_two_refuses_the_backbone_of_another_name(trained, params):
    backbone(trained / "b", "gcl")
    for command, more in (("train-classifier", []), ("evaluate", [trained / "h"])):
        line = asked([command, "dr"], trained, params, trained / "c", *more, trained / "b")
        assert "must be a backbone with objective ce, as in backbones.ce_mixup; got gcl" in line
    backbone(trained / "b")
    shutil.copytree(trained / "c", trained / "twin")
    for command, more in (("train-classifier", []), ("evaluate", [trained / "h"])):
        line = asked([command, "dr"], trained, params, trained / "twin", *more, trained / "b")
        assert "got one with the name of backbones.twin" in line


def test_evaluate_refuses_the_heads_of_another_host(trained, params):
    line = asked(["evaluate", "other"], trained, params, trained / "c", trained / "h", trained / "b")
    assert "must hold the heads of hosts.other; got those of hosts.dr" in line
    shutil.copytree(trained / "h", trained / "other")
    line = asked(["evaluate", "dr"], trained, params, trained / "c", trained / "other", trained / "b")
    assert "got one with the name of hosts.other" in line


def test_report_refuses_the_evaluation_of_another_host(tmp_path):
    made = make_evaluated(tmp_path)
    params = write_params(tmp_path / "params.yaml", hosts__dr__host="mislas")
    line = refused("report", made, tmp_path / "out", "--params", params, leaves=tmp_path / "out")
    assert "must be an evaluation of host mislas, as in hosts.dr; got dr" in line


def test_report_names_what_is_missing_in_an_evaluation(tmp_path):
    made = make_evaluated(tmp_path)
    params = write_params(tmp_path / "params.yaml")
    (made / "dr/heads.parquet").unlink()
    line = refused("report", made, tmp_path / "out", "--params", params, leaves=tmp_path / "out")
    assert "None" not in line
    assert "host 'dr' has not been evaluated" in line


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("data/extract/b", "b"),
        ("data/extract/b/", "b"),
        ("b", "b"),
        ("s3://bucket/caches/b", "b"),
        ("https://host/caches/b?token=x/y", "b"),
        ("dvc+https://host/lab.git@v1#data/extract/b", "b"),
        ("http://ann[secret:x]y@127.0.0.1:1/b", "b"),
        ("dvc+git@host:lab/x.git#data/extract/b", "b"),
    ],
)
def test_the_name_in_a_location(location, name):
    assert folder_name(location) == name

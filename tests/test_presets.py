"""Every preset is complete and passes the check that stands before every stage."""

import pytest
import yaml
from pipeline_builders import ROOT, accepted

from h2t.pipeline.base import params
from h2t.pipeline.inspection import settings
from h2t.pipeline.stages import inputs, prepare, train_backbone, train_classifier

PRESETS = sorted((ROOT / "presets").glob("*.yaml"))
PAPER = {f"cifar{c}-{r}" for c in (10, 100) for r in (200, 100, 50)} | {
    "imagenet_lt-256",
    "inaturalist18-500",
    "places_lt-996",
}


def test_every_setting_of_the_papers_tables_has_a_preset():
    assert {p.stem for p in PRESETS} >= PAPER
    text = (ROOT / "presets/README.md").read_text(encoding="utf-8")
    for name in PAPER:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_a_preset_is_complete_and_valid(path):
    values = params.load(path)
    assert (
        not set(params.load(ROOT / "params.yaml")) - set(values) - {"device", "inputs"}
    )  # dvc.yaml watches these sections
    for entry in values["hosts"].values():
        assert {"host", "backbone"} <= set(entry)  # dvc.yaml names them
    for entry in values["backbones"].values():
        assert {"arch", "objective"} <= set(entry)
    settings.check(values)
    inputs.check(values, ROOT)


@pytest.mark.parametrize("path", [*PRESETS, *(ROOT / "presets" / "analyses").glob("*.yaml")], ids=lambda p: p.stem)
def test_a_preset_has_no_anchors(path):
    """`dvc exp run -S` ignores a key that an alias stands for, without a word."""
    assert not [t for t in yaml.scan(path.read_text(encoding="utf-8")) if isinstance(t, yaml.AnchorToken)]


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_preset_of_the_paper_says_what_the_published_codes_say(name):
    values = params.load(ROOT / "presets" / f"{name}.yaml")
    settings.check(values)
    hosts = {n: params.build(train_classifier.Params, f"hosts.{n}", h) for n, h in values["hosts"].items()}
    first = params.build(train_backbone.Params, "backbones.ce_mixup", values["backbones"]["ce_mixup"])
    recipe = {
        "cifar": ("resnet32", 200, 128, 1.0, 2e-4),
        "imagenet": ("resnet50", 180, 256, 0.2, 5e-4),
        "inaturalist": ("resnet50", 200, 256, 0.2, 1e-4),
        "places": ("resnet152", 90, 256, 0.2, 5e-4),
    }
    wanted = next(v for k, v in recipe.items() if name.startswith(k))
    assert (first.arch, first.epochs, first.batch_size, first.mixup, first.weight_decay) == wanted
    dr = hosts["dr"]
    assert (dr.optimiser.lr, dr.optimiser.epochs, dr.batchnorm) == (0.02, 10, "branchwise")
    assert {0.0, 0.3} <= set(dr.grid.ratio)
    if name.startswith("cifar"):
        imbalance = params.build(prepare.Params, "prepare", values["prepare"]).imbalance
        assert imbalance.model_dump() == {"profile": "exponential", "ratio": float(name.split("-")[1]), "seed": 0}


@pytest.mark.parametrize("name", sorted(PAPER))
def test_stage_one_of_ride_and_reslt_is_that_of_their_authors(name):
    values = params.load(ROOT / "presets" / f"{name}.yaml")
    settings.check(values)
    reslt = values["backbones"]["reslt"]
    groups = {"cifar10-": [2, 4], "cifar100": [35, 70], "imagenet": [175, 780], "inatural": [1542], "places_l": None}
    assert reslt.get("loss", {}).get("groups") == groups[name[:8]]
    assert values["hosts"]["reslt"].get("loss", {}).get("groups") == groups[name[:8]]
    if not name.startswith("places"):
        assert reslt.get("mixup", 0) == 0
    if name.startswith("cifar"):
        assert (reslt["nesterov"], reslt["drop_last"], reslt["warmup_from"]) == (True, True, pytest.approx(1 / 3))
    if name.startswith("cifar100"):
        assert values["backbones"]["ride"]["rotation"] == 15
    for name, entry in values["hosts"].items():
        ratios = params.build(train_classifier.Params, f"hosts.{name}", entry).grid.ratio
        assert ratios == [0.0] or 0.25 in ratios


def test_the_command_lists_them():
    said = accepted("presets")
    for name in PAPER:
        assert name in said

"""The online reference of stage II: the heads of the cache when features are the same; moving statistics otherwise."""

import json

import pytest
import torch
from pipeline_builders import (
    distance,
    evaluated,
    extracted,
    fitted,
    make_backbone_dir,
    make_prepare,
    make_samples,
    write_params,
)
from safetensors.torch import load_file

from benchmarks import online_h2t

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    samples, images = make_samples(folder / "prepare")
    make_backbone_dir(folder / "train_backbone" / "ce_mixup")
    return folder, samples, images


def test_frozen_and_unaugmented_it_is_stage_two_on_a_cache(tmp_path, data, monkeypatch):
    monkeypatch.setattr(online_h2t, "BATCH", 32)  # several steps an epoch, the last one smaller
    folder, samples, images = data
    backbone = folder / "train_backbone" / "ce_mixup"
    found = online_h2t.train(samples, images, backbone, 0.3, 3, frozen=True, unaugmented=True)
    extracted(tmp_path / "cache", samples, images, backbone, batchnorm=["stage1"])
    settings = {
        "batchnorm": "stage1",
        "optimiser": {"epochs": online_h2t.EPOCHS, "batch_size": online_h2t.BATCH},
        "grid": {"ratio": [0.3], "seed": [3]},
    }
    ours = fitted(tmp_path / "heads", tmp_path / "cache", backbone, **settings)
    for name in ("weight", "bias"):
        assert distance(ours[name][0, 0], found["state"][f"head.{name}"]) < 1e-4
    figures = evaluated(tmp_path / "evaluate", tmp_path / "cache", tmp_path / "heads", backbone)["with_h2t"]
    for name in ("top1", "head", "medium", "tail"):
        assert found["figures"][name] == pytest.approx(figures[name], abs=0.3)  # one digit in 400 may tip over


def test_batch_statistics_move_and_weights_do_not(data, monkeypatch):
    folder, samples, images = data
    monkeypatch.setattr(online_h2t, "EPOCHS", 1)
    before = load_file(folder / "train_backbone" / "ce_mixup" / "backbone.safetensors")
    with_donors, without = (
        online_h2t.train(samples, images, folder / "train_backbone" / "ce_mixup", ratio, 0) for ratio in (0.3, 0.0)
    )
    moved = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert all(not torch.equal(with_donors["state"][name], before[name]) for name in moved)
    assert not torch.equal(with_donors["state"]["bn1.running_mean"], without["state"]["bn1.running_mean"])
    assert set(with_donors["state"]) == {*moved, "head.weight", "head.bias"}
    after = load_file(folder / "train_backbone" / "ce_mixup" / "backbone.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_finished_seed_is_left_alone(tmp_path, data, monkeypatch, capsys):
    folder, _, _ = data
    monkeypatch.setattr(online_h2t, "EPOCHS", 1)
    file = write_params(tmp_path / "params.yaml", prepare=make_prepare().model_dump())
    given = ["--data", folder, "--params", file, "--seeds", 0, "--unaugmented"]
    monkeypatch.setattr("sys.argv", ["online_h2t", *map(str, given)])
    online_h2t.main()
    out = folder / "online" / "ratio-0.3-seed-0-unaugmented.json"
    body = json.loads(out.read_text())
    assert body["unaugmented"] is True
    assert body["frozen"] is False
    assert str(folder) not in out.read_text()
    assert {"images", "backbone", "head", "evaluation"} == set(body["parts"]["cpu"])
    capsys.readouterr()
    online_h2t.main()
    assert "done before" in capsys.readouterr().out

"""Extraction in halves: near float32, guarded against overflow row by row, named in what must be equal to go on."""

import shutil

import numpy as np
import pytest
import torch
import torchvision
from builders import raises
from pipeline_builders import CPU, extracted, make_extract
from torch import nn
from torch.func import functional_call

from h2t.cache.reader import open_cache
from h2t.pipeline.base.precision import converted_weights, guarded_maps
from h2t.pipeline.inspection.recompute import recompute
from h2t.pipeline.inspection.why import why

OWN = {"batchnorm": ["stage1"]}  # processors compute halves slowly


@pytest.fixture(scope="module")
def full(tmp_path_factory, digits, backbone_dir):
    """The digits' maps in float32."""
    out = tmp_path_factory.mktemp("full") / "b"
    extracted(out, *digits, backbone_dir, **OWN)
    return out


def maps_of(path):
    with open_cache(path) as cache:
        return cache.read(range(cache.spec.rows)).astype(np.float32), cache.spec


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 0.05), ("fp16", 0.01)])
def test_maps_stay_near_those_of_float32(tmp_path, digits, backbone_dir, full, precision, bound):
    extracted(tmp_path / "half", *digits, backbone_dir, precision=precision, **OWN)
    (exact, spec), (half, spec_half) = maps_of(full), maps_of(tmp_path / "half")
    off = np.abs(exact - half).max() / np.abs(exact).max()
    assert 0 < off < bound
    assert spec_half.provenance["precision"] == precision
    assert spec.fingerprint == spec_half.fingerprint  # what was computed, not how exactly

    with open_cache(tmp_path / "half") as cache:
        found = recompute(cache, *digits, backbone_dir, 20, 0, CPU)
    assert (found.same_bits, found.faults) == (20, [])


def test_rows_of_another_precision_are_not_taken(tmp_path, digits, backbone_dir, full):
    lines = []
    summary = extracted(
        tmp_path / "half", *digits, backbone_dir, previous=full, precision="bf16", say=lines.append, **OWN
    )
    assert summary.taken == 0
    assert any("precision" in line for line in lines)


def test_a_cache_of_another_precision_is_not_the_one_asked_for(tmp_path, digits, backbone_dir, full):
    shutil.copytree(full, tmp_path / "c")
    with raises("exists"):
        extracted(tmp_path / "c", *digits, backbone_dir, precision="bf16", **OWN)
    with open_cache(tmp_path / "c") as cache:
        samples = digits[0]
        lines = why(cache, make_extract(precision="bf16", **OWN), samples, backbone_dir, 0).lines()
        assert any(line.startswith("precision: float32 -> bf16") for line in lines), lines
        assert not any(
            "precision" in line for line in why(cache, make_extract(**OWN), samples, backbone_dir, 0).lines()
        )
    assert extracted(tmp_path / "c", *digits, backbone_dir, precision="bf16", replace=True, **OWN).forwarded > 0


class Growing(nn.Module):
    """A convolution whose sums leave float16 for bright images: 900 times the pixels' sum, over 64 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(64, 4, 1, bias=False)
        nn.init.constant_(self.layer.weight, 900.0)

    def forward(self, x):
        return (self.layer(x),)


@torch.no_grad()
def test_an_image_that_overflows_is_computed_in_float32_and_no_other_is():
    torch.manual_seed(0)
    backbone, x = Growing(), torch.rand(6, 64, 3, 3)
    x[[1, 4]] *= 10  # about 900 * 10 * 32: beyond 65504
    (alone,) = guarded_maps(backbone, x[[0, 2, 3, 5]], "fp16")
    (mixed,) = guarded_maps(backbone, x, "fp16")
    (whole,) = backbone(x)
    assert mixed.isfinite().all()
    assert torch.equal(mixed[[1, 4]], whole[[1, 4]])
    assert torch.equal(mixed[[0, 2, 3, 5]], alone)
    assert not torch.equal(alone, whole[[0, 2, 3, 5]])


@torch.no_grad()
def test_infinity_of_the_backbone_itself_stays():
    x = torch.full((1, 64, 1, 1), float("inf"))
    assert not guarded_maps(Growing(), x, "fp16")[0].isfinite().any()


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_weights_that_are_converted_once_give_the_same_bits(name):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name).eval().requires_grad_(False)
    stored = {key: value.clone() for key, value in network.state_dict().items()}
    weights = converted_weights(network, "bf16")
    assert len(weights) > 20
    assert all(w.dtype == torch.bfloat16 for w in weights.values())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        (plain,) = guarded_maps(lambda x: (network(x),), x, "bf16")
        (once,) = guarded_maps(lambda x: (functional_call(network, weights, (x,)),), x, "bf16")
    assert torch.equal(plain, once)
    assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())
    assert converted_weights(network, "float32") == {}


def test_layers_that_share_a_parameter_share_its_converted_copy():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    network[1].weight = network[0].weight
    x = torch.randn(2, 4)
    weights = converted_weights(network, "bf16")
    (plain,) = guarded_maps(lambda x: (network(x),), x, "bf16")
    (once,) = guarded_maps(lambda x: (functional_call(network, weights, (x,)),), x, "bf16")
    assert torch.equal(plain, once)
    assert converted_weights(network, "fp16") == {}

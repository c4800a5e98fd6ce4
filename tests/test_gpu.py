"""What only a GPU shows; skipped without one. Results are compared with those of the CPU, which other tests check."""

import shutil

import numpy as np
import pytest
import torch
from pipeline_builders import distance, extracted, fitted, write_params
from pipeline_builders import h2t as command

from benchmarks import online_h2t
from h2t.cache.reader import open_cache
from h2t.pipeline.backbones import resnet20
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import silent
from h2t.pipeline.data.images import Transform
from h2t.pipeline.data.resident_images import ResidentImages
from h2t.pipeline.extraction.on_gpu import GpuPasses
from h2t.pipeline.inspection.recompute import recompute
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import load_weights, save_weights
from h2t.pipeline.training.loop import StageOne
from h2t.pipeline.training.parallel import Group
from h2t.pipeline.training.resume import Checkpoint
from h2t.pipeline.training.settings import Training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
DTYPES = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-4}  # allowed differences: roundings, other sums


@pytest.fixture(scope="module")
def device():
    return devices.choose(DEVICE)


def maps_of(path) -> torch.Tensor:
    """All maps of a cache, float32."""
    with open_cache(path) as cache:
        found = torch.from_numpy(cache.read(np.arange(cache.spec.rows)))
        return (found.view(torch.bfloat16) if cache.spec.dtype == "bfloat16" else found).float()


def spoilt(folder, backbone_dir, scale: float):
    """The backbone with maps that are larger by `scale`."""
    state, about = load_weights(backbone_dir / "backbone.safetensors")
    state["layer3.2.bn2.weight"].fill_(scale)
    shutil.copytree(backbone_dir, folder)
    save_weights(folder / "backbone.safetensors", state, about)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_are_those_of_the_cpu(tmp_path, digits, backbone_dir, device, dtype):
    """Statistics from one cache, so that both forward passes see the same ones."""
    extracted(tmp_path / "cpu", *digits, backbone_dir, dtype=dtype)
    found = []
    for name in ("gpu", "again"):
        previous = {"previous": tmp_path / "cpu", "anew": True}
        summary = extracted(tmp_path / name, *digits, backbone_dir, dtype=dtype, device=device, **previous)
        assert summary.forwarded == summary.rows
        assert summary.forward_seconds > 0
        found.append(maps_of(tmp_path / name))
    assert distance(found[0], maps_of(tmp_path / "cpu")) < DTYPES[dtype]
    assert distance(found[1], found[0]) < DTYPES[dtype] / 10


def test_what_the_storage_cannot_hold_is_refused(tmp_path, digits, backbone_dir, device):
    backbone = spoilt(tmp_path / "b", backbone_dir, 1e5)
    with pytest.raises(UserError, match=r"^extract\.dtype: float16 holds values up to 65504; got \d+; use bfloat16"):
        extracted(tmp_path / "c", *digits, backbone, batchnorm=["stage1"], dtype="float16", device=device)
    assert not (tmp_path / "c").exists()


def test_half_precision_leaves_no_gap(tmp_path, digits, backbone_dir, device):
    extracted(tmp_path / "cpu", *digits, backbone_dir, batchnorm=["stage1"])
    for precision, bound in (("bf16", 0.05), ("fp16", 0.01)):
        extracted(tmp_path / precision, *digits, backbone_dir, batchnorm=["stage1"], precision=precision, device=device)
        found = maps_of(tmp_path / precision)
        assert found.isfinite().all()
        assert 0 < distance(found, maps_of(tmp_path / "cpu")) < bound


def test_rows_of_half_precision_are_recomputed_to_the_same_bits(tmp_path, digits, backbone_dir, device):
    extracted(tmp_path / "c", *digits, backbone_dir, batchnorm=["stage1"], precision="bf16", device=device)
    with open_cache(tmp_path / "c") as cache:
        found = recompute(cache, *digits, backbone_dir, 40, 0, device)
    assert (found.same_bits, found.faults) == (found.rows, [])


class Waits(torch.nn.Module):
    """A network that waits for the GPU, so that no pass of it can be a CUDA graph: by its values, or by `wait`."""

    def __init__(self, backbone, wait=None):
        super().__init__()
        self.backbone, self.wait = backbone, wait

    def forward(self, x):
        if self.wait:
            self.wait()
            return self.backbone(x)
        return self.backbone(x) if x.abs().amax().item() >= 0 else ()


def test_captured_passes_change_nothing(backbone_dir, device):
    backbone, _ = load_backbone(backbone_dir)
    backbone.to(device).eval()
    transform = Transform(size=32, mean=[0.5] * 3, std=[0.5] * 3)
    pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, captured = [], []
    for net in (backbone, Waits(backbone), Waits(backbone, torch.cuda.synchronize)):
        passes = GpuPasses(net, device, transform, "bf16", torch.float16)
        rooms, launched = [], []
        for flipped in (False, True):
            batch = (pixels.flip(0) if flipped else pixels).pin_memory()
            room = torch.empty(4, *backbone(torch.zeros(1, 3, 32, 32, device=device))[0].shape[1:], dtype=torch.float16)
            rooms.append(room.pin_memory())
            launched.append(passes.launch(batch, slice(2, 6), [(slice(0, 4), [rooms[-1]])]))
        assert all(one.wait() > 0 for one in launched)
        assert launched[0].largest == launched[1].largest > 0
        assert torch.equal(rooms[0], rooms[1].flip(0))
        found.append(rooms[0])
        captured.append(passes.captured)
        assert not passes.captured or passes._weights  # the graph that reads converted weights
    assert captured == [True, False, False]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("pooled", [True, False])
def test_heads_of_every_tier_are_those_of_the_cpu(tmp_path, digits_cache, backbone_dir, device, pooled):
    expected = fitted(tmp_path / "cpu", digits_cache, backbone_dir, pooled=pooled)
    with open_cache(digits_cache) as cache:
        budget = cache.spec.value_bytes // (256 if pooled else 4)
    for tier in ("device", "memory", "stream"):
        said = []
        settings = {"residency": tier, "memory_bytes": budget}
        found = fitted(
            tmp_path / tier,
            digits_cache,
            backbone_dir,
            pooled=pooled,
            device=device,
            residency=settings,
            say=said.append,
        )
        place = {"device": "on the device", "memory": "in memory", "stream": "streamed"}[tier]
        assert any(f"features {place}" in line for line in said)
        for name, heads in expected.items():
            assert distance(found[name], heads) < 1e-3, (tier, name)


def test_the_pipeline_from_end_to_end(tmp_path):
    """Every stage that computes, on the GPU, by its command."""
    write_params(tmp_path / "params.yaml", device=DEVICE)
    for arguments in (
        ("prepare", "prepare"),
        ("train-backbone", "ce_mixup", "prepare", "b"),
        ("extract", "ce_mixup", "prepare", "b", "c"),
        ("train-classifier", "dr", "c", "b", "heads"),
        ("evaluate", "dr", "c", "heads", "b", "evaluate/dr"),
    ):
        done = command(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = command("cache", "verify", "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def stage_one(digits, device, folder, capture=True):
    """(curves, weights) of two epochs of a small network."""
    samples, images = digits
    torch.manual_seed(0)
    net = resnet20.build(resnet20.Options())
    objective = plugins.load("objectives", "ce")
    head = objective.Objective(objective.Loss(), net.channels, 1, torch.tensor(samples.counts))
    settings = Training(epochs=2, batch_size=64, mixup=1.0, warmup_epochs=0, milestones=[1])
    training = StageOne(settings, net, head, samples, images, 0, Group(device, 0, 1))
    if not capture:
        training._may_capture = lambda: False
    curves = training.run("b", Checkpoint(folder, "token", seconds=1e9), silent)
    assert isinstance(training._images, ResidentImages) == (device.type == "cuda")
    return curves, {name: value.cpu() for name, value in net.state_dict().items()}


def test_stage_one_is_that_of_the_cpu_and_captured_steps_change_nothing(tmp_path, digits, device):
    curves, weights = stage_one(digits, device, tmp_path / "captured")
    plain, same = stage_one(digits, device, tmp_path / "plain", capture=False)
    assert curves == plain
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name
    expected, _ = stage_one(digits, torch.device("cpu"), tmp_path / "cpu")
    assert curves[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-3)


@pytest.mark.parametrize("unaugmented", [False, True])
def test_the_online_reference_is_that_of_the_cpu(digits, backbone_dir, device, monkeypatch, unaugmented):
    monkeypatch.setattr(online_h2t, "EPOCHS", 1)
    cpu, gpu = (
        online_h2t.train(*digits, backbone_dir, 0.3, 3, unaugmented=unaugmented, where=where)
        for where in (online_h2t.CPU, device)
    )
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-3)
    for name, value in cpu["state"].items():
        assert distance(gpu["state"][name], value) < 1e-3, name

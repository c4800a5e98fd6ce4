"""Backbones for large images: torchvision's key names, experts, the frozen trunk, taps that are found and checked."""

import pytest
import torch
import yaml
from PIL import Image
from pipeline_builders import make_samples, one_line
from sklearn.datasets import load_sample_images
from torchvision.models import get_model, get_model_weights

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.transforms import IMAGENET
from h2t.pipeline.data.views import for_evaluation, normalised, transform_for
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.stages import train_backbone


def make_backbone(name, **options):
    module = plugins.load("backbones", name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return module.build(build(module.Options, "options", options))


def randomise(net):
    """Batch-norm statistics that are not the initial ones."""
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return net


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("resnet50", "resnet50", {}),
        ("resnext50", "resnext50_32x4d", {}),
        ("resnet152", "resnet152", {}),
        ("resnet152", "resnet152", {"trained": "all"}),
    ],
)
def test_one_expert_is_torchvisions_network(name, theirs, options):
    net, reference = randomise(make_backbone(name, **options)).eval(), get_model(theirs, weights=None).eval()
    state = net.state_dict()
    assert set(state) == {k for k in reference.state_dict() if not k.startswith("fc.")}
    reference.load_state_dict(state, strict=False)
    found = {}
    reference.layer4.register_forward_hook(lambda module, x, out: found.update(maps=out))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (maps,) = net(x)
        logits = reference(x)
        assert maps.shape == (1, net.channels, 2, 2)
        assert torch.equal(maps, found["maps"])
        assert torch.allclose(reference.fc(maps.mean((2, 3))), logits, rtol=1e-4, atol=1e-5)
        assert (maps >= 0).all()
        assert torch.equal(net(x)[0], maps)


@pytest.mark.parametrize(("name", "shared"), [("resnet50", "layer2"), ("resnext50", "layer2"), ("resnet152", "layer4")])
def test_experts_share_the_trunk_and_own_the_rest(name, shared):
    net = make_backbone(name, experts=3).eval()
    assert net.experts == 3
    with torch.no_grad():
        maps = net(torch.randn(2, 3, 64, 64))
    assert [m.shape for m in maps] == [(2, 2048, 2, 2)] * 3
    assert all((m >= 0).all() for m in maps)
    assert not torch.allclose(maps[0], maps[1])
    own = "blocks" if name == "resnet152" else "layer3s"
    assert {k.split(".")[1] for k in net.state_dict() if k.startswith(own)} == {"0", "1", "2"}
    assert any(k.startswith(f"{shared}.") for k in net.state_dict())


@pytest.mark.parametrize("experts", [1, 2])
def test_only_the_last_block_of_resnet152_trains(experts):
    net = make_backbone("resnet152", experts=experts)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    assert not net.layer1.training
    assert not net.bn1.training
    loss = sum(m.sum() for m in net(torch.randn(2, 3, 32, 32)))
    loss.backward()
    new = ("layer4.2.",) if experts == 1 else ("blocks.",)
    trained = {k for k, p in net.named_parameters() if p.requires_grad}
    assert trained == {k for k, _ in net.named_parameters() if k.startswith(new)}
    assert {k for k, p in net.named_parameters() if p.grad is not None} == trained
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, start[k])}
    assert changed
    assert all(k.startswith(new) for k in changed)  # the batch norms of the new blocks, and no others
    net.eval()
    assert not any(m.training for m in net.modules())


def test_statistics_of_a_frozen_trunk_are_not_estimated_anew(tmp_path):
    class Halves(torch.nn.Module):
        channels, experts = 4, 1

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 1)
            self.frozen, self.live = torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(4)

        def train(self, mode=True):
            super().train(mode)
            self.frozen.eval()
            return self

        def forward(self, x):
            return (self.live(self.frozen(self.conv(x))).relu(),)

    samples, images = make_samples(tmp_path / "p")
    net = randomise(Halves()).eval()
    before = batchnorm.current(net)
    found = batchnorm.estimate(
        net, ("balanced",), samples, images, passes=2, seed=0, device=torch.device("cpu"), name="balanced"
    )
    for kind in ("running_mean", "running_var"):
        assert torch.equal(found[f"frozen.{kind}"], before[f"frozen.{kind}"])
        assert not torch.equal(found[f"live.{kind}"], before[f"live.{kind}"])
    assert not any(m.training for m in net.modules())
    assert net.live.momentum == 0.1


# --- any classification model of torchvision


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_the_tap_of_a_torchvision_model_is_found_and_right(name):
    reference = randomise(get_model(name, weights=None)).eval()
    net = make_backbone("torchvision", model=name)
    state = {k: v for k, v in reference.state_dict().items() if k in net.state_dict()}
    net.load_state_dict(state)
    net.eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        (maps,) = net(x)
        head = [m for m in reference.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert maps.shape[1] == net.channels == head.in_features
        assert maps.shape[2:] == (2, 2)
        logits = head(maps.mean((2, 3)))
        assert torch.allclose(logits, reference(x), rtol=1e-3, atol=1e-5)
        assert torch.equal(net(x)[0], maps)
    assert set(dict(net.named_parameters())) < set(dict(reference.named_parameters()))
    net.train()
    assert all(m.training for m in net.modules())
    net(x)[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "between", "why"),
    [
        ("mobilenet_v3_small", ["linear", "hardswish"], ""),
        ("convnext_tiny", ["layer_norm"], ""),
        ("vgg11", [], "between its maps and its logits lie classifier.0 (Linear)"),
    ],
)
def test_what_follows_the_maps_is_found_or_named(name, between, why):
    net = make_backbone("torchvision", model=name)
    assert [layer.kind for layer in net.after_pool()] == between
    assert net.ending.why.startswith(why)
    assert bool(net.ending.classifier) == (not why)


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(UserError, match="got 'resnet81'; did you mean 'resnet18'"):
        make_backbone("torchvision", model="resnet81")


def test_pretrained_weights_offline_are_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    module = plugins.load("backbones", "resnet152")
    with one_line(match=r"resnet152-394f9c45\.pth|resnet152-b121ed2d\.pth"):
        module.weights(module.Options())
    module = plugins.load("backbones", "resnet50")
    with pytest.raises(UserError, match="must go to a network of 1 expert; got 3"):
        module.weights(module.Options(experts=3))


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b1", "inception_v3", "swin_v2_t"])
def test_torchvisions_own_preprocessing_is_known(name):
    module = plugins.load("backbones", "torchvision")
    theirs = get_model_weights(name).DEFAULT.transforms()
    transform = transform_for(IMAGENET, module.made_for(module.Options(model=name)))
    photograph = load_sample_images().images[0]
    ours = normalised(torch.from_numpy(for_evaluation(photograph, transform)[None].copy()), transform)[0]
    off = (ours - theirs(Image.fromarray(photograph))) * torch.tensor(transform.std)[:, None, None]
    assert off.abs().max() <= 1 / 255


def test_pretrained_weights_on_images_that_are_prepared_in_another_way_get_a_note(tmp_path, monkeypatch):
    name, said = "shufflenet_v2_x0_5", []
    state = get_model(name, weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    samples, images = make_samples(tmp_path / "p")
    values = {"arch": "torchvision", "options": {"model": name}, "objective": "ce", "weights": "pretrained"}
    train_backbone.run(train_backbone.Params(**values), Run("b", tmp_path / "b", say=said.append), samples, images)
    (note,) = [line for line in said if "made for images of" in line]
    assert "made for images of size 224 (here 8), resize 256 (here None)" in note
    values["input"] = yaml.safe_load(note.partition("backbones.b.input: ")[2])
    said.clear()
    train_backbone.run(train_backbone.Params(**values), Run("b", tmp_path / "c", say=said.append), samples, images)
    assert not [line for line in said if "made for images of" in line]

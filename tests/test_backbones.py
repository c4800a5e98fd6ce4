import pytest
import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import save_weights, weights_digest


def make_backbone(name, seed=0, **options):
    module = plugins.load("backbones", name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module.build(build(module.Options, "options", options))


SMALL = [n for n in plugins.names("backbones") if n in ("resnet20", "resnet32")]


def test_there_are_backbones():
    assert {"resnet20", "resnet32"} <= set(plugins.names("backbones"))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_maps_of_every_expert(name, experts):
    net = make_backbone(name, experts=experts).eval()
    assert isinstance(net, Backbone)
    assert net.experts == experts
    assert net.fresh == ()
    for size in (8, 32):
        maps = net(torch.randn(2, 3, size, size))
        assert isinstance(maps, tuple)
        assert [m.shape for m in maps] == [(2, net.channels, size // 4, size // 4)] * experts
        assert all((m >= 0).all() for m in maps)
    if experts > 1:
        assert not torch.allclose(maps[0], maps[1])


@pytest.mark.parametrize("name", SMALL)
def test_a_row_does_not_depend_on_its_neighbours_and_weights_on_the_seed_only(name):
    net = make_backbone(name).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(net(x)[0][1:2], net(x[1:2])[0], rtol=1e-4, atol=1e-4)
    again, other = make_backbone(name), make_backbone(name, seed=1)
    assert torch.equal(net.conv1.weight, again.conv1.weight)
    assert not torch.equal(net.conv1.weight, other.conv1.weight)


def test_parameters_of_resnet32():
    assert sum(p.numel() for p in make_backbone("resnet32").parameters()) == 463_504


def test_branches_may_share_everything_but_the_last_block():
    """ResNet-32 with one more block, as published for BBN."""
    net = make_backbone("resnet32", experts=2, fork="last_block")
    extra = sum(p.numel() for p in net.blocks[1].parameters())
    assert sum(p.numel() for p in net.parameters()) == 463_504 + extra
    assert extra == 2 * (64 * 64 * 9 + 2 * 64)
    maps = net(torch.randn(2, 3, 8, 8))
    assert [m.shape for m in maps] == [(2, 64, 2, 2)] * 2
    maps[0].sum().backward()
    assert net.layer3[-1].conv1.weight.grad is not None
    assert net.blocks[0].conv1.weight.grad is not None
    assert net.blocks[1].conv1.weight.grad is None
    plain, fork = (make_backbone("resnet20", fork=f).state_dict() for f in ("layer2", "last_block"))
    assert list(plain) == list(fork)


@pytest.mark.parametrize("options", [{}, {"experts": 2}, {"experts": 2, "fork": "last_block"}])
def test_a_branch_alone_gives_its_map(options):
    net, x = make_backbone("resnet20", **options).eval(), torch.randn(2, 3, 8, 8)
    for expert, found in enumerate(net(x)):
        assert torch.allclose(net.alone(x, expert), found, atol=1e-6)


def test_experts_share_the_first_layer_and_own_the_rest():
    net = make_backbone("resnet20", experts=3)
    loss = net(torch.randn(2, 3, 8, 8))[0].sum()
    loss.backward()
    assert net.conv1.weight.grad is not None
    assert net.layer2s[0][0].conv1.weight.grad is not None
    assert net.layer2s[1][0].conv1.weight.grad is None


REPLACING = '''"""Mine: a layer, while whose building another file takes the place of its weights."""
from pathlib import Path
from torch import nn
from h2t.pipeline.base.params import Section
class Options(Section):
    folder: str
class Mine(nn.Linear):
    channels, experts = 2, 1
def build(options):
    Path(options.folder, "other").replace(Path(options.folder, "backbone.safetensors"))
    return Mine(2, 2)
'''


def test_the_digest_of_a_backbone_is_that_of_the_weights_it_has(tmp_path, monkeypatch):
    """The digest is taken beside the building of the network, which gives time to replace the file."""
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones/mine.py").write_text(REPLACING)
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    about = {"arch": "mine", "options": {"folder": str(tmp_path)}}
    for name, value in (("backbone.safetensors", 1.0), ("other", 2.0)):
        save_weights(tmp_path / name, {"weight": torch.full((2, 2), value), "bias": torch.zeros(2)}, about)
    backbone, identity = load_backbone(tmp_path)
    assert not (tmp_path / "other").exists()
    assert identity["weights"] == weights_digest(backbone.state_dict())
    assert backbone.weight[0, 0] == 1

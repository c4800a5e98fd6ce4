"""The frozen part of a head: layers found in modules, in and out of files, applied after fusion and pooling."""

import pytest
import torch
from conformance import make_host
from pipeline_builders import one_line
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from h2t.pipeline.heads.features import load_pool
from h2t.pipeline.heads.fusion import fuse
from h2t.pipeline.heads.head import Head
from h2t.pipeline.networks.frozen import FrozenPart, Layer, from_file, kinds_of, layer

C, D = 20, 12


def randomised(module: nn.Module) -> nn.Module:
    draws = torch.Generator().manual_seed(2)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=draws) + 0.1
    return module.eval().requires_grad_(False)


MODULES = [
    (nn.LayerNorm(C, eps=1e-6), "layer_norm"),
    (nn.LayerNorm(C, elementwise_affine=False), "layer_norm"),
    (LayerNorm2d(C), "layer_norm"),
    (nn.RMSNorm(C, eps=1e-5), "rms_norm"),
    (nn.Linear(C, D), "linear"),
    (nn.Conv2d(C, D, 1, bias=False), "linear"),
    (nn.BatchNorm1d(C), "affine"),
    (nn.BatchNorm2d(C, affine=False), "affine"),
    (nn.GELU(), "gelu"),
    (nn.GELU("tanh"), "gelu_tanh"),
    (nn.Hardswish(), "hardswish"),
    (nn.Tanh(), "tanh"),
    (nn.SiLU(), "silu"),
    (nn.ReLU(), "relu"),
]


@pytest.mark.parametrize(("module", "kind"), MODULES, ids=lambda one: one if isinstance(one, str) else "")
def test_a_layer_computes_what_its_module_does(module, kind):
    module = randomised(module)
    spatial = isinstance(module, nn.Conv2d | nn.BatchNorm2d | LayerNorm2d)

    def apply(x):
        return module(x[..., None, None] if spatial else x).flatten(1)

    x, other = torch.randn(2, 8, C, generator=torch.Generator().manual_seed(0)) * 3
    assert kinds_of(module, x, apply(x)) == (kind,)
    part = FrozenPart((layer(kind, module),))
    torch.testing.assert_close(part(other), apply(other), rtol=1e-5, atol=1e-5)
    assert part.outputs(C) == part(other).shape[-1]
    tensors, described = part.to_file()
    others, again = from_file({"weight": x, **tensors}, {"frozen": described}, "file")
    assert list(others) == ["weight"]
    assert torch.equal(again(other), part(other))


def test_identity_is_no_layer_and_an_unknown_module_is_none():
    x = torch.randn(4, C)
    assert kinds_of(nn.Dropout().eval(), x, x) == ()
    assert kinds_of(nn.Softplus(), x, nn.Softplus()(x)) is None
    assert kinds_of(nn.Linear(C, C), x, x + 1) is None  # its output does not come from it alone
    assert kinds_of(nn.BatchNorm1d(C).eval(), x, x) == ("affine",)  # other statistics would make it no identity


def test_a_file_without_a_frozen_part_has_none():
    assert from_file({"weight": torch.ones(2)}, {}, "file")[1] is None


@pytest.mark.parametrize(
    ("tensors", "described", "says"),
    [
        ({"frozen.0.weight": torch.ones(C)}, None, "tensors of no layer"),
        ({}, [{"kind": "exec", "epsilon": 0.0}], "no layer 'exec'"),
        ({}, [{"kind": "linear", "epsilon": 0.0}], "linear has the wrong shape"),
        ({}, [{"kind": "relu"}], "epsilon"),
        ({}, 7, "not iterable"),
        ({"frozen.0.weight": torch.ones(C) / 0}, [{"kind": "affine", "epsilon": 0.0}], "NaN or infinity"),
        (
            {"frozen.0.weight": torch.ones(D, C), "frozen.1.weight": torch.ones(C)},
            [{"kind": "linear", "epsilon": 0.0}, {"kind": "layer_norm", "epsilon": 0.1}],
            "layer_norm has the wrong shape",
        ),
    ],
)
def test_a_malformed_frozen_part_is_refused_in_one_line(tensors, described, says):
    with one_line(match=f"head.safetensors: its frozen part is malformed.*{says}"):
        from_file(tensors, {"frozen": described}, "head.safetensors")


def test_fuse_then_pool_then_norm_then_classifier_is_what_a_head_computes():
    """On maps and on features that were pooled before fusion; normalising before fusion gives something else."""
    draws = torch.Generator().manual_seed(0)
    weight, bias = torch.rand(C, generator=draws).double(), torch.rand(C, generator=draws).double()
    norm = FrozenPart((Layer("layer_norm", weight, bias, 1e-6),))
    receivers, donors = torch.randn(2, 1, 6, C, 3, 2, generator=draws).double()
    mask = torch.rand(1, 1, C, 1, 1, generator=draws) < 0.4
    made = make_host("dr")
    head = Head(made.host, load_pool("gap", {}, "pool_options", C), norm)
    state = {k: t.double() for k, t in made.stage1.state.items()}

    fused = torch.where(mask, donors, receivers)
    pooled = fused.mean((-2, -1))
    normal = (pooled - pooled.mean(-1, keepdim=True)) / torch.sqrt(pooled.var(-1, correction=0, keepdim=True) + 1e-6)
    expected = ((normal * weight + bias) @ state["weight"].mT + state["bias"].unsqueeze(-2)).mean(0)
    torch.testing.assert_close(head.logits(state, fuse(receivers, donors, mask)), expected)
    vectors = fuse(receivers.mean((-2, -1)), donors.mean((-2, -1)), mask[..., 0, 0])
    torch.testing.assert_close(head.logits(state, vectors), expected)
    before = torch.where(mask[..., 0, 0], norm(donors.mean((-2, -1))), norm(receivers.mean((-2, -1))))
    assert not torch.allclose(Head(head.host, head.pool).logits(state, before), expected, rtol=1e-2)

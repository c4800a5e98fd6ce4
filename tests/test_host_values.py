"""Hosts on one small example: values and gradients computed by independent code, rounded to six digits."""

import numpy as np
import pytest
import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.heads.host import Context
from h2t.pipeline.networks.trained import StageOneHead

COUNTS = torch.tensor([100, 10, 1])
WEIGHT = torch.tensor([[0.5, -0.25], [0.1, 0.3], [-0.4, 0.2]], dtype=torch.float64)
BIAS = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
FEATURES = torch.tensor([[1, 2], [0.5, 0.25]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
STATE = {"weight": WEIGHT[None], "bias": BIAS[None]}


def made(name, **loss):
    module = plugins.load("hosts", name)
    return module.Host(module.Loss(**loss), "linear", 1.0, Context(COUNTS, 2, 1))


def loss_and_gradient(name, noise=None, **loss):
    """(loss, its gradient in the weights (K, D)) of the example."""
    weight = STATE["weight"].clone().requires_grad_()
    found = made(name, **loss).loss({**STATE, "weight": weight}, FEATURES[None], LABELS, noise)
    return found.item(), torch.autograd.grad(found, weight)[0][0].numpy()


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("dr", {}, 1.190922),
        ("balanced_softmax", {}, 2.533205),
        ("focal", {"gamma": 0.0}, 1.190922),
        ("focal", {"gamma": 1.0}, 0.840409),
        ("focal", {}, 0.602693),
        ("focal", {"form": "sigmoid"}, 0.664933),
        ("class_balanced", {"beta": 0.9}, 1.892065),
        ("class_balanced", {}, 2.028418),
        ("class_balanced", {"beta": 0.9, "base": "sigmoid_focal"}, 1.131474),
        ("class_balanced", {"base": "sigmoid_focal"}, 1.225777),
        ("class_balanced", {"base": "focal"}, 1.215652),
        ("influence_balanced", {}, 447.081453),
        ("influence_balanced", {"alpha": 1.0, "epsilon": 1e-12, "weights": "none"}, 0.663732),
        ("lade", {"penalty": 0.1}, 2.464212),
        ("lade", {}, 2.455598),
    ],
)
def test_the_loss_of_the_example(name, loss, expected):
    assert loss_and_gradient(name, **loss)[0] == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("focal", {}, [[0.039382, 0.250617], [0.348418, 0.594984], [-0.387800, -0.845602]]),
        ("focal", {"detach": True}, [[0.031377, 0.139455], [0.180650, 0.315843], [-0.212028, -0.455298]]),
        (
            "influence_balanced",
            {},
            [[43.543864, 89.655199], [83.475354, 165.429054], [-127.019218, -255.084252]],
        ),
        (
            "influence_balanced",
            {"detach": True},
            [[75.290568, 157.330257], [148.053478, 292.106978], [-223.344047, -449.437235]],
        ),
    ],
)
def test_the_gradient_of_the_example(name, loss, expected):
    """Whether it flows through the weight of a sample does not show in the loss."""
    assert loss_and_gradient(name, **loss)[1] == pytest.approx(np.array(expected), abs=6e-7)


@pytest.mark.parametrize(
    ("name", "share", "expected"),
    [
        ("manifold_mixup", 0.3, 1.250184),
        ("manifold_mixup", 1.0, 1.190922),
        ("remix", 0.3, 1.295372),
        ("remix", 0.7, 1.295372),
    ],
)
def test_mixing_the_two_samples_of_the_example(name, share, expected):
    noise = torch.tensor([[1, share], [0, share]], dtype=torch.float64)
    assert loss_and_gradient(name, noise)[0] == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(("share", "expected"), [(0.3, [0.3, 0]), (0.7, [1, 0.7])])
def test_remix_gives_the_label_to_the_rarer_class(share, expected):
    found = made("remix").label_share(torch.tensor([share, share]).double(), torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx(expected)


def test_sigmoid_focal_is_finite_for_large_logits():
    """Published code computes the weight by exp(-z), which overflows in float32."""
    state = {"weight": STATE["weight"].float() * 1000, "bias": STATE["bias"].float()}
    found = made("focal", form="sigmoid").loss(state, FEATURES[None].float(), LABELS, None)
    logits = FEATURES @ (WEIGHT * 1000).T + BIAS
    own = torch.nn.functional.one_hot(LABELS, 3)
    wrong = torch.where(own > 0, 1 - logits.sigmoid(), logits.sigmoid())
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, own.double(), reduction="none")
    assert found.item() == pytest.approx(float((cross * wrong**2).sum() / 2), rel=1e-5)


def test_the_shares_of_mixup_are_those_of_a_beta_distribution():
    host = made("manifold_mixup", alpha=0.4)
    drawn = [host.noise(np.random.default_rng(i), 5) for i in range(4000)]
    assert all(sorted(d[:, 0].tolist()) == list(range(5)) and len(set(d[:, 1].tolist())) == 1 for d in drawn)
    shares = np.array([float(d[0, 1]) for d in drawn])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)


def test_the_weights_that_httn_transfers():
    features = torch.tensor([[[1, 0.2], [0.3, 1], [0.6, 0.7]]], dtype=torch.float64)
    stage1 = StageOneHead(STATE, "linear", 1.0)
    state = made("httn", head_classes=2, ridge=1e-12).fit(features, torch.arange(3), stage1)
    assert state["weight"][0, 2].tolist() == pytest.approx([0.293317, 0.068674], abs=6e-7)
    assert torch.equal(state["weight"][0, :2], WEIGHT[:2])
    assert state["bias"][0].tolist() == pytest.approx([0.1, 0, 0.05])
    plain = made("httn", head_classes=2, ridge=1e-12, attention=False).fit(features, torch.arange(3), stage1)
    exact = torch.tensor([[0.520235, -0.051668], [-0.337865, 0.414569]], dtype=torch.float64)
    tail = torch.nn.functional.normalize(features[0, 2], dim=0)
    assert plain["weight"][0, 2].tolist() == pytest.approx((exact @ tail).tolist(), abs=2e-6)

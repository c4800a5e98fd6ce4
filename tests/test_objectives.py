import math

import numpy as np
import pytest
import torch
from conformance import COUNTS
from loss_references import (
    balanced_softmax_reference,
    ce_reference,
    class_balanced_reference,
    cosines_by_hand,
    focal_reference,
    influence_balanced_reference,
    logits_by_hand,
    minus_log_p,
    reslt_reference,
    weights_by_hand,
)

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.classifier import logits
from h2t.pipeline.objectives.ride import temperatures

CHANNELS = 6


def make_objective(name, experts=1, counts=COUNTS, seed=0, **loss):
    module = plugins.load("objectives", name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return module.Objective(module.Loss(**loss), CHANNELS, experts, torch.tensor(counts)).double()


def make_maps(experts=1, batch=7, seed=1):
    draws = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(batch, CHANNELS, 3, 2, generator=draws).double() for _ in range(experts))


LABELS = torch.tensor([0, 3, 1, 2, 2, 0, 1])


def margins_by_hand(largest=0.5):
    raw = [n**-0.25 for n in COUNTS]
    return [largest * r / max(raw) for r in raw]


# References: (objective, its state as arrays, features (E, B, D) or their two moments, epoch, noise) -> loss


def ldam_drw_reference(objective, s, x, epoch, noise):
    weights = weights_by_hand() if epoch >= 160 else [1.0] * len(COUNTS)
    total = norm = 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = cosines_by_hand(s["weight"], x[:, i])
        z[y] -= margins_by_hand()[y]
        total += weights[y] * minus_log_p([30 * v for v in z], y)
        norm += weights[y]
    return total / norm


def gcl_reference(objective, s, x, epoch, noise):
    high, low, total = math.log(max(COUNTS)), math.log(min(COUNTS)), 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = cosines_by_hand(s["weight"], x[:, i])
        for j, n in enumerate(COUNTS):
            e_ij = min(1.0, max(-1.0, float(noise[i, j]) / 3))
            z[j] -= 0.5 * abs(e_ij) * (high - math.log(n)) / (high - low)
        total += minus_log_p([30 * v for v in z], y)
    return total / len(LABELS)


def ride_reference(objective, s, x, epoch, noise):
    late, cosine = epoch >= 160, objective.classifier == "cosine"
    scale = 30 if cosine else 1

    def logits_of(e, i):
        w, one = s["weight"][e : e + 1], x[e : e + 1, i]
        return [
            scale * v for v in (cosines_by_hand(w, one) if cosine else logits_by_hand(w, s["bias"][e : e + 1], one))
        ]

    weights = weights_by_hand() if late else [1.0] * len(COUNTS)
    heat = [len(COUNTS) * 0.05 * n / sum(COUNTS) + 0.95 for n in COUNTS]
    heat = [t / max(heat) for t in heat] if late else [1.0] * len(COUNTS)
    square = (sum(heat) / len(heat)) ** 2
    total = 0.0
    for e in range(len(x)):
        loss = norm = apart = 0.0
        for i, y in enumerate(LABELS.tolist()):
            each = [logits_of(f, i) for f in range(len(x))]
            z = list(each[e])
            common = [sum(column) / len(x) / t for column, t in zip(zip(*each, strict=True), heat, strict=True)]
            own = [v / t for v, t in zip(z, heat, strict=True)]
            for j in range(len(z)):
                apart += math.exp(-minus_log_p(common, j)) * (minus_log_p(own, j) - minus_log_p(common, j))
            z[y] -= scale * margins_by_hand()[y]
            loss += weights[y] * minus_log_p(z, y)
            norm += weights[y]
        total += loss / norm - 0.45 * square * apart / len(LABELS)
    return total


def class_balanced(objective, s, x, epoch, noise):
    constants = objective.constants
    beta = constants.beta if epoch >= constants.start_epoch else 0
    return class_balanced_reference(s, x, LABELS.tolist(), noise, beta, constants.base, constants.gamma)


def influence_balanced(objective, s, x, epoch, noise):
    late = epoch >= objective.constants.start_epoch
    return (influence_balanced_reference if late else ce_reference)(s, x, LABELS.tolist(), noise)


def focal(objective, s, x, epoch, noise):
    return focal_reference(s, x, LABELS.tolist(), noise, objective.constants.gamma, objective.constants.form)


def bbn_reference(objective, s, x, epoch, noise):
    """Cross-entropy of W [f_1; f_2; ...] + b: one classifier on the features of all branches."""
    whole, total = np.concatenate(list(s["weight"]), 1), 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = whole @ np.concatenate(list(x[:, i])) + s["bias"][0]
        total += minus_log_p(z.tolist(), y)
    return total / len(LABELS)


REFERENCES = {
    "bbn": bbn_reference,
    "focal": focal,
    "class_balanced": class_balanced,
    "influence_balanced": influence_balanced,
    "ce": lambda _, s, x, epoch, noise: ce_reference(s, x, LABELS.tolist(), noise),
    "balanced_softmax": lambda _, s, x, epoch, noise: balanced_softmax_reference(s, x, LABELS.tolist(), noise),
    "ldam_drw": ldam_drw_reference,
    "gcl": gcl_reference,
    "ride": ride_reference,
    "reslt": lambda _, s, x, epoch, noise: reslt_reference(s, x, LABELS.tolist(), noise, beta=0.995),
}


def check_reference(name, experts, epoch, **loss):
    objective = make_objective(name, experts, **loss)
    if name == "reslt":
        with torch.no_grad():
            objective.norm_weight.uniform_(0.5, 2)
            objective.norm_bias.uniform_(-1, 1)
    maps = make_maps(experts)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = torch.randn(len(LABELS), len(COUNTS), dtype=torch.float64)
        torch.manual_seed(3)
        found = objective.loss(maps, LABELS, epoch)
    state = {k: t.detach().numpy() for k, t in objective.state_dict().items()}
    moments = [np.stack([v.mean((2, 3)) for v in (m.numpy(), m.numpy() ** 2)], -1) for m in maps]
    x = np.stack(moments) if name == "reslt" else np.stack(moments)[..., 0]
    expected = REFERENCES[name](objective, state, x, epoch, noise)
    assert abs(found.item() - expected) <= 1e-10 * max(1, abs(expected))


@pytest.mark.parametrize("name", plugins.names("objectives"))
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("epoch", [0, 159, 160])
def test_the_loss_is_that_of_a_slow_reference(name, experts, epoch):
    if plugins.load("objectives", name).__name__.startswith("h2t_plugins."):
        pytest.skip("an objective from outside: no slow reference here")
    check_reference(name, experts, epoch)


def test_ride_with_linear_classifiers():
    check_reference("ride", 3, 0, classifier="linear")
    check_reference("ride", 3, 170, classifier="linear")


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("focal", {"gamma": 0.5}),
        ("focal", {"form": "sigmoid", "gamma": 1.0}),
        ("class_balanced", {"beta": 0.9, "base": "focal", "gamma": 1.0}),
        ("class_balanced", {"base": "sigmoid_focal", "start_epoch": 160}),
        ("influence_balanced", {"start_epoch": 0}),
    ],
)
def test_other_constants_of_weighted_losses(name, loss):
    for epoch in (0, 160):
        check_reference(name, 2, epoch, **loss)


def test_the_influence_is_a_constant_only_if_asked():
    """Of one sample: the gradient in the logits is that of cross-entropy over the influence, or of their quotient."""
    logits_ = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64, requires_grad=True)
    outputs, labels = torch.cat([logits_, torch.tensor([[2.5]]).double()], 1), torch.tensor([2])

    def gradient(detach):
        loss = {"start_epoch": 0, "weights": "none", "detach": detach}
        cost = make_objective("influence_balanced", counts=(3, 2, 1), **loss).cost(outputs, labels, 0)
        return torch.autograd.grad(cost, logits_, retain_graph=True)[0].numpy()[0]

    p = np.exp([0.3, -0.2, 0.5]) / np.exp([0.3, -0.2, 0.5]).sum()
    own, slope = np.eye(3)[2], p - np.eye(3)[2]  # of the cross-entropy
    influence, of_influence = 2 * (1 - p[2]) * 2.5 + 0.001, -2 * 2.5 * p[2] * (own - p)
    assert np.allclose(gradient(True), 1000 * slope / influence, rtol=1e-12)
    quotient = (slope * influence + np.log(p[2]) * of_influence) / influence**2
    assert np.allclose(gradient(False), 1000 * quotient, rtol=1e-12)


def test_the_reference_finds_a_wrong_constant():
    with pytest.raises(AssertionError):
        check_reference("ride", 3, 0, diversity=0.45)
    with pytest.raises(AssertionError):
        check_reference("ldam_drw", 1, 160, reweight_epoch=161)


@pytest.mark.parametrize("name", plugins.names("objectives"))
@pytest.mark.parametrize("counts", [COUNTS, (5, 1), (1, 1), (4, 4, 4)])
def test_gradients_are_finite_and_the_head_gives_logits(name, counts):
    objective = make_objective(name, 2, counts)
    for labels in (torch.arange(6) % len(counts), torch.zeros(6, dtype=torch.long)):
        for epoch in (0, 180):
            maps = tuple(m.requires_grad_() for m in make_maps(2, 6))
            loss = objective.loss(maps, labels, epoch)
            assert loss.shape == ()
            assert torch.isfinite(loss)
            found = torch.autograd.grad(loss, [*objective.parameters(), *maps], allow_unused=True)
            assert all(g is None or torch.isfinite(g).all() for g in found)
    features = torch.stack([m.detach().mean((-2, -1)) for m in maps])
    with torch.no_grad():
        found = logits(objective.classifier, objective.state_dict(), features, objective.scale)
    assert found.shape == (6, len(counts))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_the_same_seed_gives_the_same_start(name):
    one, two, other = make_objective(name), make_objective(name), make_objective(name, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.weight, other.weight)


def test_temperatures_of_ride():
    found = temperatures(torch.tensor(COUNTS), 1.0, 0.05)
    expected = [4 * 0.05 * n / 46 + 0.95 for n in COUNTS]
    assert torch.allclose(found, torch.tensor([t / expected[0] for t in expected]).double())


def test_running_statistics_of_reslt_follow_the_batches():
    objective = make_objective("reslt", 2)
    maps = make_maps(2)
    objective.loss(maps, LABELS, 0)
    norm = torch.nn.BatchNorm2d(CHANNELS).double()
    for m in maps:
        norm(m)
    for h in range(3):
        assert torch.allclose(objective.running_mean[h], norm.running_mean)
        assert torch.allclose(objective.running_var[h], norm.running_var)


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_with_mixup_the_loss_is_mixed_and_running_statistics_move_once(name):
    partners = LABELS.flip(0)
    maps = make_maps(2)

    def after(*mixed):
        objective = make_objective(name, 2)
        torch.manual_seed(3)
        loss = objective.loss(maps, *mixed)
        return loss, dict(objective.named_buffers())

    with torch.random.fork_rng():
        plain, once = after(LABELS, 170)
        noise = torch.get_rng_state()
        mixed, found = after(LABELS, 170, partners, 0.7)
        torch.set_rng_state(noise)  # objectives that draw do so for each set of labels
        other = make_objective(name, 2)
        other = other.cost(other(maps), partners, 170)
    assert mixed.item() == pytest.approx(0.7 * plain.item() + 0.3 * other.item(), abs=1e-12)
    assert all(torch.equal(found[k], once[k]) for k in once)


def test_groups_of_reslt():
    for wrong in ([2, 9], [3, 1], [], [1, 2, 3]):
        with pytest.raises(UserError, match=r"loss\.groups: must be one or two ascending class indices from 0 to 4, "):
            make_objective("reslt", groups=wrong)
    assert make_objective("reslt", groups=[2]).norm_weight.shape == (2, CHANNELS)
    assert make_objective("reslt", groups=[1, 2]).starts == (1, 2)
    assert make_objective("reslt", counts=(9,) * 100).starts == (36, 71)
    assert make_objective("reslt", counts=(9,) * 10).starts == (3, 7)

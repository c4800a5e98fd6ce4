import math

import numpy as np
import pytest
import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.classifier import logits
from h2t.pipeline.objectives.ride import temperatures

COUNTS = (30, 12, 3, 1)
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


def minus_log_p(z, y):
    top = max(z)
    return top + math.log(sum(math.exp(v - top) for v in z)) - z[y]


def linear_by_hand(objective, maps, e, i):
    x = maps[e][i].mean((1, 2)).numpy()
    w, b = objective.weight.detach().numpy()[e], objective.bias.detach().numpy()[e]
    return [float(sum(w[j, d] * x[d] for d in range(len(x))) + b[j]) for j in range(len(w))]


def cosines_by_hand(objective, maps, e, i):
    x = maps[e][i].mean((1, 2)).numpy()
    return [
        float(sum(w[d] * x[d] for d in range(len(x)))) / math.sqrt(float((w**2).sum()) * float((x**2).sum()))
        for w in objective.weight.detach().numpy()[e]
    ]


def mean_over_experts(each):
    return [sum(column) / len(each) for column in zip(*each, strict=True)]


def margins_by_hand(largest=0.5):
    raw = [n**-0.25 for n in COUNTS]
    return [largest * r / max(raw) for r in raw]


def weights_by_hand(beta=0.9999):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [len(COUNTS) * r / sum(raw) for r in raw]


def ce_reference(objective, maps, epoch, noise):
    total = 0.0
    for i, y in enumerate(LABELS.tolist()):
        total += minus_log_p(mean_over_experts([linear_by_hand(objective, maps, e, i) for e in range(len(maps))]), y)
    return total / len(LABELS)


def balanced_softmax_reference(objective, maps, epoch, noise):
    total = 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = mean_over_experts([linear_by_hand(objective, maps, e, i) for e in range(len(maps))])
        total += minus_log_p([v + math.log(n) for v, n in zip(z, COUNTS, strict=True)], y)
    return total / len(LABELS)


def ldam_drw_reference(objective, maps, epoch, noise):
    weights = weights_by_hand() if epoch >= 160 else [1.0] * len(COUNTS)
    total = norm = 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = mean_over_experts([cosines_by_hand(objective, maps, e, i) for e in range(len(maps))])
        z[y] -= margins_by_hand()[y]
        total += weights[y] * minus_log_p([30 * v for v in z], y)
        norm += weights[y]
    return total / norm


def gcl_reference(objective, maps, epoch, noise):
    high, low, total = math.log(max(COUNTS)), math.log(min(COUNTS)), 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = mean_over_experts([cosines_by_hand(objective, maps, e, i) for e in range(len(maps))])
        for j, n in enumerate(COUNTS):
            e_ij = min(1.0, max(-1.0, float(noise[i, j]) / 3))
            z[j] -= 0.5 * abs(e_ij) * (high - math.log(n)) / (high - low)
        total += minus_log_p([30 * v for v in z], y)
    return total / len(LABELS)


def ride_reference(objective, maps, epoch, noise):
    late = epoch >= 160
    scale = 30 if objective.classifier == "cosine" else 1
    by_hand = cosines_by_hand if objective.classifier == "cosine" else linear_by_hand
    weights = weights_by_hand() if late else [1.0] * len(COUNTS)
    heat = [len(COUNTS) * 0.05 * n / sum(COUNTS) + 0.95 for n in COUNTS]
    heat = [t / max(heat) for t in heat] if late else [1.0] * len(COUNTS)
    square = (sum(heat) / len(heat)) ** 2
    total = 0.0
    for e in range(len(maps)):
        loss = norm = apart = 0.0
        for i, y in enumerate(LABELS.tolist()):
            each = [[scale * v for v in by_hand(objective, maps, f, i)] for f in range(len(maps))]
            z = list(each[e])
            common = [v / t for v, t in zip(mean_over_experts(each), heat, strict=True)]
            own = [v / t for v, t in zip(z, heat, strict=True)]
            for j in range(len(z)):
                apart += math.exp(-minus_log_p(common, j)) * (minus_log_p(own, j) - minus_log_p(common, j))
            z[y] -= scale * margins_by_hand()[y]
            loss += weights[y] * minus_log_p(z, y)
            norm += weights[y]
        total += loss / norm - 0.45 * square * apart / len(LABELS)
    return total


def reslt_reference(objective, maps, epoch, noise):
    """Batch norm on the maps, pixel by pixel; groups of 4 classes: 1 of head, 2 of medium, 1 of tail; beta 0.995."""
    z = np.zeros((3, len(LABELS), len(COUNTS)))
    w, b = objective.weight.detach().numpy(), objective.bias.detach().numpy()
    for h in range(3):
        for e, m in enumerate(maps):
            values = m.numpy()
            mean = values.mean((0, 2, 3), keepdims=True)
            variance = ((values - mean) ** 2).mean((0, 2, 3), keepdims=True)
            normal = (values - mean) / np.sqrt(variance + 1e-5)
            gain = objective.norm_weight.detach().numpy()[h][:, None, None]
            x = (normal * gain + objective.norm_bias.detach().numpy()[h][:, None, None]).mean((2, 3))
            z[h] += (x @ w[e].T + b[e]) / len(maps)
    fusion = sum(minus_log_p(list(z[:, i].sum(0)), y) for i, y in enumerate(LABELS.tolist())) / len(LABELS)
    terms = [
        -math.log(math.exp(-minus_log_p(list(z[h, i]), y)) + 1e-7)
        for i, y in enumerate(LABELS.tolist())
        for h, first in enumerate((0, 1, 3))
        if y >= first
    ]
    return 0.005 * fusion + 0.995 * sum(terms) / len(terms)


def mean_logits(objective, maps, i):
    return mean_over_experts([linear_by_hand(objective, maps, e, i) for e in range(len(maps))])


def focal_by_hand(z, y, gamma, form):
    """One sample's focal loss; with a sigmoid it is the sum of a binary loss for each class."""
    if form == "softmax":
        p = math.exp(z[y]) / sum(math.exp(v) for v in z)
        return -((1 - p) ** gamma) * math.log(p)
    right = [1 / (1 + math.exp(-v if j == y else v)) for j, v in enumerate(z)]
    return sum(-((1 - p) ** gamma) * math.log(p) for p in right)


def focal_reference(objective, maps, epoch, noise):
    gamma, form = objective.constants.gamma, objective.constants.form
    each = [focal_by_hand(mean_logits(objective, maps, i), y, gamma, form) for i, y in enumerate(LABELS.tolist())]
    return sum(each) / len(each)


def class_balanced_reference(objective, maps, epoch, noise):
    constants, total = objective.constants, 0.0
    weights = weights_by_hand(constants.beta) if epoch >= constants.start_epoch else [1.0] * len(COUNTS)
    gamma = 0 if constants.base == "softmax" else constants.gamma
    form = "sigmoid" if constants.base == "sigmoid_focal" else "softmax"
    for i, y in enumerate(LABELS.tolist()):
        total += weights[y] * focal_by_hand(mean_logits(objective, maps, i), y, gamma, form)
    return total / len(LABELS)


def influence_balanced_reference(objective, maps, epoch, noise):
    inverse, total = [1 / n for n in COUNTS], 0.0
    for i, y in enumerate(LABELS.tolist()):
        z = mean_logits(objective, maps, i)
        loss = minus_log_p(z, y)
        if epoch >= objective.constants.start_epoch:
            apart = sum(abs(math.exp(-minus_log_p(z, j)) - (j == y)) for j in range(len(z)))
            size = sum(float(m[i].mean((1, 2)).abs().sum()) for m in maps) / len(maps)
            loss *= len(COUNTS) * inverse[y] / sum(inverse) * 1000 / (apart * size + 0.001)
        total += loss
    return total / len(LABELS)


REFERENCES = {
    "focal": focal_reference,
    "class_balanced": class_balanced_reference,
    "influence_balanced": influence_balanced_reference,
    "ce": ce_reference,
    "balanced_softmax": balanced_softmax_reference,
    "ldam_drw": ldam_drw_reference,
    "gcl": gcl_reference,
    "ride": ride_reference,
    "reslt": reslt_reference,
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
    expected = REFERENCES[name](objective, maps, epoch, noise)
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

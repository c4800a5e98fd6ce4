import math

import numpy as np
import pytest
import torch
from conformance import (
    CHANNELS,
    COUNTS,
    augmented,
    check_fit,
    check_gradients,
    check_head_alone,
    check_logits,
    check_ratio_0,
    fitted_hosts,
    gradient_hosts,
    loss_of,
    make_batch,
    make_features,
    make_host,
    training_features,
)
from loss_references import BATCH_REFERENCES, REFERENCES, ce_reference, cosines_by_hand, minus_log_p
from pipeline_builders import evaluated, make_backbone_dir, make_stage1_head, make_stage2_cache, one_line, run_host

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.host import Context, GradientHost, TrainingBatch
from h2t.pipeline.hosts.mislas import smoothing
from h2t.pipeline.networks.branches import branch_logits
from h2t.pipeline.stages import train_classifier
from h2t.pipeline.training.longtail import effective_weights, ldam_margins

SHAPE = (CHANNELS, 2, 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_stage2_cache(tmp_path_factory.mktemp("hosts") / "c", counts=COUNTS, shape=SHAPE)


@pytest.fixture(scope="module")
def other_donors(tmp_path_factory):
    def noise(maps, rows):
        maps[0][np.array(rows["statistics"]) == "instance"] += 1.5

    return make_stage2_cache(tmp_path_factory.mktemp("other") / "c", counts=COUNTS, shape=SHAPE, change=noise)


@pytest.fixture(scope="module")
def experts_cache(tmp_path_factory):
    return make_stage2_cache(tmp_path_factory.mktemp("experts") / "c", counts=COUNTS, shape=SHAPE, experts=3)


def test_there_are_hosts_of_both_kinds():
    assert {"dr", "mislas", "gcl", "ride", "reslt", "crt", "lws", "balanced_softmax"} <= set(gradient_hosts())
    assert {"tau_norm", "ncm", "logit_adjustment", "logistic_regression"} <= set(fitted_hosts())


@pytest.mark.parametrize("name", gradient_hosts())
def test_a_head_of_a_stack_is_the_head_alone(name, cache):
    check_head_alone(name, cache)


@pytest.mark.parametrize("name", gradient_hosts())
def test_a_head_of_a_stack_is_the_head_alone_with_experts_on_maps(name, experts_cache):
    check_head_alone(name, experts_cache, experts=3, pooled=False, dtypes=[torch.float64])


@pytest.mark.parametrize("name", gradient_hosts())
def test_ratio_0_has_no_donor(name, cache, other_donors):
    check_ratio_0(name, cache, other_donors)


@pytest.mark.parametrize("name", gradient_hosts())
@pytest.mark.parametrize("counts", [COUNTS, (9, 1), (1, 1), (4, 4, 4)])
def test_gradients_are_finite(name, counts):
    check_gradients(name, counts)


@pytest.mark.parametrize("name", fitted_hosts())
@pytest.mark.parametrize("counts", [COUNTS, (9, 1), (1, 1), (4, 4, 4)])
def test_a_fit_is_finite(name, counts):
    check_fit(name, counts)


@pytest.mark.parametrize("name", plugins.names("hosts"))
def test_logits(name):
    check_logits(name)


# Losses against slow references.


@pytest.mark.parametrize("name", gradient_hosts())
@pytest.mark.parametrize("experts", [1, 3])
def test_the_loss_is_that_of_a_slow_reference(name, experts):
    if plugins.load("hosts", name).__name__.startswith("h2t_plugins."):
        pytest.skip("a host from outside: no slow reference here")
    made = make_host(name, experts=experts)
    labels = torch.tensor([0, 3, 1, 2, 2, 0, 1])
    features = make_features(made, len(labels), experts, seed=5)
    loss, state, noise = loss_of(made, features, labels)
    given = augmented(made.host, make_batch(made.host, features, labels, noise))  # augmenting has tests of its own
    plain = {k: t.detach().numpy() for k, t in state.items()}
    numbers = TrainingBatch(*(part.numpy() if isinstance(part, torch.Tensor) else part for part in given))
    if name in BATCH_REFERENCES:
        expected = BATCH_REFERENCES[name](plain, numbers, training_features(made).numpy())
    else:
        expected = REFERENCES[name](plain, numbers.features, labels.tolist(), numbers.noise)
    assert abs(loss.item() - expected) <= 1e-10 * max(1, abs(expected))


def test_ride_can_sum_the_losses_of_its_experts():
    labels = torch.tensor([0, 3, 1])
    made = make_host("ride", experts=3, loss={"experts": "sum"})
    features = make_features(made, 3, 3)
    loss, state, _ = loss_of(made, features, labels)
    w, b = state["weight"].detach().numpy(), state["bias"].detach().numpy()
    expected = sum(
        ce_reference({"weight": w[e : e + 1], "bias": b[e : e + 1]}, features.numpy()[e : e + 1], labels.tolist(), None)
        for e in range(3)
    )
    assert abs(loss.item() - expected) <= 1e-10


def test_ride_with_cosines():
    labels = torch.tensor([0, 3, 1])
    made = make_host("ride", experts=3, classifier="cosine")
    features = make_features(made, 3, 3)
    loss, state, _ = loss_of(made, features, labels)
    w, x = state["weight"].detach().numpy(), features.numpy()
    expected = sum(minus_log_p([20 * c for c in cosines_by_hand(w, x[:, i])], y) for i, y in enumerate(labels)) / 3
    assert abs(loss.item() - float(expected)) <= 1e-10


# Check values of the published settings: CIFAR-100-LT, imbalance 100.

CIFAR100 = torch.tensor([int(500 * 0.01 ** (j / 99)) for j in range(100)])


def test_margins_and_weights_of_ldam_drw():
    margins, weights = ldam_margins(CIFAR100), effective_weights(CIFAR100, 0.9999)
    at = [0, 35, 70, 99]
    assert [round(float(margins[j]), 3) for j in at] == [0.158, 0.238, 0.358, 0.500]
    assert [float(weights[j]) for j in at] == pytest.approx([0.0449, 0.2244, 1.153, 4.378], rel=1e-3)
    assert float(weights.sum()) == pytest.approx(100)


def test_smoothing_of_mislas():
    found = smoothing(CIFAR100, 0.4, 0.1)
    expected = [0.400, 0.349, 0.187, 0.141, 0.113, 0.100]
    assert [round(float(found[j]), 3) for j in (0, 10, 35, 50, 70, 99)] == expected
    assert torch.equal(smoothing(torch.tensor([5, 5]), 0.4, 0.1), torch.full((2,), 0.1, dtype=torch.float64))


def test_mislas_trains_its_classifier_at_a_fraction_of_the_rate():
    assert make_host("mislas").host.rates == {"weight": 0.2, "bias": 0.2}


def test_noise_of_gcl_is_clamped_and_belongs_to_the_stream():
    made = make_host("gcl")
    drawn = made.host.noise(np.random.default_rng(0), 5000)
    assert drawn.shape == (5000, 4)
    assert float(drawn.abs().max()) == 1.0
    assert float(drawn.std()) == pytest.approx(1 / 3, abs=0.01)
    assert torch.equal(drawn, made.host.noise(np.random.default_rng(0), 5000))


def test_lws_leaves_weights_and_reslt_moves_running_statistics(cache):
    from pipeline_builders import make_stack, trained

    made = make_host("lws")
    state, _ = trained(make_stack(cache, [{}], **made.options))
    assert torch.equal(state["weight"][0], made.stage1.state["weight"])
    assert not torch.equal(state["class_scale"][0], torch.ones(1, 4))
    made = make_host("reslt")
    state, _ = trained(make_stack(cache, [{}], **made.options))
    assert not torch.equal(state["running_mean"][0], made.stage1.state["running_mean"])


def test_running_statistics_of_reslt_are_those_of_torch():
    made = make_host("reslt", experts=2)
    maps = torch.rand(2, 6, CHANNELS, 2, 2).double()
    features = torch.stack([maps.mean((-2, -1)), maps.square().mean((-2, -1))], -1)
    state = {k: t.double() for k, t in made.stage1.state.items()}
    norms = [torch.nn.BatchNorm2d(CHANNELS).double() for _ in range(3)]
    z = torch.zeros(3, 6, len(COUNTS)).double()
    for h, norm in enumerate(norms):
        norm.load_state_dict(
            {
                "weight": state["norm_weight"][h],
                "bias": state["norm_bias"][h],
                "running_mean": state["running_mean"][h],
                "running_var": state["running_var"][h],
                "num_batches_tracked": torch.tensor(0),
            }
        )
        for e in range(2):
            z[h] += (norm(maps[e]).mean((-2, -1)) @ state["weight"][e].T + state["bias"][e]) / 2
    assert torch.allclose(branch_logits(state, features), z, atol=1e-12)
    updated = made.host.update(state, features, torch.zeros(6, dtype=torch.long))
    for h, norm in enumerate(norms):
        assert torch.allclose(updated["running_mean"][h], norm.running_mean, atol=1e-12)
        assert torch.allclose(updated["running_var"][h], norm.running_var, atol=1e-12)
        norm.eval()
    moved = {**state, **updated}
    expected = sum(
        (norm(maps[e]).mean((-2, -1)) @ state["weight"][e].T + state["bias"][e]) / 2 for norm in norms for e in range(2)
    )
    assert torch.allclose(made.host.logits(moved, features), expected, atol=1e-12)


# Hosts that are fitted.


def fit(name, values, labels, counts, **loss):
    module = plugins.load("hosts", name)
    experts, _, channels = values.shape
    kind = loss.pop("classifier", "linear")
    host = module.Host(module.Loss(**loss), kind, 1.0, Context(torch.tensor(counts), channels, experts))
    stage1 = make_stage1_head(len(counts), channels, experts, classifier=kind)
    return host, stage1, host.fit(values, labels, stage1)


@pytest.fixture
def blobs():
    """Features (2, 43, 6) of three classes of 30, 10 and 3."""
    draws = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [30, 10, 3])
    centres = draws.normal(size=(3, 12)) * 1.2
    x = centres[labels] + draws.normal(size=(43, 12))
    return torch.from_numpy(x.reshape(43, 2, 6)).movedim(0, 1).contiguous(), torch.from_numpy(labels), (30, 10, 3)


def test_nearest_class_mean(blobs):
    features, labels, counts = blobs
    host, _, state = fit("ncm", features, labels, counts)
    assert host.constants.features == "centred_l2"
    for placing in ("raw", "l2", "centred_l2"):
        host, _, state = fit("ncm", features, labels, counts, features=placing)
        squared = nearest_mean_by_hand(features.numpy(), labels.numpy(), placing)
        found = -2 * host.logits(state, features) * len(features)  # squared distances but for a term without class
        apart = found.numpy() - squared
        assert np.abs(apart - apart[:, :1]).max() < 1e-12
        assert np.array_equal(found.argmin(1), squared.argmin(1))
    host, _, state = fit("ncm", features, labels, counts, classifier="cosine")
    assert host.logits(state, features).abs().max() <= 1 + 1e-9


def nearest_mean_by_hand(features, labels, placing):
    """Squared distances (N, 3), summed over experts, by the formulas of Kang et al., section 4.1, and their code."""
    found = np.zeros((features.shape[1], 3))
    for x in features:
        if placing == "centred_l2":
            x = x - sum(x) / len(x)
        if placing != "raw":
            x = np.array([row / math.sqrt(sum(row**2)) for row in x])
        for j in range(3):
            own = [row for row, y in zip(x, labels, strict=True) if y == j]
            mean = sum(own) / len(own)
            found[:, j] += [sum((row - mean) ** 2) for row in x]
    return found


def test_heads_of_ncm_from_before_it_centred_are_read_as_they_were(blobs):
    features, labels, counts = blobs
    _, _, old = fit("ncm", features, labels, counts, features="raw")
    host, _, _ = fit("ncm", features, labels, counts)
    plain, _, _ = fit("ncm", features, labels, counts, features="raw")
    assert torch.equal(host.logits(old, features), plain.logits(old, features))


def test_reslt_with_two_branches_ignores_a_third():
    """iNaturalist's two branches: the loss by hand, and stage I must have as many."""
    three, two = make_host("reslt"), make_host("reslt", loss={"groups": [1]})
    features = make_features(three, 5)
    labels = torch.tensor([0, 1, 2, 3, 1])
    state = {k: t.double() for k, t in three.stage1.state.items()}
    first = {
        k: t[:2] if k in ("norm_weight", "norm_bias", "running_mean", "running_var") else t for k, t in state.items()
    }
    z = branch_logits(state, features)[:2].numpy()
    terms = [
        -math.log(math.exp(-minus_log_p(list(z[h, i]), y)) + 1e-7)
        for h in range(2)
        for i, y in enumerate(labels.tolist())
        if y >= h
    ]
    fusion = sum(minus_log_p(list(z[:, i].sum(0)), y) for i, y in enumerate(labels.tolist())) / 5
    expected = 0.5 * fusion + 0.5 * sum(terms) / len(terms)
    assert two.host.loss(first, features, labels, None).item() == pytest.approx(expected, abs=1e-12)
    with pytest.raises(
        UserError, match=r"loss\.groups: must have 2 class indices, because stage I has 3 branches; got \[1\]"
    ):
        two.host.initial(three.stage1, np.random.default_rng(0))


def test_tau_normalisation(blobs):
    features, labels, counts = blobs
    for tau in (0.0, 0.5, 1.0):
        _, stage1, state = fit("tau_norm", features, labels, counts, tau=tau)
        for e in range(2):
            for j in range(3):
                w = stage1.state["weight"][e, j]
                assert torch.allclose(state["weight"][e, j], w / math.sqrt(float(w @ w)) ** tau)
        assert not state["bias"].any()


def test_logit_adjustment(blobs):
    features, labels, counts = blobs
    host, stage1, state = fit("logit_adjustment", features, labels, counts, tau=1.5)
    x = features.float()
    plain = (x @ stage1.state["weight"].mT + stage1.state["bias"][:, None]).mean(0)
    expected = plain - 1.5 * torch.tensor([math.log(n / 43) for n in counts])
    assert torch.allclose(host.logits(state, x), expected.to(host.logits(state, x)), atol=1e-5)


@pytest.mark.parametrize("weights", ["instance", "balanced"])
def test_logistic_regression_is_that_of_scikit_learn(blobs, weights):
    from sklearn.linear_model import LogisticRegression

    features, labels, counts = blobs
    host, _, state = fit("logistic_regression", features, labels, counts, weights=weights, l2=0.01)
    joint = features.movedim(0, 1).flatten(1).numpy() / 2
    peer = LogisticRegression(
        C=1 / (0.01 * 43), class_weight="balanced" if weights == "balanced" else None, tol=1e-10, max_iter=5000
    ).fit(joint, labels.numpy())
    expected = torch.from_numpy(peer.decision_function(joint)).log_softmax(1)
    assert torch.allclose(host.logits(state, features).log_softmax(1), expected, atol=1e-4)


def test_a_host_of_version_0_1_0_passes_on_three_arguments():
    class Host(GradientHost):
        def __init__(self, loss, classifier, scale, context):
            super().__init__(classifier, scale, context)
            self.margin = loss

    made = Host(0.5, "linear", 2.0, Context(torch.tensor(COUNTS), CHANNELS, 1))
    assert (made.margin, made.classifier, made.scale, made.context.classes) == (0.5, "linear", 2.0, len(COUNTS))


# The stage, end to end, and the mistakes that the checks must find.


@pytest.fixture(scope="module")
def stage1_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage1") / "b"
    return folder, make_backbone_dir(folder, classes=len(COUNTS))


@pytest.fixture(scope="module")
def wide_cache(tmp_path_factory, stage1_dir):
    return make_stage2_cache(
        tmp_path_factory.mktemp("wide") / "c", counts=COUNTS, shape=(64, 2, 2), backbone=stage1_dir[1]
    )


@pytest.mark.parametrize("name", fitted_hosts())
def test_a_fitted_host_has_one_head_and_no_h2t(tmp_path, name, wide_cache, stage1_dir):
    run_host(tmp_path / "h", wide_cache, stage1_dir[0], name="h", host=name)
    found = evaluated(tmp_path / "e", wide_cache, tmp_path / "h", stage1_dir[0], name="h")
    assert found["with_h2t"] is None
    assert found["without_h2t"]["heads"] == 1
    assert found["without_h2t"]["top1_std"] is None
    assert found["without_h2t"]["ratio"] == 0
    for key in ("grid", "optimiser"):
        with pytest.raises(UserError, match=f"hosts.h.{key}: host {name} has a closed-form fit"):
            run_host(tmp_path / "x", wide_cache, stage1_dir[0], name="h", host=name, **{key: {}})


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"host": "ride", "experts": 3}, "hosts.h.experts: must be 1, as in the cache of backbone b; got 3"),
        (
            {"classifier": "cosine"},
            "as in stage I, linear; got cosine; change this key, or set start: means, or choose a backbone",
        ),
        ({"host": "gcl", "classifier": "cosine"}, "linear; got cosine; set start: means, or choose a backbone"),
        ({"host": "gcl"}, "host gcl needs a cosine classifier"),
        ({"host": "reslt"}, "hosts.h.pool: host reslt needs 2 numbers per channel"),
        ({"pool": "moments"}, "hosts.h.pool: host dr needs 1 number per channel"),
        (
            {"host": "reslt", "pool": "moments"},
            "classifier: must be of the same kind as in stage I, linear; got branches; choose a backbone",
        ),
        ({"host": "reslt", "pool": "moments", "loss": {"groups": [3, 1]}}, "loss.groups: must be one or two ascending"),
        ({"grid": {"ratio": [0.01]}}, r"ratio\[0\]: must .* one of 64 channels; got 0.01; use 0 or at least 0.015625"),
        ({"host": "mislas", "loss": {"smooth_head": 1.5}}, r"hosts.h.loss.smooth_head: must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, wide_cache, stage1_dir, section, text):
    with one_line(match=rf"(?=hosts\.h\b).*{text}"):
        run_host(tmp_path / "h", wide_cache, stage1_dir[0], name="h", **{"host": "dr", **section})
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("key", ["scale", "temperature"])
def test_a_scale_of_0_is_refused(key):
    from h2t.pipeline.base.params import build
    from h2t.pipeline.objectives.ride import Loss

    with pytest.raises(UserError, match=f"loss.{key}: must be greater than 0; got 0"):
        build(Loss, "loss", {key: 0.0})
    with pytest.raises(UserError, match=r"hosts\.h\.scale: must be greater than 0; got 0"):
        build(train_classifier.Params, "hosts.h", {"host": "dr", "backbone": "b", "scale": 0.0})


def test_class_counts_that_disagree_are_refused(tmp_path, stage1_dir):
    wrong = make_stage2_cache(
        tmp_path / "c",
        counts=COUNTS,
        shape=(64, 2, 2),
        backbone=stage1_dir[1],
        provenance={"classes": list("abcd"), "counts": [30, 12, 3, 2]},
    )
    with pytest.raises(UserError, match="training samples per class"):
        run_host(tmp_path / "h", wrong, stage1_dir[0], host="dr")
    fewer = make_stage2_cache(tmp_path / "d", counts=(5, 2, 1), shape=(64, 2, 2), backbone=stage1_dir[1])
    with pytest.raises(UserError, match=r"stage-I classifier: \(experts, classes, channels\) must be \(1, 3, 64\)"):
        run_host(tmp_path / "h", fewer, stage1_dir[0], host="dr")

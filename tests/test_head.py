"""The object between maps and logits: pool, frozen part, host; and plug-ins that state as little as possible."""

import numpy as np
import pytest
import torch
from conformance import CHANNELS, fitted_hosts, gradient_hosts, make_batch, make_host, prepared

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.features import load_pool
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import Context, TrainingBatch
from h2t.pipeline.heads.stored import HeadParts, build_head

DRAWS = np.random.default_rng


def make_head(name="dr", pool=None, frozen=None, **options) -> tuple[Head, dict[str, torch.Tensor]]:
    """A head in float64 with its state at the start."""
    made = make_host(name, **options)
    prepared(made)
    head = Head(made.host, load_pool(pool or made.pool, {}, "pool_options", CHANNELS), frozen)
    return head, {k: t.double() for k, t in head.initial(made.stage1, DRAWS(0)).items()}


def make_maps(batch=6, experts=1) -> torch.Tensor:
    return torch.randn(experts, batch, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(1)).double()


LABELS = torch.arange(6) % 4


def batch_of(head, x):
    """A batch of LABELS with the inputs `x` of the head."""
    noise = head.gradient_host.noise(DRAWS(0), len(LABELS))
    return make_batch(head.host, x, LABELS, None if noise is None else noise.double())


@pytest.mark.parametrize("name", gradient_hosts())
def test_maps_and_the_features_pooled_of_them_give_the_same(name):
    head, state = make_head(name)
    maps = make_maps()
    pooled = head.pool({}, maps)
    assert torch.equal(head.logits(state, maps), head.logits(state, pooled))
    losses = [head.batch_loss(state, batch_of(head, x)) for x in (maps, pooled)]
    assert torch.equal(*losses)
    updated = head.update(state, maps, LABELS)
    assert updated.keys() == set(head.gradient_host.fixed) & {"running_mean", "running_var"}
    assert all(torch.equal(t, head.update(state, pooled, LABELS)[k]) for k, t in updated.items())


def test_a_trained_pool_keeps_its_parameters_apart():
    head, state = make_head(pool="attention")
    assert sorted(state) == ["bias", "pool.query", "weight"]
    other = {**state, "pool.query": torch.linspace(-1, 1, CHANNELS).double()}
    assert not torch.equal(head.logits(state, make_maps()), head.logits(other, make_maps()))
    assert torch.equal(head.features(other, make_maps()), head.pool({"query": other["pool.query"]}, make_maps()))


def test_the_frozen_part_lies_between_pool_and_classifier():
    head, state = make_head(frozen=lambda features: features.relu() + 1)
    bare = Head(head.host, head.pool)
    expected = bare.features(state, make_maps()).relu() + 1
    for x in (make_maps(), bare.features(state, make_maps())):
        assert torch.equal(head.features(state, x), expected)
        assert torch.equal(head.logits(state, x), bare.logits(state, expected))
        whole, pooled = TrainingBatch(x, LABELS), TrainingBatch(expected, LABELS)
        assert torch.equal(head.batch_loss(state, whole), bare.batch_loss(state, pooled))
    assert bare.linear
    assert not head.linear


def linear_in_weighted_features(head: Head, state: dict[str, torch.Tensor], classifier: str) -> bool:
    """Whether logits are a linear map of the features, or of the features at length 1, plus a constant."""
    logits = head.host.logits
    first, second = head.features(state, make_maps()), head.features(state, make_maps().flip(1))
    if classifier == "cosine":
        first, second = (x / x.norm(dim=-1, keepdim=True) for x in (first, second))
        mixed = 0.3 * first + 0.7 * second
        length = mixed.norm(dim=-1).mean(0).unsqueeze(-1)
        return torch.allclose(logits(state, mixed) * length, 0.3 * logits(state, first) + 0.7 * logits(state, second))
    mixed = 0.3 * first + 0.7 * second
    return torch.allclose(logits(state, mixed), 0.3 * logits(state, first) + 0.7 * logits(state, second))


@pytest.mark.parametrize("name", gradient_hosts())
@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_linear_head_has_linear_logits_and_a_loss_of_these_alone(name, classifier):
    try:
        made = make_host(name, classifier=classifier)
    except AssertionError:
        pytest.skip(f"{name} takes no {classifier} classifier")
    head, state = make_head(name, classifier=classifier)
    assert head.linear == made.host.linear
    if not head.linear:
        return
    assert linear_in_weighted_features(head, state, classifier)
    host, batch = head.gradient_host, batch_of(head, head.features(state, make_maps()))
    expected, logits = host.batch_loss(state, batch), host.expert_logits(state, batch.features)
    host.classifier = "given"  # an instance of this test's own
    found = host.batch_loss(state, batch._replace(features=logits, partners=None))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_fitted_head_is_not_trained_and_a_trained_one_not_fitted():
    for name in fitted_hosts():
        head = Head(make_host(name).host, load_pool("gap", {}, "pool_options", CHANNELS))
        with pytest.raises(TypeError, match="closed-form fit"):
            head.batch_loss({}, TrainingBatch(make_maps(), LABELS))
    head, _ = make_head()
    with pytest.raises(TypeError, match="no closed-form fit"):
        head.fit(make_maps(), LABELS, make_host("dr").stage1)


def test_a_fit_on_maps_keeps_the_start_of_a_trained_pool():
    made = make_host("ncm")
    head = Head(made.host, load_pool("attention", {}, "pool_options", CHANNELS))
    labels = LABELS.sort().values
    maps = make_maps().float()
    state = head.fit(maps, labels, made.stage1)
    assert torch.equal(state.pop("pool.query"), torch.zeros(CHANNELS))
    average = Head(made.host, load_pool("gap", {}, "pool_options", CHANNELS)).fit(maps, labels, made.stage1)
    assert all(torch.allclose(t, average[k], atol=1e-6) for k, t in state.items())


LEAST_HOST = '''"""Least: cross-entropy."""

from torch.nn import functional as F

from h2t.pipeline.heads.host import GradientHost


class Host(GradientHost):
    def loss(self, state, features, labels, noise):
        return F.cross_entropy(self.logits(state, features), labels)
'''
LEAST_POOL = '''"""Least: the mean."""

from h2t.pipeline.networks import pool


class Pool(pool.Pool):
    def __call__(self, state, maps):
        return maps.mean((-2, -1))
'''
BARE_POOL = '''"""Bare: the mean, without the base class."""

from h2t.pipeline.base.params import Section


class Options(Section):
    pass


class Pool:
    commutes = True

    def __init__(self, options, channels):
        self.options = options

    def initial(self):
        return {}

    def __call__(self, state, maps):
        return maps.mean((-2, -1))
'''


@pytest.fixture
def plug_ins(tmp_path, monkeypatch):
    for kind, name, text in (
        ("hosts", "least", LEAST_HOST),
        ("pools", "least", LEAST_POOL),
        ("pools", "bare", BARE_POOL),
    ):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))


def parts(pool, **options) -> HeadParts:
    return HeadParts("least", options.get("loss", {}), "linear", 1.0, pool, options.get("pool_options", {}), "hosts.h")


def test_plug_ins_that_state_nothing_have_safe_defaults(plug_ins):
    context = Context(torch.tensor([4, 2]), CHANNELS, 1)
    head = build_head(parts("least"), context)
    assert (head.pool.commutes, head.pool.linear, head.pool.numbers, head.linear) == (False, False, 1, False)
    bare = build_head(parts("bare"), context)
    assert (bare.pool.commutes, bare.pool.linear, bare.pool.numbers) == (True, False, 1)
    for kind, name in (("hosts", "least"), ("pools", "least")):
        module = plugins.load(kind, name)
        assert not (module.Loss if kind == "hosts" else module.Options).model_fields


def test_keys_that_a_plug_in_does_not_have_are_refused(plug_ins):
    context = Context(torch.tensor([4, 2]), CHANNELS, 1)
    with pytest.raises(UserError, match=r"hosts\.h\.loss\.margin"):
        build_head(parts("least", loss={"margin": 1.0}), context)
    with pytest.raises(UserError, match=r"hosts\.h\.pool_options\.p"):
        build_head(parts("least", pool_options={"p": 1.0}), context)

import pytest
import torch
from conformance import make_host
from pipeline_builders import distance, make_stack, make_stage2_cache, trained

from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import build
from h2t.pipeline.heads.fusion import fuse, mix

TRAINED = {"gem": {"trained": True}}


def make_pool(name, channels=6, **options):
    module = plugins.load("pools", name)
    return module.Pool(build(module.Options, "pool_options", options), channels)


def state_of(pool):
    return {k: t.double() for k, t in pool.initial().items()}


CASES = [(name, {}) for name in plugins.names("pools")] + list(TRAINED.items())


@pytest.fixture
def maps():
    return torch.rand(2, 5, 6, 3, 4, generator=torch.Generator().manual_seed(0)).double()  # (E, B, C, H, W)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_shapes_and_neighbours(name, options, maps):
    pool = make_pool(name, **options)
    state = state_of(pool)
    numbers = getattr(pool, "numbers", 1)
    found = pool(state, maps)
    assert found.shape == ((2, 5, 6) if numbers == 1 else (2, 5, 6, numbers))
    assert found.dtype == torch.float64
    for e in range(2):
        for b in range(5):
            assert torch.allclose(pool(state, maps[e, b]), found[e, b], atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_are_finite_also_at_zero(name, options, maps):
    pool = make_pool(name, **options)
    for x in (maps, torch.zeros_like(maps)):
        x = x.clone().requires_grad_()
        state = {k: t.requires_grad_() for k, t in state_of(pool).items()}
        found = torch.autograd.grad(pool(state, x).square().sum(), [x, *state.values()])
        assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_pooling_commutes_exactly_where_it_says_so(name, options, maps):
    pool = make_pool(name, **options)
    state = {k: t + 0.7 * torch.randn_like(t) for k, t in state_of(pool).items()}
    other = maps.flip(1) + 0.1
    mask = torch.tensor([True, False, True, False, False, True])
    fused_first = pool(state, fuse(maps, other, mask[:, None, None]))
    inner = mask if fused_first.dim() == 3 else mask[:, None]
    pooled_first = fuse(pool(state, maps), pool(state, other), inner)
    if pool.commutes:
        assert torch.equal(fused_first, pooled_first)
        assert not pool.initial()
    elif name != "gem":  # a trained exponent commutes, but its gradient needs the maps
        assert not torch.allclose(fused_first, pooled_first)
    share = torch.tensor(0.3).double()
    same = torch.allclose(
        pool(state, mix(maps, other, share)), mix(pool(state, maps), pool(state, other), share), atol=1e-12
    )
    assert same == pool.linear


def test_values_by_hand(maps):
    assert torch.equal(make_pool("gap")({}, maps), maps.flatten(-2).mean(-1))
    assert torch.equal(make_pool("max")({}, maps), maps.flatten(-2).max(-1).values)
    assert torch.allclose(make_pool("gem", exponent=1.0)({}, maps), make_pool("gap")({}, maps))
    assert torch.allclose(make_pool("gem", exponent=3.0)({}, maps), (maps**3).mean((-2, -1)) ** (1 / 3))
    assert torch.allclose(make_pool("gem", exponent=300.0)({}, maps), make_pool("max")({}, maps), atol=0.02)
    attention = make_pool("attention")
    assert torch.allclose(attention(state_of(attention), maps), make_pool("gap")({}, maps))
    query = torch.randn(6).double()
    one = maps[0, 0].flatten(1)
    weights = torch.exp(query @ one)
    assert torch.allclose(attention({"query": query}, maps[0, 0]), (one * weights).sum(1) / weights.sum())
    assert torch.equal(make_pool("moments")({}, maps)[..., 1], maps.square().mean((-2, -1)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_stage2_cache(tmp_path_factory.mktemp("pools") / "c", counts=(20, 9, 3), shape=(8, 3, 3))


HEADS = [{"ratio": r, "seed": s} for r in (0.0, 0.5, 1.0) for s in (0, 1)]


@pytest.mark.parametrize("name", [n for n in plugins.names("pools") if make_pool(n).commutes])
def test_heads_on_pooled_vectors_are_heads_on_maps(name, cache):
    host = make_host("reslt" if name == "moments" else "dr", (20, 9, 3), 8, pixels=9)
    options = {**host.options, "pool": name, "batch_size": 8}
    maps, _ = trained(make_stack(cache, HEADS, **options | {"pooled": False}))
    vectors, _ = trained(make_stack(cache, HEADS, **options | {"pooled": True}))
    for key in maps:
        assert distance(maps[key], vectors[key]) <= 1e-5


@pytest.mark.parametrize(("name", "options"), [("attention", {}), ("gem", {"trained": True})])
def test_trained_pools_train_per_head_as_alone(name, options, cache):
    host = make_host("dr", (20, 9, 3), 8)
    given = {**host.options, "pool": name, "pool_options": options, "pooled": False, "dtype": torch.float64}
    together, _ = trained(make_stack(cache, HEADS, **given), lr=0.2)
    key = "pool." + next(iter(make_pool(name, **options).initial()))
    assert not torch.equal(together[key][0], together[key][-1])
    for k in (0, 3, 5):
        alone, _ = trained(make_stack(cache, [HEADS[k]], **given), lr=0.2)
        for part in alone:
            assert float((together[part][k] - alone[part][0]).abs().max()) <= 1e-9

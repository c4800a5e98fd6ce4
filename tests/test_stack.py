import math

import numpy as np
import pytest
import torch
from pipeline_builders import distance, make_optimiser, make_stack, make_stage1_head, make_stage2_cache, taken, trained
from torch.nn import functional as F

from h2t.pipeline.base import plugins
from h2t.pipeline.heads import linear_heads
from h2t.pipeline.heads import stack as stack_module
from h2t.pipeline.heads.fusion import channel_ranks, replaced_channels
from h2t.pipeline.heads.host import is_cross_entropy, is_stackable, stackable

GRID = [
    {"ratio": r, "donor": d, "selection": s, "seed": seed}
    for r in (0.0, 0.3, 1.0)
    for d in ("instance", "balanced")
    for s in ("random", "first", "middle", "last", "shuffled")
    for seed in (0, 3)
]
DONORS = {"instance": "instance", "balanced": "balanced"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack") / "c"
    return make_stage2_cache(folder, counts=(30, 12, 3), shape=(20, 3, 3), views=(1, 1, 2))


@pytest.fixture(scope="module")
def two_experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack") / "c"
    return make_stage2_cache(folder, counts=(30, 12, 3), shape=(20, 3, 3), views=(1, 1, 2), experts=2)


def test_the_learning_rates_of_the_reference():
    expected = [0.02, 0.01951, 0.01809, 0.01588, 0.01309, 0.01, 0.00691, 0.00412, 0.00191, 0.00049]
    optimiser = make_optimiser(epochs=10, lr=0.02)
    assert [round(optimiser.rate(e), 5) for e in range(10)] == expected
    assert make_optimiser(epochs=1, lr=0.5).rate(0) == 0.5
    assert min(make_optimiser(epochs=200).rate(e) for e in range(200)) > 0


@pytest.mark.parametrize(
    ("experts", "pooled", "dtype"), [(1, True, torch.float32), (2, False, torch.float32), (1, False, torch.float64)]
)
def test_a_head_of_a_stack_is_the_head_trained_alone(tmp_path, cache, experts, pooled, dtype):
    if experts == 2:
        cache = make_stage2_cache(tmp_path / "c", counts=(30, 12, 3), shape=(20, 3, 3), experts=2)
    options = {"pooled": pooled, "dtype": dtype, "batch_size": 8}
    together, losses = trained(make_stack(cache, GRID, donors=DONORS, **options), lr=0.2)
    assert all(torch.isfinite(x).all() for x in losses)
    for k in range(0, len(GRID), 7):
        donor = GRID[k]["donor"]
        alone, lost = trained(make_stack(cache, [GRID[k]], donors={donor: donor}, **options), lr=0.2)
        for name in alone:
            assert alone[name].dtype == dtype
            assert distance(together[name][k], alone[name][0]) <= 1e-5
            if dtype == torch.float64:
                assert float((together[name][k] - alone[name][0]).abs().max()) <= 1e-9
        assert torch.allclose(torch.stack(losses)[:, k], torch.stack(lost)[:, 0], rtol=1e-4)


LEFT_OUT = {("gcl", "linear"), ("lift", "linear"), ("ride", "linear")}
LEFT_OUT |= {("isda", "cosine"), ("manifold_mixup", "cosine"), ("remix", "cosine")}  # the last two mix features
LEFT_OUT |= {("cam_split", kind) for kind in ("linear", "cosine")}  # reads maps
LINEAR = [  # host, its loss, classifier
    *(
        (name, {}, kind)
        for name in plugins.names("hosts")
        for kind in ("linear", "cosine")
        if plugins.load("hosts", name).Host.linear and (name, kind) not in LEFT_OUT
    ),
    ("ride", {"experts": "sum"}, "linear"),
]
MIXED = [{"ratio": r, "donor": "balanced", "selection": "mixup", "seed": 3} for r in (0.3, 1.0)]
UNEVEN = [h for h in GRID if h["selection"] != "shuffled"][3:20]  # groups of a seed and a donor differ in size
KINDS_OF_STACKS = {
    "folded": UNEVEN,
    "mixup": [*UNEVEN, *MIXED],
    "shuffled": GRID[1::3],
    "nothing is replaced": [{"ratio": 0.0, "seed": seed} for seed in (3, 0)],
}


@pytest.mark.parametrize(("host", "loss", "classifier"), LINEAR)
@pytest.mark.parametrize("kind", KINDS_OF_STACKS)
def test_products_of_the_whole_stack_give_the_heads_of_vmap(two_experts, host, loss, classifier, kind):
    options = {"host": host, "loss": loss, "classifier": classifier, "scale": 3.0, "donors": DONORS, "batch_size": 8}
    bounds = {torch.float64: 1e-11} | ({torch.float32: 1e-4} if kind == "folded" else {})
    for dtype, bound in bounds.items():
        wide, slow = (
            make_stack(two_experts, KINDS_OF_STACKS[kind], dtype=dtype, at_once=at_once, **options)
            for at_once in (True, False)
        )
        assert (wide.at_once, slow.at_once) == (True, False)
        (ours, our_losses), (theirs, their_losses) = trained(wide, lr=0.2), trained(slow, lr=0.2)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert distance(ours[name], theirs[name]) <= bound
        assert distance(torch.stack(our_losses), torch.stack(their_losses)) <= bound


def test_heads_with_many_classes_are_not_folded(cache, monkeypatch):
    monkeypatch.setattr(linear_heads, "FOLDED_CLASSES", 0)
    fused, losses = trained(make_stack(cache, GRID[:9], donors=DONORS, dtype=torch.float64, batch_size=8))
    monkeypatch.undo()
    folded, others = trained(make_stack(cache, GRID[:9], donors=DONORS, dtype=torch.float64, batch_size=8))
    assert all(distance(fused[name], folded[name]) <= 1e-11 for name in fused)
    assert distance(torch.stack(losses), torch.stack(others)) <= 1e-11


@pytest.mark.parametrize(("host", "loss", "classifier"), LINEAR)
@pytest.mark.parametrize("kind", KINDS_OF_STACKS)
def test_heads_in_blocks_are_those_of_one_block(two_experts, monkeypatch, host, loss, classifier, kind):
    options = {"host": host, "loss": loss, "classifier": classifier, "scale": 3.0, "donors": DONORS, "batch_size": 8}
    whole, losses = trained(make_stack(two_experts, KINDS_OF_STACKS[kind], dtype=torch.float64, **options))
    monkeypatch.setattr(linear_heads, "LOGITS_AT_ONCE", 1)
    stack = make_stack(two_experts, KINDS_OF_STACKS[kind], dtype=torch.float64, **options)
    assert len(stack._blocks) == (stack._groups.members.shape[1] if stack._folds else len(stack.heads))
    found, others = trained(stack)
    assert all(distance(found[name], whole[name]) <= 1e-11 for name in whole)
    assert distance(torch.stack(losses), torch.stack(others)) <= 1e-11


@pytest.mark.parametrize(("most", "threads"), [(linear_heads.ONE_THREAD, 1), (0, 2)])
def test_one_thread_trains_a_small_stack(two_experts, monkeypatch, most, threads):
    stack = make_stack(two_experts, GRID[:9], donors=DONORS, batch_size=8)
    before, of_steps, step = torch.get_num_threads(), set(), stack.step
    monkeypatch.setattr(linear_heads, "ONE_THREAD", most)
    monkeypatch.setattr(stack, "step", lambda *args: of_steps.add(torch.get_num_threads()) or step(*args))
    try:
        torch.set_num_threads(2)
        trained(stack)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert of_steps == {threads}


def test_an_overridden_loss_is_written_for_one_head_unless_it_says_otherwise(cache):
    dr = plugins.load("hosts", "dr").Host

    class Own(dr):
        def loss(self, state, features, labels, noise):
            assert labels.dim() == 1
            return F.cross_entropy(self.logits(state, features), labels)

    assert is_stackable(make_stack(cache, GRID, donors=DONORS).host)
    own, ours = (make_stack(cache, GRID[:9], donors=DONORS, dtype=torch.float64) for _ in range(2))
    own.linear_heads.on_logits.__class__ = Own
    assert not is_stackable(own.linear_heads.on_logits)
    own.linear_heads.stackable = False
    (mine, _), (theirs, _) = trained(own), trained(ours)
    assert all(distance(mine[name], theirs[name]) <= 1e-11 for name in theirs)


CROSS_ENTROPIES = {
    "linear": {"host": "dr"},
    "cosine": {"host": "dr", "classifier": "cosine", "scale": 3.0},
    "scaled": {"host": "crt", "scale": 2.0},
    "with a prior": {"host": "balanced_softmax"},
}


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
def test_cross_entropy_has_the_gradient_that_autograd_gives(two_experts, kind, at_once, monkeypatch):
    """To the same bits, of all heads at once and of one after another."""
    if not at_once:
        monkeypatch.setattr(linear_heads, "LOGITS_AT_ONCE", 1)
    options = {"donors": DONORS, **CROSS_ENTROPIES[kind]}
    ours, other = (make_stack(two_experts, GRID, **options) for _ in range(2))

    class Own(type(other.host)):
        @stackable
        def loss(self, state, features, labels, noise):
            return super().loss(state, features, labels, noise)

    class Doubled(type(other.host)):
        def with_prior(self, logits):
            return 2 * super().with_prior(logits)

    other.linear_heads.on_logits.__class__ = Doubled
    assert not is_cross_entropy(other.linear_heads.on_logits)
    other.linear_heads.on_logits.__class__ = Own
    assert is_cross_entropy(ours.linear_heads.on_logits)
    assert not is_cross_entropy(other.linear_heads.on_logits)
    (mine, losses), (theirs, others) = trained(ours), trained(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert torch.equal(torch.stack(losses), torch.stack(others))


def test_the_length_of_windows_changes_nothing(two_experts, monkeypatch):
    def train():
        options = {"host": "gcl", "classifier": "cosine", "scale": 3.0, "donors": DONORS}
        return trained(make_stack(two_experts, GRID[::3], **options))[0]

    long = train()
    monkeypatch.setattr(stack_module, "DRAWN_BYTES", 1)  # windows of one step
    assert all(torch.equal(tensor, long[name]) for name, tensor in train().items())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_pooling_first_or_last_gives_the_same_heads(tmp_path, dtype, bound):
    # Stored as float64 features only on the map path, so maps whose means float32 holds exactly are compared.
    def quarters(maps, rows):
        maps[0][:] = np.round(maps[0] * 4) / 4

    folder = make_stage2_cache(tmp_path / "c", counts=(30, 12, 3), shape=(20, 2, 2), change=quarters)
    on_maps, _ = trained(make_stack(folder, GRID, donors=DONORS, pooled=False, dtype=dtype, batch_size=8), lr=0.2)
    on_vectors, _ = trained(make_stack(folder, GRID, donors=DONORS, pooled=True, dtype=dtype, batch_size=8), lr=0.2)
    for name in on_maps:
        for k in range(len(GRID)):
            assert distance(on_maps[name][k], on_vectors[name][k]) <= bound


def test_heads_of_one_seed_share_batches_and_heads_of_other_seeds_do_not(cache):
    state, _ = trained(
        make_stack(cache, [{"ratio": 0.0, "donor": d, "seed": s} for d in DONORS for s in (0, 1)], donors=DONORS)
    )
    assert torch.equal(state["weight"][0], state["weight"][2])
    assert not torch.equal(state["weight"][0], state["weight"][1])


@pytest.mark.parametrize("pooled", [True, False])
def test_one_step_at_a_time_against_a_slow_loop(cache, pooled):
    """SGD by hand: momentum 0.9, weight decay on every parameter, the rate of the epoch, the mean loss of the batch."""
    setting = {"ratio": 0.35, "seed": 2}
    stack = make_stack(cache, [setting], pooled=pooled, batch_size=8, dtype=torch.float64)
    stage1 = make_stage1_head(3, 20)
    weight = stage1.state["weight"][0].double()
    bias = stage1.state["bias"][0].double()
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    count = replaced_channels(0.35, 20)
    expected_losses = []
    for epoch in range(3):
        rate = 0.5 * 0.1 * (1 + math.cos(math.pi * epoch / 3))
        total = 0.0
        for at in stack.feed.steps(epoch + 1, epoch, 0):
            receiver = taken(at.table, at.batch.receivers[0])[0]
            donor = taken(at.table, at.batch.donors[0, 0])[0]
            ranks = channel_ranks(stack.streams.seeds, epoch, [at.step], [0], 20)[0]
            mask = stack.masks(torch.from_numpy(ranks))[0, 0]
            assert int(mask.sum()) == count
            x = receiver.clone()
            x[:, mask] = donor[:, mask]
            features = x if pooled else x.mean((2, 3))
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            loss = F.cross_entropy(features @ w.T + b, torch.from_numpy(at.batch.labels[0]))
            total += loss.item() * len(features)
            for i, (value, leaf) in enumerate(zip((weight, bias), torch.autograd.grad(loss, (w, b)), strict=True)):
                speed[i] = 0.9 * speed[i] + leaf + 5e-4 * value
                value -= rate * speed[i]
        expected_losses.append(total / stack.streams.samples)
    state, losses = trained(stack, epochs=3, lr=0.1)
    assert distance(state["weight"][0, 0], weight) < 1e-12
    assert distance(state["bias"][0, 0], bias) < 1e-12
    assert torch.allclose(torch.stack(losses)[:, 0], torch.tensor(expected_losses, dtype=torch.float64))


def test_degenerate_sizes(tmp_path):
    """One class, one sample, one channel, one pixel; a batch larger than the epoch."""
    folder = make_stage2_cache(tmp_path / "c", counts=(1,), shape=(1, 1, 1))
    state, losses = trained(make_stack(folder, [{"ratio": r} for r in (0.0, 0.5, 1.0)], batch_size=128))
    assert state["weight"].shape == (3, 1, 1, 1)
    assert all(torch.isfinite(x).all() for x in losses)


def test_warm_start_copies_the_stage_one_head_and_leaves_it(cache):
    stage1 = make_stage1_head(3, 20)
    before = {k: t.clone() for k, t in stage1.state.items()}
    stack = make_stack(cache, [{}, {"seed": 1}], stage1=stage1)
    for name, tensor in stack.state.items():
        assert torch.equal(tensor[0], before[name])
        assert torch.equal(tensor[1], before[name])
    trained(stack)
    for name in before:
        assert torch.equal(stage1.state[name], before[name])
        assert not torch.equal(stack.state[name][0], before[name])


def test_training_leaves_the_features_as_they_are(cache):
    stack = make_stack(cache, GRID, donors=DONORS, pooled=False)
    table = next(stack.feed.steps(1)).table
    before = taken(table, stack.streams.rows).clone()
    trained(stack)
    assert torch.equal(taken(table, stack.streams.rows), before)

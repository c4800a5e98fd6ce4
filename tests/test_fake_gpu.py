"""Every forward path that a GPU takes, by tensors that have a device and no values: PyTorch's FakeTensorMode.

No driver is needed, and a tensor that was left on the CPU raises where it meets one of the device. What it cannot run:
gradients, `.numpy()`, pinned copies, autocast, and whatever looks at values. tests/test_gpu.py has those, on a GPU.
"""

from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from conformance import CHANNELS, COUNTS, fitted_hosts, gradient_hosts, make_features, make_host, prepared
from pipeline_builders import CPU, make_stage2_cache, silent
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.func import vmap

from h2t.cache.reader import open_cache
from h2t.pipeline.base import plugins
from h2t.pipeline.data.images import Transform
from h2t.pipeline.evaluation import scoring
from h2t.pipeline.evaluation.scoring import score_stage1
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.on_gpu import stored_pass
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.draws import Draws
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.stack import Stack
from h2t.pipeline.heads.stored import HeadParts, Heads, build_head
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.loop import StageOne
from h2t.pipeline.training.parallel import Group
from h2t.pipeline.training.settings import Training

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(
    TORCH < (2, 10) and not torch.cuda.is_available(), reason="torch below 2.10 asks for a driver"
)

GPU = torch.device("cuda", 0)
SELECTIONS = ("random", "first", "mixup", "shuffled")


@pytest.fixture
def fake():
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a module that moves gets fake parameters
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake") / "c"
    return make_stage2_cache(folder, counts=COUNTS, shape=(CHANNELS, 2, 2), experts=2)


def on_gpu(tensors):
    return {name: torch.empty(t.shape, dtype=t.dtype, device=GPU) for name, t in tensors.items()}


def backbone(name, experts=1):
    """With numbers: `.to` then gives it tensors of the device."""
    module = plugins.load("backbones", name)
    with unset_fake_temporarily():
        return module.build(module.Options(experts=experts))


def test_the_mode_finds_a_tensor_left_on_the_cpu(fake):
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2, device=GPU) + torch.zeros(2)


@pytest.mark.parametrize("name", ["resnet20", "resnet50"])
def test_extraction(fake, name):
    net = backbone(name).to(GPU).eval()
    pixels = torch.empty(2, 64, 64, 3, dtype=torch.uint8, device=GPU)
    with torch.no_grad():
        *maps, largest = stored_pass(
            net, Transform(size=64, mean=[0.5] * 3, std=[0.5] * 3), "float32", torch.float16, pixels
        )
    assert {m.device for m in (*maps, largest)} == {GPU}
    assert {m.dtype for m in maps} == {torch.float16}
    assert largest.shape == ()


def test_statistics(fake):
    """As they are put in place, moved by a pass and taken back; the cumulative average itself looks at values."""
    net = backbone("resnet20").to(GPU)
    batchnorm.use(net.eval(), batchnorm.current(net))
    with torch.no_grad():
        net.train()(torch.empty(2, 3, 8, 8, device=GPU))
    assert {t.device for t in batchnorm.current(net).values()} == {CPU}
    assert {b.device for b in net.buffers()} == {GPU}


@pytest.mark.parametrize("name", plugins.names("objectives"))
@pytest.mark.parametrize("more", [{"mixup": 0.0}, {"mixup": 1.0}])
def test_stage_one_up_to_its_loss(fake, digits, name, more):
    samples, images = digits
    module = plugins.load("objectives", name)
    net = backbone("resnet20", experts=2)
    with unset_fake_temporarily():
        objective = module.Objective(module.Loss(), net.channels, 2, torch.tensor(samples.counts))
    if objective.first_branch_share(0.0) is not None and more["mixup"]:
        pytest.skip("its two batches are mixed already")
    training = StageOne(Training(batch_size=8, **more), net, objective, samples, images, 0, Group(GPU, 0, 1))
    parts = next(training.batches.of(0))
    part = parts[0]
    x = torch.empty(len(part.samples) * (2 if part.second else 1), 3, 8, 8)
    for epoch in (0, 199):
        loss, right = training._loss(part, x, epoch)
        assert loss.device == right.device == GPU


def host_of(name):
    """Made with numbers: a host looks at class counts."""
    with unset_fake_temporarily():
        return make_host(name, experts=2)


def open_stack(opened, name, tier, pooled, selections=SELECTIONS):
    made = host_of(name)
    host = plugins.load("hosts", name).Host
    read_under = "instance" if host.receiver == "instance" else "balanced"
    streams = Streams(
        opened.rows, opened.spec.provenance["classes"], read_under, {"instance": "instance"}, [0, 1], 4,
        receiver=host.receiver, partner=host.partner,
    )  # fmt: skip
    with unset_fake_temporarily():
        context = Context(torch.from_numpy(streams.index.counts), CHANNELS, 2, 4)
        parts = HeadParts(name, {}, made.classifier, made.scale, made.pool, {}, "hosts.fake")
        head = build_head(parts, context)
    pooled = pooled and host.reads != "maps"
    reader = FeatureReader(opened, (lambda m: head.pool({}, m)) if pooled else None)
    feed = Feed(streams, reader, Choice(tier, "test"), 10 * reader.row_bytes, GPU, silent)
    heads = [HeadSetting(r, "instance", s, seed) for r in (0.0, 0.5) for s in selections for seed in (0, 1)]
    stack = Stack(head, heads, feed)
    stack.start(made.stage1)
    return stack


def on_the_gpu(stack):
    """The first step of a window, its draws copied one by one: pinned memory needs a driver."""
    at = stack.feed._load(0, range(2))[0]
    drawn = {name: tensor.to(GPU) for name, tensor in stack.drawn(0, [0], [at.batch])[0].items()}
    rows = [([torch.from_numpy(p).to(GPU) for p in at.table.find(r)], r.shape) for r in stack._gathered(at.batch)]
    return replace(at, draws=Draws(rows, **drawn))


#: Gradients inside a loss, and copies of whole maps, which a device without hardware cannot make.
NESTED = {"meta_saug", "cam_split"}


@pytest.mark.parametrize(
    ("name", "tier"), [*((name, "device") for name in gradient_hosts() if name not in NESTED), ("dr", "stream")]
)
def test_features_fusion_and_losses_of_a_stack(fake, cache, name, tier):
    """A window as it is loaded (its thread would not know the mode), and a step up to the losses of all heads."""
    with open_cache(cache) as opened:
        stack = open_stack(opened, name, tier, pooled=True)
        at = on_the_gpu(stack)
        given, donors = stack.given(at, 0.5)
        assert all(part.device == GPU for part in given if isinstance(part, torch.Tensor))
        x = stack.fused(at.draws, given.features, donors)
        assert x.device == GPU
        of_heads = given.of(stack._seed, x)
        state = {k: t.detach() for k, t in stack.state.items()}
        losses = vmap(stack.head.batch_loss, in_dims=(0, of_heads.axes))(state, of_heads)
        assert losses.shape == (16,)
        assert losses.device == GPU
        updated = vmap(stack.head.update)(state, x, of_heads.labels)
        assert all(t.device == GPU for t in updated.values())
        if stack.at_once:
            for selections in (("random",), ("shuffled",)):  # folded, and fused
                stack = open_stack(opened, name, tier, pooled=True, selections=selections)
                at = on_the_gpu(stack)
                given, donors = stack.given(at)
                (products,) = stack._products(at.draws, given.features, donors)
                state = {k: t.detach() for k, t in stack.state.items()}
                logits = stack.linear_heads._logits(products, state)
                of_heads = given._replace(partners=None).of(stack._seed, logits)
                found = stack.linear_heads._losses(state, of_heads)
                weights = stack.linear_heads._of_logits(products, state, logits.mT)
                assert all((t.shape, t.device) == (state[name].shape, GPU) for name, t in weights.items())
                assert (found.shape, found.device) == ((4,), GPU)


@pytest.mark.parametrize("name", sorted({*gradient_hosts(), *fitted_hosts()} - {"logistic_regression", "ncm", "httn"}))
def test_hosts_on_features_of_the_device(fake, name):
    made = host_of(name)
    labels = torch.empty(7, dtype=torch.long, device=GPU)
    features = on_gpu({"x": make_features(made, 7, 2)})["x"].float()
    if name in gradient_hosts():
        if made.host.prepares:
            with unset_fake_temporarily():
                prepared(made)
        state = on_gpu(made.host.initial(made.stage1, np.random.default_rng(0)))
    else:
        state = on_gpu(made.host.fit(features, labels, made.stage1))
    found = made.host.logits({k: t.float() for k, t in state.items()}, features)
    assert (found.shape, found.device) == ((7, len(COUNTS)), GPU)


@pytest.mark.parametrize("name", plugins.names("pools"))
def test_pools(fake, name):
    module = plugins.load("pools", name)
    pool = module.Pool(module.Options(), CHANNELS)
    assert pool(on_gpu(pool.initial()), torch.empty(2, 5, CHANNELS, 3, 3, device=GPU)).device == GPU


def test_scoring(fake, cache):
    parts = HeadParts("dr", {}, "linear", 1.0, "gap", {}, "hosts.fake")
    context = {"counts": list(COUNTS), "channels": CHANNELS, "experts": 2, "pixels": 4}
    state = {"weight": torch.empty(3, 2, len(COUNTS), CHANNELS), "bias": torch.empty(3, 2, len(COUNTS))}
    heads = Heads(state, pa.table({"number": [0, 1, 2]}), {**asdict(parts), **context})
    with open_cache(cache) as opened:
        ((_, found),) = scoring._logits_in_blocks(opened, heads, np.arange(9), GPU)
        assert (found.shape, found.device) == ((3, 9, len(COUNTS)), GPU)
        head = StageOneHead({k: t[0] for k, t in state.items()}, "linear", 1.0)
        with pytest.raises(DataDependentOutputException):  # the logits have arrived, and their values are looked at
            score_stage1(opened, head, "test", GPU)


def test_a_predicted_image(fake):
    net = backbone("resnet20").to(GPU).eval()
    maps = net(torch.empty(2, 3, 32, 32).to(GPU))
    assert global_average(maps[0]).device == GPU

"""What every plug-in must satisfy, as functions that raise AssertionError. The tests run them over the file listings
and over files dropped into a plug-in folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pipeline_builders import distance, make_stack, make_stage1_head, trained

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.heads.host import Context, FittedHost, GradientHost, TrainingBatch
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import StageOneHead

COUNTS = (30, 12, 3, 1)
CHANNELS = 20


@dataclass(frozen=True)
class Made:
    """A host of default constants with what suits it."""

    name: str
    classifier: str
    scale: float
    pool: str
    host: Any
    stage1: StageOneHead

    @property
    def options(self) -> dict[str, Any]:
        """For `make_stack`."""
        return {
            "host": self.name,
            "classifier": self.classifier,
            "scale": self.scale,
            "pool": self.pool,
            "stage1": self.stage1,
            "pooled": self.host.reads != "maps",
        }


def make_host(name: str, counts=COUNTS, channels=CHANNELS, experts=1, pixels=4, loss=None, classifier=None) -> Made:
    """Host `name` with the first classifier that it takes."""
    module = plugins.load("hosts", name)
    context = Context(torch.tensor(counts), channels, experts, pixels)
    for kind in (classifier,) if classifier else ("linear", "cosine"):
        scale = 1.0 if kind == "linear" else 20.0
        try:
            host = module.Host(module.Loss(**(loss or {})), kind, scale, context)
        except UserError:
            continue
        stage1 = make_stage1_head(len(counts), channels, experts, classifier=host.classifier)
        return Made(name, kind, scale, "moments" if host.numbers == 2 else "gap", host, stage1)
    raise AssertionError(f"{name} takes neither classifier")


def gradient_hosts() -> list[str]:
    return [n for n in plugins.names("hosts") if issubclass(plugins.load("hosts", n).Host, GradientHost)]


def fitted_hosts() -> list[str]:
    return [n for n in plugins.names("hosts") if issubclass(plugins.load("hosts", n).Host, FittedHost)]


def make_features(made: Made, batch: int, experts=1, seed=0) -> torch.Tensor:
    """Features (E, B, D) as the host's pool gives them, float64, from maps of 4 pixels."""
    maps = torch.randn(experts, batch, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(seed)).double().abs()
    if made.host.numbers == 2:
        return torch.stack([maps.mean((-2, -1)), maps.square().mean((-2, -1))], -1)
    return global_average(maps)


def training_features(made: Made) -> torch.Tensor:
    """Features (E, N, D) of as many training samples as the host's context counts, float64, sorted by class."""
    return make_features(made, int(made.host.context.counts.sum()), made.host.context.experts, seed=9)


def prepared(made: Made) -> Any:
    """The host, after it saw the training features where it asks for them."""
    if made.host.prepares:
        counts = made.host.context.counts
        labels = torch.arange(len(counts)).repeat_interleave(counts)
        made.host.prepare(training_features(made), labels, made.stage1)
    return made.host


def make_batch(host: Any, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None) -> TrainingBatch:
    """A batch halfway through the training; its partners are the same samples in reverse order."""
    counts = host.context.counts
    batch = TrainingBatch(features, labels, noise, samples=(counts.cumsum(0) - counts)[labels], progress=0.5)
    if host.partner is None:
        return batch
    return batch._replace(partners=features.flip(1), partner_labels=labels.flip(0))


def augmented(host: Any, batch: TrainingBatch) -> TrainingBatch:
    """The batch as the loss gets it. A host that reads maps gets some whose means are the features."""
    if host.reads != "maps":
        return batch._replace(features=host.augment(batch))
    uneven = torch.tensor([[0.5, 1.5], [1.75, 0.25]], dtype=torch.float64)
    maps = [x[..., None, None] * uneven for x in (batch.features, batch.partners)]
    return batch._replace(features=global_average(host.augment(batch._replace(features=maps[0], partners=maps[1]))))


def check_head_alone(
    name: str, cache: Path, experts: int = 1, pooled: bool = True, dtypes=(torch.float32, torch.float64)
) -> None:
    """Head k of a stack is head k alone: 1e-5 of the largest weight in float32, 1e-9 for each element in float64."""
    heads = [{"ratio": r, "selection": s, "seed": seed} for r in (0.0, 0.3, 1.0) for s in SELECTIONS for seed in (0, 3)]
    made = make_host(name, experts=experts)
    pooled = {"any": pooled, "features": True, "maps": False}[made.host.reads]
    for dtype in dtypes:
        options = {**made.options, "pooled": pooled, "dtype": dtype, "batch_size": 16}
        together, losses = trained(make_stack(cache, heads, **options), lr=0.02)
        assert all(torch.isfinite(x).all() for x in losses)
        for k in (2, 6, 11, 17):  # every ratio, selection and seed
            alone, _ = trained(make_stack(cache, [heads[k]], **options), lr=0.02)
            for key, expected in alone.items():
                if dtype == torch.float32:
                    assert distance(together[key][k], expected[0]) <= 1e-5, (key, heads[k])
                else:
                    assert float((together[key][k] - expected[0]).abs().max()) <= 1e-9, (key, heads[k])


SELECTIONS = ("random", "first", "mixup")


def check_ratio_0(name: str, cache: Path, other: Path) -> None:
    """At ratio 0 nothing of the donors matters: `other` differs from `cache` in their rows only."""
    made = make_host(name)
    heads = [{"ratio": 0.0}, {"ratio": 0.5}]
    first, _ = trained(make_stack(cache, heads, **made.options))
    second, _ = trained(make_stack(other, heads, **made.options))
    for key in first:
        assert torch.equal(first[key][0], second[key][0])
    if made.host.receiver == "balanced":  # others receive the changed rows themselves
        assert any(not torch.equal(first[key][1], second[key][1]) for key in first)


def loss_of(made: Made, features: torch.Tensor, labels: torch.Tensor, seed=0) -> tuple[torch.Tensor, dict, Any]:
    """(loss, state that requires gradients, noise) in float64 at the start."""
    host = prepared(made)
    start = host.initial(made.stage1, stream(seed, "initial"))
    state = {k: t.detach().double().requires_grad_(k not in host.fixed) for k, t in start.items()}
    noise = host.noise(stream(seed, "noise", 0, 0), len(labels))
    noise = None if noise is None else noise.double()
    return host.batch_loss(state, augmented(host, make_batch(host, features, labels, noise))), state, noise


def check_gradients(name: str, counts: tuple[int, ...]) -> None:
    """Finite gradients of a finite scalar, also for a batch of one class and for features of 0."""
    made = make_host(name, counts)
    batches = [
        (make_features(made, 6), torch.arange(6) % len(counts)),
        (make_features(made, 4), torch.zeros(4, dtype=torch.long)),
        (torch.zeros_like(make_features(made, 4)), torch.full((4,), len(counts) - 1)),
    ]
    for features, labels in batches:
        loss, state, _ = loss_of(made, features, labels)
        assert loss.shape == ()
        assert torch.isfinite(loss)
        moving = [t for t in state.values() if t.requires_grad]
        assert moving
        for gradient in torch.autograd.grad(loss, moving, allow_unused=True):
            assert gradient is None or torch.isfinite(gradient).all()


def check_fit(name: str, counts: tuple[int, ...]) -> None:
    """A finite fit with finite logits, also with classes of one sample and for features of 0."""
    made = make_host(name, counts)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = training_features(made).float()
    for given in (features, torch.zeros_like(features)):
        state = {k: t.float() for k, t in made.host.fit(given, labels, made.stage1).items()}  # as they are stored
        assert all(torch.isfinite(t).all() for t in state.values())
        found = made.host.logits(state, given)
        assert found.shape == (len(labels), len(counts))
        assert torch.isfinite(found).all()


def check_logits(name: str) -> None:
    """Logits (B, K) of float; a sample's do not depend on its neighbours at evaluation."""
    made = make_host(name)
    if isinstance(made.host, FittedHost):
        labels = torch.arange(12) % len(COUNTS)
        state = made.host.fit(make_features(made, 12).float(), labels.sort().values, made.stage1)
    else:
        state = prepared(made).initial(made.stage1, stream(0, "initial"))
    state = {k: t.detach().double() for k, t in state.items()}
    features = make_features(made, 5)
    with torch.no_grad():
        found = made.host.logits(state, features)
        assert found.shape == (5, len(COUNTS))
        assert torch.isfinite(found).all()
        assert torch.allclose(made.host.logits(state, features[:, 2:3]), found[2:3], atol=1e-12)


def check_backbone(name: str, size: int = 16) -> None:
    """A tuple of one map per expert with the channels it states; a row does not depend on its neighbours."""
    module = plugins.load("backbones", name)
    net = module.build(module.Options()).eval()
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        maps = net(x)
        assert isinstance(maps, tuple)
        assert len(maps) == net.experts
        for m, alone in zip(maps, net(x[1:2]), strict=True):
            assert m.shape[:2] == (3, net.channels)
            assert m.dim() == 4
            assert torch.allclose(m[1:2], alone, rtol=1e-4, atol=1e-4)

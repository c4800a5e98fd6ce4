"""Base classes of hosts, the stage-II methods: which parameters are trained, how they give logits, and the loss.

A host describes one classifier; `heads.stack` trains many at once. `torch.func.vmap` adds the stack's axis, so tensors
in `logits`, `loss` and `update` have the shapes of one classifier. These methods must not draw random numbers: all
randomness comes in through `initial` and `noise`. Under vmap a tensor's values cannot decide what is computed: use
`torch.where` and indices in place of `if` and boolean masks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar

import numpy as np
import torch

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.networks.classifier import expert_logits, expert_mean, logits
from h2t.pipeline.networks.trained import StageOneHead
from h2t.pipeline.training.longtail import cross_entropy, log_prior, mixed_cross_entropy
from h2t.pipeline.training.weighted import WeightedLoss

State = Mapping[str, torch.Tensor]
Method = TypeVar("Method", bound=Callable[..., torch.Tensor])


def stackable(method: Method) -> Method:
    """Marks a `loss` or `logits` whose tensors may all have the stack's axis in front, and its result then too.

    If both are marked, the losses of a stack are computed without vmap, which costs more than the loss of a small head.
    """
    method.stackable = True  # type: ignore[attr-defined]
    return method


def is_stackable(host: "GradientHost") -> bool:
    """Whether its `loss` and `logits` are marked. An override without the mark counts, not what it overrides."""
    whole = type(host).batch_loss is GradientHost.batch_loss
    return whole and all(hasattr(method, "stackable") for method in (host.loss, host.logits))


def is_cross_entropy(host: "GradientHost") -> "TypeGuard[CrossEntropyHost]":
    """Whether its loss is that of `CrossEntropyHost`, and its logits are the mean of its experts' logits."""
    if not isinstance(host, CrossEntropyHost):
        return False
    own = type(host)
    inherited = own.loss is CrossEntropyHost.loss and own.with_prior is CrossEntropyHost.with_prior
    return inherited and own.logits is Host.logits


@dataclass(frozen=True)
class Context:
    """What a host knows about its task.

    `counts`: training samples per class, int64 (K,), in descending order. `channels`: D, the features that the
    classifier gets: C of the maps, unless a frozen part between pool and classifier changes it. `experts`: E.
    `pixels`: H x W of the maps.
    """

    counts: torch.Tensor
    channels: int
    experts: int
    pixels: int = 1

    @property
    def classes(self) -> int:
        return len(self.counts)


class TrainingBatch(NamedTuple):
    """What a loss can depend on besides the parameters.

    `features` (E, B, D), after fusion and pooling; `labels` of the receivers (B,), int64; `noise` as drawn. `samples`
    (B,), int64: the place of each receiver in the features that `prepare` got. `partners` (E, B, D), not fused, and
    `partner_labels` (B,): samples of a second sampler, for hosts that name one. `progress`: finished epochs / epochs,
    0 in the first epoch. A tensor that the host did not ask for is None; the type is Any, as no host reads such a one.
    """

    features: torch.Tensor
    labels: torch.Tensor
    noise: Any = None
    samples: Any = None
    partners: Any = None
    partner_labels: Any = None
    progress: float = 0.0

    def of(self, seeds: torch.Tensor | int, features: torch.Tensor) -> "TrainingBatch":
        """Of a batch with a leading axis of seeds, the part of one seed, or of several heads, each by its seed's index.

        `features` as given.
        """
        rest = (part[seeds] if isinstance(part, torch.Tensor) else part for part in self[1:])
        return TrainingBatch(features, *rest)  # type: ignore[arg-type]

    @property
    def axes(self) -> Any:
        """The axis of the heads in each part, for vmap."""
        return TrainingBatch(*(0 if isinstance(part, torch.Tensor) else None for part in self))  # type: ignore[arg-type]


class Host:
    """What all hosts share: a classifier on pooled features (E, B, D), by default `networks.classifier.logits`."""

    #: The keys under hosts.<name>.loss of a plug-in file without a class `Loss`: none.
    Loss: type[Section] = Section
    #: True for a closed-form fit, False for gradient descent.
    fitted = False
    #: The sampler that draws the receivers of the training batches.
    receiver = "balanced"
    #: Numbers per channel in its features: 1, or 2 with pool `moments`, whose features are (E, B, D, 2).
    numbers = 1
    #: Where it starts: from the backbone's `head` or `hosts.NAME.start`; from class `means` unless that says otherwise;
    #: from the classifier that stage I `trained` and nothing else; or from its `own` weights.
    starts_from: Literal["head", "means", "trained", "own"] = "head"
    #: Factor of its cosine logits unless `hosts.NAME.scale` has one; None is that of the backbone's head.
    usual_scale: float | None = None
    #: True if the training loss depends on the features, `weight` and `bias` only through `expert_logits` of a linear
    #: or cosine classifier. Many such heads get their logits from one matrix product.
    linear = False
    #: The one kind of classifier that it takes; None if it takes both.
    only_classifier: Literal["linear", "cosine"] | None = None
    #: The plug-in's `loss`.
    constants: Any
    classifier: str
    scale: float
    context: Context

    def __init__(self, *given: Any) -> None:
        """Hosts are made with (loss, classifier, scale, context). Those of version 0.1.0 pass on the last three alone.

        Raises UserError for a kind of classifier that the host does not take.
        """
        *loss, self.classifier, self.scale, self.context = given
        if loss:
            self.constants = loss[0]
        kind, name = self.only_classifier, type(self).__module__.rpartition(".")[2]
        if kind not in (None, self.classifier):
            raise UserError(
                f"classifier: host {name} needs a {kind} classifier; got {self.classifier!r}; set it to {kind}"
            )

    def stage1_state(self, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """A copy of the parameters it starts from: those of stage I, or what stands in their place.

        Raises UserError if they do not fit this host.
        """
        if not stage1.state:
            raise UserError(
                "this host starts from a classifier, and this backbone has none, like features that were imported; fit "
                "one (head: probe; for imported features h2t probe NAME CACHE OUT, then OUT as the backbone), set "
                "start: means, or use crt, ncm or logistic_regression"
            )
        if stage1.classifier != self.classifier:
            free = self.only_classifier is None and self.classifier in ("linear", "cosine")
            ways = ["change this key"] if free else []
            ways += ["set start: means"] if self.starts_from == "head" else []
            raise UserError(
                f"classifier: must be of the same kind as in stage I, {stage1.classifier}; got {self.classifier}; "
                + ", or ".join([*ways, "choose a backbone that was trained with this classifier"])
            )
        context = self.context
        expected = (context.experts, context.classes, context.channels)
        shape = tuple(stage1.state["weight"].shape)
        if shape != expected:
            raise UserError(
                f"stage-I classifier: (experts, classes, channels) must be {expected}, as in the cache; got {shape}; "
                "train the backbone again on this data"
            )
        return {name: tensor.clone() for name, tensor in stage1.state.items()}

    def expert_logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits of each expert (E, B, K)."""
        return expert_logits(self.classifier, state, features, self.scale)

    @stackable
    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K), the mean over the experts. At evaluation, features are not fused."""
        return logits(self.classifier, state, features, self.scale)


class GradientHost(Host):
    """Base of hosts that are trained by gradient descent. A subclass defines `loss` and overrides what differs."""

    #: Factor on the learning rate of single parameters, name -> factor; 1 for all others.
    rates: Mapping[str, float] = {}
    #: Names of the parameters that the optimiser does not change.
    fixed: frozenset[str] = frozenset()
    #: A second sampler: its samples, one per receiver, come with every batch as `partners`. They are drawn apart from
    #: the donors and read under the statistics of the receivers, so H2T and its absence mean the same as elsewhere.
    partner: str | None = None
    #: Whether it needs whole `maps`, or `features` that are pooled before fusion; `any` works with both.
    reads: Literal["any", "features", "maps"] = "any"
    #: Its parameters, in multiples of those of a linear classifier; memory is planned by it.
    size: float = 1.0

    @classmethod
    def needs(cls) -> str:
        """What it needs besides features and labels of a batch, in words; empty if that is nothing."""
        found = {
            "whole maps": cls.reads == "maps",
            "training features": cls.prepare is not GradientHost.prepare,
            f"a second sampler ({cls.partner})": cls.partner is not None,
        }
        return ", ".join(words for words, needed in found.items() if needed)

    @property
    def prepares(self) -> bool:
        """Whether it looks at the training samples before the first step."""
        return type(self).prepare is not GradientHost.prepare

    @property
    def augments(self) -> bool:
        """Whether it changes receivers before fusion."""
        return type(self).augment is not GradientHost.augment

    @property
    def noisy(self) -> bool:
        """Whether its loss has a random part."""
        return type(self).noise is not GradientHost.noise

    def prepare(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> None:
        """Called once, before `initial`: keeps as attributes what the other methods need to know of the samples.

        `features` (E, N, D): those of view 0 of every training sample, not fused, in ascending order of `labels` (N,).
        Kept values are constants, shared by all classifiers of the host.
        """

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """Initial parameters: the stage-I classifier (H2T paper, Algorithm 1). Raises UserError if it does not fit."""
        return self.stage1_state(stage1)

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor | None:
        """The random part of the loss of one batch, or None. Called once per (host, seed, step)."""
        return None

    def loss_numbers(self) -> int:
        """How many numbers the loss makes for a head, beside a few copies of its logits; memory is planned by it."""
        return 0

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of a batch, a scalar: features (E, B, D) after fusion and pooling, labels of the receivers (B,)."""
        raise NotImplementedError

    def batch_loss(self, state: State, batch: TrainingBatch) -> torch.Tensor:
        """The loss of a batch, a scalar. Override it in place of `loss` where features, labels and noise do not do."""
        return self.loss(state, batch.features, batch.labels, batch.noise)

    def augment(self, batch: TrainingBatch) -> torch.Tensor:
        """The receivers after an augmentation of features or maps; by default as they are.

        `batch` is that of one seed: its `features` are the receivers before fusion, (E, B, C) or maps (E, B, C, H, W),
        as are `partners`. Called once per seed and step, without vmap and without gradients.
        """
        return batch.features

    def update(self, state: State, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """New values of `fixed` parameters after a step, such as running means; none by default."""
        return {}


class ClassScaleHost(GradientHost):
    """Base of hosts with a trained scale per class: logits s * (W f + b), `class_scale` s (E, K), initially 1.

    Source: "learnable weight scaling" of Kang et al., ICLR 2020, section 4.1.
    """

    linear = True

    def initial(self, stage1: StageOneHead, draws: np.random.Generator) -> dict[str, torch.Tensor]:
        """The stage-I classifier with scales of 1. Raises UserError if it does not fit."""
        state = self.stage1_state(stage1)
        return {**state, "class_scale": torch.ones(state["weight"].shape[:2])}

    @stackable
    def logits(self, state: State, features: torch.Tensor) -> torch.Tensor:
        """Features (E, B, D) -> logits (B, K), the mean over the experts."""
        return expert_mean(self.expert_logits(state, features) * state["class_scale"].unsqueeze(-2))


class CrossEntropyHost(GradientHost):
    """Base of hosts whose loss is the mean cross-entropy of the logits plus a constant `prior` (K,), if they set one.

    Where `linear`, `heads.linear_heads` computes the gradient without autograd; a step of ten classifiers takes a
    quarter less time.
    """

    prior: torch.Tensor | None = None

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean cross-entropy of the batch."""
        return cross_entropy(self.with_prior(self.logits(state, features)), labels)

    def with_prior(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., K) plus the prior."""
        return logits if self.prior is None else logits + self.prior.to(logits)


class PriorHost(CrossEntropyHost):
    """Base of hosts that train on instance-wise batches by cross-entropy of the logits plus tau log(n_j / N).

    Plain logits at test time. Source: Menon et al., ICLR 2021, eq. (10); with tau 1, Ren et al., NeurIPS 2020, eq. (3).
    """

    linear = True
    receiver = "instance"
    prior: torch.Tensor
    #: Strength of the prior; None is the constant of this name.
    tau: float | None = None

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.prior = (self.constants.tau if self.tau is None else self.tau) * log_prior(self.context.counts)


class WeightedHost(GradientHost):
    """Base of hosts that train on instance-wise batches by a loss that weights samples (`training.weighted`)."""

    linear = True
    receiver = "instance"

    def __init__(self, loss: WeightedLoss, classifier: str, scale: float, context: Context) -> None:
        super().__init__(loss, classifier, scale, context)
        self.weights = loss.class_weights(context.counts)

    @stackable
    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The weighted losses, averaged over the batch."""
        return self.constants.mean(self.logits(state, features), labels, self.weights)


class MixingHost(GradientHost):
    """Base of hosts that mix each sample's features and label with those of another sample of the batch.

    h' = t h_i + (1 - t) h_s(i), and the loss is mean_i [u CE(z(h'), y_i) + (1 - u) CE(z(h'), y_s(i))]: one share t from
    Beta(alpha, alpha) and one permutation s for each batch; a subclass says what u is.
    """

    linear = True
    receiver = "instance"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.linear = self.classifier == "linear"  # whose logits of mixed features are mixed logits

    def label_share(self, share: torch.Tensor, labels: torch.Tensor, partners: torch.Tensor) -> torch.Tensor:
        """The share u of each sample's own label (B,), from the share t (B,) of its features and the labels (B,)."""
        raise NotImplementedError

    def noise(self, draws: np.random.Generator, batch: int) -> torch.Tensor:
        """(batch, 2), float64: the permutation, and t in each line."""
        order, alpha = draws.permutation(batch), self.constants.alpha
        return torch.from_numpy(np.stack([order, np.full(batch, draws.beta(alpha, alpha))], 1))

    def loss(
        self, state: State, features: torch.Tensor, labels: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The mixed loss, averaged over the batch."""
        assert noise is not None
        order, share = noise[:, 0].long(), noise[:, 1]
        partners = labels[order]
        mixed = torch.lerp(features[:, order], features, share.unsqueeze(-1))
        shares = self.label_share(share, labels, partners)
        return mixed_cross_entropy(self.logits(state, mixed), labels, partners, shares)


class FittedHost(Host):
    """Base of hosts with a closed-form fit on all training samples. They have no batches and no donors, so no H2T."""

    fitted = True
    receiver = "instance"
    #: True if the fit holds the logits of all training samples, (E, N, K).
    holds_logits = False

    @classmethod
    def needs(cls) -> str:
        """What it needs besides features and labels of a batch, in words."""
        return "all training features at once"

    def fit(self, features: torch.Tensor, labels: torch.Tensor, stage1: StageOneHead) -> dict[str, torch.Tensor]:
        """The parameters, from features (E, N, D) and labels (N,) of the training samples, in ascending label order."""
        raise NotImplementedError

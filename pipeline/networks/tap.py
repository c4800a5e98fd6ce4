"""Backbones made of whole networks of other packages, and the proof that they are cut in the right place.

The proof: pooling, the layers after it and the network's own classifier, on the maps of the backbone, must give the
network's own logits. What follows the maps is found by watching which modules see the pooled maps and what comes of
them; no network is known by name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError, in_brief, of_the_machine
from h2t.pipeline.base.text import some
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.frozen import FrozenPart, Layer, is_linear, kinds_of, layer, same
from h2t.pipeline.networks.layouts import Features, as_maps

TOLERANCE = 1e-4  # largest difference of logits / largest logit: float32 rounds differently in another order of sums
NAMED = 4  # modules that a message names

#: A module between pooling and classifier, with the kinds of layers that compute what it does (`frozen.Layer`).
After = tuple[nn.Module, tuple[str, ...]]


@dataclass(frozen=True)
class Ending:
    """What follows the maps of a network: the modules `after` pooling, and the name of its linear `classifier`.

    Both are empty if the network's own logits cannot be computed from its pooled maps; `why` then says what is in the
    way. `classifier` alone is empty for a network that ends in an embedding.
    """

    after: tuple[After, ...] = ()
    classifier: str = ""
    why: str = ""


@dataclass(frozen=True)
class _Call:
    """A call of a module that turned one vector per image into another."""

    name: str
    module: nn.Module
    given: torch.Tensor
    result: torch.Tensor


class Tapped(Backbone):
    """A network of another package up to its last maps: (B, 3, S, S) -> one map (B, C, H, W).

    State-dict keys are the network's own. A subclass defines `trunk` and, if the network has an output of its own,
    `whole`. Modules that neither the maps nor the layers after pooling need are removed.
    """

    _model: Any
    ending: Ending
    features: Features
    prefix: int | None

    def __init__(self, model: nn.Module, channels: int, features: Features, side: int, prefix: int | None) -> None:
        """`side`: of an input that the network takes, in pixels. `prefix`: prefix tokens, None if unknown.

        Raises UserError if the network has no such features.
        """
        super().__init__()
        self._hold(model)
        # In this way they cannot take the place of modules that the network calls so.
        vars(self).update(channels=channels, features=features, prefix=prefix)
        self.eval()
        whole = set(self.state_dict())
        ending, reached = find_ending(self, side)
        vars(self).update(ending=ending, last_layer=ending.classifier or "fc")
        if ending.classifier:
            weight: Any = model.get_submodule(ending.classifier).weight
            vars(self).update(last_kernel=tuple(weight.shape[2:]))
        vars(self).update(modules_after=tuple(module for module, _ in ending.after))
        self.cut(side, reached)
        vars(self).update(unused=frozenset(whole - set(self.state_dict())))
        self.train()

    def _hold(self, model: nn.Module) -> None:
        """Becomes `model`: both hold the same dictionaries, so what is moved, trained or loaded in one is in both."""
        self.__dict__["_model"] = model
        for held in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[held] = getattr(model, held)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) -> the network's last maps or tokens, in its own layout."""
        raise NotImplementedError

    def whole(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        """Images (B, 3, S, S) -> the network's own logits (B, K) or embedding (B, D); None if it has neither.

        `values`: what `trunk` gives for `x`, which saves a second pass if the network's head can be called by itself.
        """
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Tapped":
        """Sets the mode of all modules, and of the network itself."""
        super().train(mode)
        self._model.train(mode)
        return self

    def after_pool(self) -> tuple[Layer, ...]:
        """The network's layers between pooling and classifier."""
        return tuple(layer(kind, module) for module, kinds in self.ending.after for kind in kinds)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, S, S) -> one map (B, C, H, W)."""
        image = (x.shape[2], x.shape[3])
        return (as_maps(self.trunk(x), self.channels, image, self.prefix, self.features),)

    def cut(self, side: int, reached: set[nn.Module]) -> None:
        """Removes the classifier, and each of the network's parts that no forward pass of the backbone reaches.

        `reached`: the modules that were called for the maps.
        """
        if self.ending.classifier:
            parent, _, name = self.ending.classifier.rpartition(".")
            setattr(self._model.get_submodule(parent), name, nn.Identity())
        needed = reached.union(module for module, _ in self.ending.after)
        gone = {
            name: part
            for name, part in self._model.named_children()
            if any(True for _ in part.parameters()) and not needed & set(part.modules())
        }
        if not gone:
            return
        for name in gone:
            delattr(self._model, name)
        try:
            with torch.no_grad():
                self.trunk(torch.zeros(1, 3, side, side))
        except AttributeError:  # a part is used without being called
            for name, part in gone.items():
                self._model.add_module(name, part)


@contextmanager
def size_taken(side: int) -> Iterator[None]:
    """Raises UserError if a network called in the block takes no images of `side` pixels or of three colours."""
    try:
        yield
    except TypeError as error:  # a call with images alone
        raise UserError(
            f"options.model: the network must take images alone; it says: {in_brief(error)}; choose another network"
        ) from None
    except (AssertionError, RuntimeError, ValueError) as error:
        if of_the_machine(error):
            raise
        raise UserError(
            f"input.size: the network must take images of 3 x {side} x {side}; it says: {in_brief(error)}; set "
            "backbones.NAME.input.size to a size that it takes, or choose another network"
        ) from None


@torch.no_grad()
def find_ending(backbone: Tapped, side: int) -> tuple[Ending, set[nn.Module]]:
    """(what follows the maps of `backbone`, the modules called for the maps). The backbone is in eval mode.

    Raises UserError if there are no such features.
    """
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = backbone._model
    with _telling(model):
        calls: list[_Call] = []
        found_maps: list[str] = []  # modules that gave the maps
        following: list[str] = []  # modules called after the one that gave the maps
        reached: set[nn.Module] = set()
        with _hooked(model, lambda name, module, given, result: reached.add(module)), size_taken(side):
            values = backbone.trunk(x)
        if not isinstance(values, torch.Tensor):
            raise UserError(
                "options.model: the network must give one tensor of maps or tokens; got "
                f"{len(values) if isinstance(values, list | tuple) else 'none'}; choose another network"
            )

        def record(name: str, module: nn.Module, given: torch.Tensor | None, result: Any) -> None:
            several = isinstance(result, list | tuple | Mapping) and bool(result)
            if several and found_maps:  # of a module around the one that gave the maps
                return
            first = next(iter(result.values() if isinstance(result, Mapping) else result)) if several else result
            if isinstance(first, torch.Tensor) and first.shape == values.shape and torch.equal(first, values):
                found_maps.append(name)
                following.clear()
                calls.clear()
                return
            if not list(module.children()):
                following.append(name)
            if given is not None and _is_vector(result):
                calls.append(_Call(name, module, given, result.clone()))

        with _hooked(model, record):
            logits = backbone.whole(x, values.clone())
        maps = as_maps(values, backbone.channels, (side, side), backbone.prefix, backbone.features)
        if logits is None:
            return Ending(why="it has no classifier of its own"), reached
        found = _follow(global_average(maps), logits, calls)
        if found is not None:
            return found, reached
        seen = _seen_by_the_head(backbone, values, side, logits, calls)
    if seen:
        return Ending(why=f"its own head reads {seen}"), reached
    between = [f"{name} ({type(model.get_submodule(name)).__name__})" for name in dict.fromkeys(following)]
    return Ending(why=f"between its maps and its logits lie {some(between, NAMED) or 'other operations'}"), reached


def _seen_by_the_head(
    backbone: Tapped, values: torch.Tensor, side: int, logits: torch.Tensor, calls: Sequence[_Call]
) -> str:
    """Which other features give the network's own logits, in words, or nothing."""
    others: tuple[tuple[Features, str], ...] = (
        ("cls", "the class token: set options.features to cls"),
        ("map", "the mean of the patches: set options.features to map"),
        ("tokens", "the mean of all tokens: set options.features to tokens"),
    )
    for features, said in others:
        if features != backbone.features:
            try:
                maps = as_maps(values, backbone.channels, (side, side), backbone.prefix, features)
            except UserError:
                continue
            if _follow(global_average(maps), logits, calls) is not None:
                return said
    return ""


def _follow(value: torch.Tensor, logits: torch.Tensor, calls: Sequence[_Call]) -> Ending | None:
    """The modules that lead from the pooled maps `value` (B, C) to the network's own `logits`, or None."""
    after: list[After] = []
    kept: list[Layer] = []
    pooled, at = value, 0
    while at < len(calls):
        call = calls[at]
        at += 1
        if not same(call.given.flatten(1), value, TOLERANCE):
            continue
        result = call.result.flatten(1)
        if is_linear(call.module) and same(result, logits, TOLERANCE):
            own = FrozenPart((*kept, layer("linear", call.module)))(pooled)
            return Ending(tuple(after), call.name) if same(own, logits, TOLERANCE) else None
        probe = 4 * torch.randn(call.given.shape, generator=torch.Generator().manual_seed(1))
        kinds = kinds_of(call.module, probe.flatten(1), call.module(probe.clone()).flatten(1))
        if kinds:
            after.append((call.module, kinds))
            kept += [layer(kind, call.module) for kind in kinds]
            value = result
    return Ending(tuple(after)) if same(FrozenPart(tuple(kept))(pooled), logits, TOLERANCE) else None


def _is_vector(value: Any) -> bool:
    """Whether `value` is a tensor with one vector for each image: all axes but the first and one more have size 1."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() >= 2
        and value.is_floating_point()
        and sum(n > 1 for n in value.shape[1:]) <= 1
    )


@contextmanager
def _hooked(model: nn.Module, seen: Callable[[str, nn.Module, torch.Tensor | None, Any], Any]) -> Iterator[None]:
    """Calls `seen(name, module, argument, result)` after each call of a module inside `model`.

    `argument` is a copy of the first one, as the module may change it, or None if it is not one vector per image.
    """
    copies: list[torch.Tensor | None] = []

    def before(module: nn.Module, given: tuple[Any, ...]) -> None:
        copies.append(given[0].clone() if given and _is_vector(given[0]) else None)

    def after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, given, result: seen(name, module, copies.pop(), result) and None

    handles = [m.register_forward_pre_hook(before) for name, m in model.named_modules() if name]
    handles += [m.register_forward_hook(after(name)) for name, m in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _telling(model: nn.Module) -> Iterator[None]:
    """Other values for the time of the proof: fresh ones can hide what a module does.

    Fresh norms may change nothing, fresh classifiers may be all zero, and their biases are larger than tiny features.
    """
    draws = torch.Generator().manual_seed(3)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    biases = [m.bias for m in linears if m.bias is not None]
    zero = [m.weight for m in linears if not m.weight.any()]
    vectors = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.dim() == 1 and t.is_floating_point()}
    kept = [(t, t.clone()) for t in {**vectors, **{id(w): w for w in zero}}.values()]
    try:
        for tensor in vectors.values():
            tensor.add_(0.2 * torch.rand(tensor.shape, generator=draws))
        for bias in biases:
            bias.zero_()
        for weight in zero:
            weight.normal_(generator=draws)
        yield
    finally:
        for tensor, value in kept:
            tensor.copy_(value)

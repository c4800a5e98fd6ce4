"""The frozen part of a head: the layers that a network has between its pooling and its classifier.

A norm or a hidden layer there does not commute with fusion, so it is applied after fusion and pooling. It is stored as
a list of simple layers with their tensors, next to the classifier, so stage II needs neither the backbone's code nor
its package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.weights import load_weights, save_weights

PREFIX = "frozen."  # of the tensors' names in a file: frozen.<number of the layer>.<weight or bias>
SAME = 1e-5  # largest difference / largest value, for a layer that reproduces a module's output

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # of CLIP
    "silu": F.silu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
}
WITH_TENSORS = ("layer_norm", "rms_norm", "affine", "linear")


@dataclass(frozen=True)
class Layer:
    """One layer: its `kind`, a name in ACTIVATIONS or WITH_TENSORS, and its tensors.

    linear: `weight` (D', D), `bias` (D',). affine (batch norm with fixed statistics): `weight` and `bias` (D,).
    layer_norm, rms_norm: the same and `epsilon`. A `weight` or `bias` that is None is left out.
    """

    kind: str
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epsilon: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features (..., D) -> features (..., D')."""
        if self.kind in ACTIVATIONS:
            return ACTIVATIONS[self.kind](x)
        weight, bias = _like(self.weight, x), _like(self.bias, x)
        if self.kind == "linear":
            assert weight is not None
            return F.linear(x, weight, bias)
        if self.kind == "layer_norm":
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)
        if self.kind == "rms_norm":
            return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


@dataclass(frozen=True)
class FrozenPart:
    """Layers in order: features (..., C) -> features (..., D). Tensors follow the input's dtype and device."""

    layers: tuple[Layer, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features (..., C) -> features (..., D)."""
        for layer in self.layers:
            x = layer(x)
        return x

    def outputs(self, channels: int) -> int:
        """D, the number of features for maps of so many `channels`."""
        linear = [layer.weight for layer in self.layers if layer.kind == "linear" and layer.weight is not None]
        return len(linear[-1]) if linear else channels

    def to(self, device: torch.device) -> "FrozenPart":
        """A copy on `device`, so that it is not moved there in every call."""

        def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.to(device)

        return FrozenPart(tuple(replace(x, weight=moved(x.weight), bias=moved(x.bias)) for x in self.layers))

    def to_file(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """(tensors by name, description as JSON), as `from_file` takes them."""
        tensors = {
            f"{PREFIX}{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in (("weight", layer.weight), ("bias", layer.bias))
            if tensor is not None
        }
        return tensors, [{"kind": layer.kind, "epsilon": layer.epsilon} for layer in self.layers]


def from_file(
    tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any], where: str
) -> tuple[dict[str, torch.Tensor], FrozenPart | None]:
    """(the other tensors of a weights file, its frozen part or None), from all `tensors` and the file's description.

    Raises UserError, which names the file as `where`, for a frozen part that is malformed.
    """
    others = {name: t for name, t in tensors.items() if not name.startswith(PREFIX)}
    described = about.get("frozen")
    if described is None and len(others) == len(tensors):
        return others, None
    try:
        layers = tuple(
            Layer(
                str(one["kind"]),
                tensors.get(f"{PREFIX}{i}.weight"),
                tensors.get(f"{PREFIX}{i}.bias"),
                float(one["epsilon"]),
            )
            for i, one in enumerate(described or ())
        )
        _check(layers, len(tensors) - len(others))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: its frozen part is malformed ({error}); make the file again") from None
    return others, FrozenPart(layers)


def save_classifier(
    path: Path, state: Mapping[str, torch.Tensor], frozen: FrozenPart | None, about: Mapping[str, Any]
) -> None:
    """Writes the tensors of a classifier with what lies before it; the JSON object `about` describes them."""
    tensors, described = frozen.to_file() if frozen else ({}, None)
    save_weights(path, {**state, **tensors}, {**about, **({"frozen": described} if frozen else {})})


def load_classifier(path: Path) -> tuple[dict[str, torch.Tensor], FrozenPart | None, dict[str, Any]]:
    """(state, frozen part, description) as `save_classifier` wrote them. Raises UserError."""
    tensors, about = load_weights(path)
    return *from_file(tensors, about, str(path)), about


def _check(layers: Sequence[Layer], tensors: int) -> None:
    """Raises ValueError for layers that cannot be computed one after the other."""
    width: int | None = None
    for layer in layers:
        if layer.kind not in (*ACTIVATIONS, *WITH_TENSORS):
            raise ValueError(f"no layer {layer.kind!r}")
        own = [t for t in (layer.weight, layer.bias) if t is not None]
        tensors -= len(own)
        if not all(t.is_floating_point() and t.isfinite().all() for t in own):
            raise ValueError(f"{layer.kind} holds NaN or infinity")
        if layer.kind in ACTIVATIONS and own:
            raise ValueError(f"{layer.kind} takes no tensors")
        if layer.kind == "linear":
            if layer.weight is None or layer.weight.dim() != 2 or width not in (None, layer.weight.shape[1]):
                raise ValueError("linear has the wrong shape")
            width = len(layer.weight)
            own = own[1:]
        for tensor in own:
            if tensor.dim() != 1 or width not in (None, len(tensor)):
                raise ValueError(f"{layer.kind} has the wrong shape")
            width = len(tensor)
    if tensors:
        raise ValueError("it holds tensors of no layer")


def layer(kind: str, module: nn.Module) -> Layer:
    """The layer `kind` with the tensors of `module`, not copies, so that it trains and moves with the module."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if kind in ACTIVATIONS:
        return Layer(kind)
    if kind == "linear":
        assert isinstance(weight, torch.Tensor)
        return Layer(kind, weight.flatten(1), bias)
    if kind == "affine":
        mean, variance = torch.as_tensor(module.running_mean), torch.as_tensor(module.running_var)
        scale = torch.rsqrt(variance + float(str(module.eps))) * (1 if weight is None else weight)
        return Layer(kind, scale, (0 if bias is None else bias) - mean * scale)
    return Layer(kind, weight, bias if kind == "layer_norm" else None, _epsilon(module) or 0.0)


def kinds_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[str, ...] | None:
    """Kinds of the layers that compute what `module` does, none for an identity, or None if there are no such layers.

    `x` (B, D) and `y` (B, D') are an input and the output of the module in eval mode, on which the layers are compared.
    The input must tell layers apart: large and small values of both signs.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        possible = ["linear"] if is_linear(module) else []
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        possible = ["affine"] if module.running_var is not None else []
    elif _epsilon(module) is not None:
        possible = ["layer_norm", "rms_norm"]
    elif list(module.parameters()):
        possible = []
    else:
        possible = list(ACTIVATIONS)
        if same(x, y):
            return ()
    candidates: list[tuple[str, ...]] = [(kind,) for kind in possible]
    if hasattr(module, "act"):  # timm's norms may have an activation of their own
        candidates += [(kind, activation) for kind in possible for activation in ACTIVATIONS]
    for kinds in candidates:
        if same(FrozenPart(tuple(layer(kind, module) for kind in kinds))(x), y):
            return kinds
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, perhaps written as a convolution of one pixel."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and set(module.kernel_size) == {1}
    return isinstance(module, nn.Linear)


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm; None for other modules."""
    found = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    return float(found) if isinstance(found, float) else None


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = SAME) -> bool:
    """Whether both have one shape and differ by at most `tolerance` of the largest value of `b`."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def _like(tensor: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """`tensor` on the device and in the dtype of `x`."""
    return None if tensor is None else tensor.to(x.device, x.dtype)

"""Any classification model of torchvision: convolutional or transformer.

The last maps or tokens are found in the model's graph. Pooling, the layers after it and the model's own classifier on
them must give its own logits (`networks.tap`), or its classifier is left out. The model takes the images as the
dataset's transform makes them, unless `backbones.NAME.input` says otherwise.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from h2t.pipeline.base.errors import UserError, first_line, nearest
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.network_input import Input
from h2t.pipeline.networks.backbone import Backbone
from h2t.pipeline.networks.layouts import Features
from h2t.pipeline.networks.tap import Tapped

NUMBER = 2026112601  # other results, another number: docs/numbers.md

SIDE = 224  # pixels; side of the input that the tap is found with
LAST = 60  # nodes of the graph that are looked at, from the end


class Options(Section):
    model: str
    """Name of the model in torchvision, such as efficientnet_b0."""
    features: Features = "map"
    """What is cached: maps (C, H, W); all tokens as (C, T, 1), prefix first; or the class token (C, 1, 1)."""


class _Torchvision(Tapped):
    """Cut at `node` of the model's graph. torch traces one graph for each mode, as only train mode has dropout."""

    def __init__(self, model: nn.Module, node: str, channels: int, features: Features, side: int) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor  # torchvision takes a second

        self.__dict__["_graph"] = create_feature_extractor(model, {node: "maps"})
        super().__init__(model, channels, features, side, None)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        graph: Any = self.__dict__["_graph"]
        values: torch.Tensor = graph(x)["maps"]
        return values

    def whole(self, x: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor = self._model(x)
        return logits

    def cut(self, side: int, reached: set[nn.Module]) -> None:
        """Keeps what the graph uses, and the modules after pooling under their own names."""
        graph, after = self.__dict__["_graph"], self.modules_after
        for name, module in self._model.named_modules():
            if module in after:
                graph.add_submodule(name, module)
        self._hold(graph)

    def train(self, mode: bool = True) -> "_Torchvision":
        super().train(mode)
        self.__dict__["_graph"].train(mode)
        return self


def input(options: Options) -> Input:
    """States nothing: the dataset's transform, as for ImageNet by default, is torchvision's."""
    return Input()


def made_for(options: Options) -> Input:
    """The input that torchvision's default weights of the model were evaluated with."""
    from torchvision.models import get_model_weights

    transform = get_model_weights(options.model).DEFAULT.transforms()
    (size,), (resize,) = transform.crop_size, transform.resize_size
    return Input(
        size=size,
        mean=list(transform.mean),
        std=list(transform.std),
        interpolation=transform.interpolation.value,
        crop=int(size / resize * 1e4) / 1e4,  # rounded down, so that the resized side is `resize` again
        fit="centre",
    )


def build(options: Options, size: int | None = None) -> Backbone:
    """The network with initial weights from torch's generator; transformers take images of `size` pixels.

    Raises UserError for an unknown model, and for one that torch cannot trace.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if options.model not in known:
        raise UserError(
            "options.model: must be a classification model of torchvision, such as efficientnet_b0; "
            f"got {options.model!r}{nearest(options.model, known)}"
        )
    fixed: dict[str, Any] = {"image_size": size} if size and options.model.startswith("vit_") else {}
    fixed |= {"input_size": (size, size)} if size and options.model.startswith("maxvit") else {}
    model = models.get_model(options.model, weights=None, **fixed)
    side = size or SIDE
    node, channels = _last_features(options.model, model, side)
    return _Torchvision(model, node, channels, options.features, side)


@torch.no_grad()
def _last_features(name: str, model: nn.Module, side: int) -> tuple[str, int]:
    """(graph node, channels) of the last maps (B, C, H, W) or tokens (B, T, C). Raises UserError if there are none."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model.eval()
    try:
        nodes = get_graph_node_names(model)[1][-LAST:]
        values = create_feature_extractor(model, {n: n for n in nodes})(torch.zeros(2, 3, side, side))
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = first_line(error)
        raise UserError(f"torchvision model {name!r}: torch cannot trace it ({reason}); choose another one") from None
    for node in reversed(nodes):
        shape = list(getattr(values[node], "shape", ()))
        if len(shape) == 4 and shape[2] * shape[3] > 1 and shape[1] > 1:
            return node, shape[1]
        if len(shape) == 3 and shape[1] > 1:
            return node, shape[2]
    raise UserError(f"torchvision model {name!r}: has no maps at its end; choose another one, such as resnet50")


def weights(options: Options, size: int | None = None) -> Mapping[str, torch.Tensor]:
    """Torchvision's default weights of the model. Raises UserError."""
    from h2t.pipeline.networks.resnets import pretrained

    return pretrained(options.model)

"""Finds the last maps of a torchvision model, and checks that pooling and classifier on them give its own logits.

The graph node whose output the backbone returns is called the tap.
"""

from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.networks.backbone import Backbone

SIDE = 224  # pixels; side of the input that the tap is checked with
TOLERANCE = 1e-5  # largest difference of logits / largest logit: float32 rounds differently in another order of sums


def model_names() -> list[str]:
    """Names of torchvision's classification models."""
    import torchvision

    return list_models(module=torchvision.models)


class Tapped(Backbone):
    """A torchvision model up to its tap: (B, 3, H, W) -> one map (B, C, H', W'). State-dict keys are torchvision's.

    Raises UserError if the model has no tap.
    """

    _graph: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        model = get_model(name, weights=None)
        node, linear = find_tap(name, model)
        self.channels = linear.in_features
        graph = create_feature_extractor(model, {node: "maps"})
        # Registering the graph's parts, not the graph itself, keeps its name out of the state-dict keys.
        self.__dict__["_graph"] = graph
        for key, module in graph.named_children():
            self.add_module(key, module)
        for key, parameter in graph.named_parameters(recurse=False):
            self.register_parameter(key, parameter)

    def train(self, mode: bool = True) -> "Tapped":
        """Switches the graph as well: torch traces one for each mode, as dropout is in the graph of train mode only."""
        super().train(mode)
        self._graph.train(mode)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images (B, 3, H, W) -> one map (B, C, H', W')."""
        return (self._graph(x)["maps"],)


@torch.no_grad()
def find_tap(name: str, model: nn.Module) -> tuple[str, nn.Linear]:
    """(graph node, linear classifier) of `model`.

    The tap is the last node with values (B, C, H, W) whose mean over the image is the classifier's input. Raises
    UserError if there is none, or if torch cannot trace the model.
    """
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    biases = [(m.bias, m.bias.clone()) for m in linears if m.bias is not None]
    model.eval()
    try:
        for bias, _ in biases:
            bias.zero_()  # features of an untrained model can be tiny, and biases would hide them
        nodes = get_graph_node_names(model)[1]
        values = create_feature_extractor(model, {n: n for n in nodes[-40:]})(x)
        expected = model(x)
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"torchvision model {name!r}: torch cannot trace it ({reason}); choose another one") from None
    for node in reversed(nodes[-40:]):
        maps = values[node]
        if not isinstance(maps, torch.Tensor) or maps.dim() != 4 or maps.shape[2] * maps.shape[3] == 1:
            continue
        for linear in reversed(linears):
            if linear.in_features == maps.shape[1] and linear.out_features == expected.shape[1]:
                distance = (linear(maps.mean((2, 3))) - expected).abs().max() / expected.abs().max()
                if distance <= TOLERANCE:
                    for bias, value in biases:
                        bias.copy_(value)
                    model.train()
                    return node, linear
    raise UserError(
        f"torchvision model {name!r}: must end in global average pooling and one linear layer, so that maps can be "
        "fused before pooling; got another ending; choose another one, such as resnet50 or efficientnet_b0"
    )

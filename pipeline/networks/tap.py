"""Finds the last maps of a torchvision model, and proves that pool and head on them give the model's own logits."""

from typing import Any

import torch
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from h2t.pipeline.base.errors import UserError

SIDE = 224  # of the input that the tap is checked on
TOLERANCE = 1e-5  # of max|d| / max|logit|: float32 sums in another order


def model_names() -> list[str]:
    """The classification models that torchvision has."""
    import torchvision

    return list_models(module=torchvision.models)


class Tapped(nn.Module):
    """`forward(x)`: (B, 3, H, W) -> a tuple of one map (B, C, H', W'). State-dict keys are torchvision's."""

    experts = 1
    _graph: Any

    def __init__(self, name: str) -> None:
        super().__init__()
        model = get_model(name, weights=None)
        node, head = find_tap(name, model)
        self.channels = head.in_features
        graph = create_feature_extractor(model, {node: "maps"})
        # Its parts become ours and it stays out of our modules, so that keys do not carry its name.
        self.__dict__["_graph"] = graph
        for key, module in graph.named_children():
            self.add_module(key, module)
        for key, parameter in graph.named_parameters(recurse=False):
            self.register_parameter(key, parameter)

    def train(self, mode: bool = True) -> "Tapped":
        """Both modes have a graph of their own: dropout and stochastic depth are traced in one of them only."""
        super().train(mode)
        self._graph.train(mode)
        return self

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self._graph(x)["maps"],)


@torch.no_grad()
def find_tap(name: str, model: nn.Module) -> tuple[str, nn.Linear]:
    """(graph node of the last maps, linear head) of `model`. Raises UserError if no node proves to be the tap.

    The tap is the last node whose values (B, C, H, W), averaged over the image, are what the head is given.
    """
    x = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    biases = [(h.bias, h.bias.clone()) for h in heads if h.bias is not None]
    model.eval()
    try:
        for bias, _ in biases:
            bias.zero_()  # untrained features may be tiny, and the biases would hide them
        nodes = get_graph_node_names(model)[1]
        values = create_feature_extractor(model, {n: n for n in nodes[-40:]})(x)
        expected = model(x)
    except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"torchvision model {name!r}: cannot be looked into ({reason}); choose another one") from None
    for node in reversed(nodes[-40:]):
        maps = values[node]
        if not isinstance(maps, torch.Tensor) or maps.dim() != 4 or maps.shape[2] * maps.shape[3] == 1:
            continue
        for head in reversed(heads):
            if head.in_features == maps.shape[1] and head.out_features == expected.shape[1]:
                distance = (head(maps.mean((2, 3))) - expected).abs().max() / expected.abs().max()
                if distance <= TOLERANCE:
                    for bias, value in biases:
                        bias.copy_(value)
                    model.train()
                    return node, head
    raise UserError(
        f"torchvision model {name!r}: its logits are not global average pooling and one linear layer on maps, so its "
        "maps cannot be fused before pooling; choose another one, such as resnet50 or efficientnet_b0"
    )

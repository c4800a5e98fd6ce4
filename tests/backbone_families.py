"""Families of pretrained networks at tiny size with random weights, and how far ours is from each of them."""

from dataclasses import dataclass, field
from typing import Any

import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.networks.backbone import frozen_part
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.tap import Tapped

SMALL_VIT = {"depth": 1, "embed_dim": 48, "num_heads": 3}
VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


@dataclass(frozen=True)
class Family:
    """A plug-in, a name of timm or a model_type of transformers, and a tiny configuration."""

    arch: str
    name: str
    features: str = "map"
    size: int = 32
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        if self.arch == "huggingface":
            sized = {"image_size": self.size} if self.name not in NO_SIZE else {}
            return {"features": self.features, "config": {"model_type": self.name, **sized, **self.config}}
        config = {"config": {"architecture": self.name, "model_args": self.config}} if self.config else {}
        return {"model": self.name, "features": self.features, **config}

    def __str__(self) -> str:
        return f"{self.arch}-{self.name}-{self.features}"


NO_SIZE = ("convnext", "convnextv2", "resnet", "regnet", "clip_vision_model")


def timm(name: str, features: str = "map", size: int = 32, **config: Any) -> Family:
    return Family("timm", name, features, size, config)


def hf(name: str, features: str = "map", size: int = 32, **config: Any) -> Family:
    return Family("huggingface", name, features, size, config)


FAMILIES = [
    timm("test_resnet"),
    timm("test_efficientnet"),
    timm("test_convnext"),
    timm("test_vit", "cls"),
    timm("test_vit", "map"),
    timm("test_vit", "tokens"),
    timm("test_byobnet"),
    timm("test_nfnet"),
    timm("test_mambaout"),
    timm("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(1, 1), window_size=2),
    timm("deit3_small_patch16_224", "cls", **SMALL_VIT),
    timm("vit_small_patch14_dinov2", "cls", 28, **SMALL_VIT),
    timm("vit_small_patch14_reg4_dinov2", "cls", 28, **SMALL_VIT),
    timm("vit_small_patch16_dinov3", **SMALL_VIT),
    timm("vit_base_patch32_clip_224", "cls", 64, **SMALL_VIT),
    timm("vit_base_patch16_siglip_224", **SMALL_VIT),
    timm("beitv2_base_patch16_224", **SMALL_VIT),
    timm("eva02_tiny_patch14_224", size=28, **SMALL_VIT),
    timm("mobilenetv3_small_050"),
    timm("mobilenetv4_conv_small"),
    timm("dla34", channels=(8, 8, 16, 16, 16, 16), levels=(1, 1, 1, 1, 1, 1)),  # its classifier is a convolution
    hf("vit", "cls", patch_size=8, **VIT),
    hf("deit", "cls", patch_size=8, **VIT),
    hf("dinov2", "cls", patch_size=8, **VIT),
    hf("dinov2_with_registers", "cls", patch_size=8, **VIT),
    hf("dinov3_vit", "cls", patch_size=8, **VIT),
    hf("clip", "cls", vision_config={"patch_size": 8, "image_size": 32, **VIT}),
    hf("siglip_vision_model", patch_size=8, **VIT),
    hf("beit", patch_size=8, **VIT),
    hf("convnext", hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]),
    hf("convnextv2", hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]),
    hf("resnet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    hf("swin", embed_dim=8, depths=[1, 1], num_heads=[1, 1], patch_size=4, window_size=2),
    hf("regnet", embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], groups_width=8),
]


def built(family: Family) -> Tapped:
    """The backbone with random weights and statistics that are not the initial ones, in eval mode."""
    module = plugins.load("backbones", family.arch)
    torch.manual_seed(0)
    backbone = module.build(module.Options.model_validate(family.options), family.size)
    assert isinstance(backbone, Tapped)
    return backbone.eval()


def reference(family: Family) -> torch.nn.Module:
    """The whole network of the package, with random weights, biases and statistics."""
    module = plugins.load("backbones", family.arch)
    options = module.Options.model_validate(family.options)
    if family.arch == "huggingface":
        whole = module._create(options, family.size)
    else:
        try:
            whole = module._create(options, img_size=family.size)
        except Exception:  # noqa: BLE001 - a convolutional network takes no size
            whole = module._create(options)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draws)
                spread = 0.3 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.1
                tensor.add_(noise.abs() * 0.3 if name.endswith("running_var") else noise * spread)
    return whole.eval()


@torch.no_grad()
def own_logits_differ_by(family: Family) -> tuple[Tapped, float | None]:
    """(backbone, max|d| / max|logit| of pooling, layers after it and own classifier against the network itself).

    None where the proof does not hold, so the own classifier is left out.
    """
    backbone, whole = built(family), reference(family)
    state = whole.state_dict()
    backbone.load_state_dict({k: v for k, v in state.items() if k not in backbone.unused}, strict=True)
    x = torch.randn(3, 3, family.size, family.size, generator=torch.Generator().manual_seed(2))
    given = whole(x) if family.arch == "timm" else whole(pixel_values=x)
    (maps,) = backbone(x)
    assert maps.shape[:2] == (3, backbone.channels)
    assert maps.isfinite().all()
    if backbone.ending.why:
        return backbone, None
    part = frozen_part(backbone)
    features = global_average(maps)
    features = features if part is None else part(features)
    expected = given
    if family.arch == "huggingface":
        expected = given.logits if hasattr(given, "logits") else given.pooler_output
    if backbone.ending.classifier:
        weight = state[f"{backbone.last_layer}.weight"].flatten(1)
        features = torch.nn.functional.linear(features, weight, state.get(f"{backbone.last_layer}.bias"))
    return backbone, float((features - expected).abs().max() / expected.abs().max())

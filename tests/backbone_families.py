"""Families of pretrained networks at tiny size with random weights, and what holds for each of them.

`python tests/backbone_families.py` writes the table of docs/backbones.md; with names of families it only replaces their
lines. Every line is written as soon as it is known. The quick families are tested in test_frozen_backbones.py.
"""

import contextlib
import io
import re
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from golden_cases import h2t
from PIL import Image

from h2t.pipeline.base import plugins
from h2t.pipeline.networks.backbone import frozen_part
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.tap import Tapped

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
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
    quick: bool = False

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


def timm(name: str, features: str = "map", size: int = 32, quick: bool = False, **config: Any) -> Family:
    return Family("timm", name, features, size, config, quick)


def hf(name: str, features: str = "map", size: int = 32, quick: bool = True, **config: Any) -> Family:
    return Family("huggingface", name, features, size, config, quick)


FAMILIES = [
    timm("test_resnet", quick=True),
    timm("test_efficientnet", quick=True),
    timm("test_convnext", quick=True),
    timm("test_vit", "cls", quick=True),
    timm("test_vit", "map", quick=True),
    timm("test_vit", "tokens", quick=True),
    timm("test_byobnet", quick=True),
    timm("test_nfnet", quick=True),
    timm("test_mambaout", quick=True),
    timm("swin_tiny_patch4_window7_224", quick=True, embed_dim=24, depths=(1, 1), num_heads=(1, 1), window_size=2),
    timm("deit3_small_patch16_224", "cls", quick=True, **SMALL_VIT),
    timm("vit_small_patch14_dinov2", "cls", 28, quick=True, **SMALL_VIT),
    timm("vit_small_patch14_reg4_dinov2", "cls", 28, quick=True, **SMALL_VIT),
    timm("vit_small_patch16_dinov3", quick=True, **SMALL_VIT),
    timm("vit_base_patch32_clip_224", "cls", 64, quick=True, **SMALL_VIT),
    timm("vit_base_patch16_siglip_224", quick=True, **SMALL_VIT),
    timm("beitv2_base_patch16_224", quick=True, **SMALL_VIT),
    timm("eva02_tiny_patch14_224", size=28, quick=True, **SMALL_VIT),
    timm("mixer_s32_224", size=64),
    timm("mobilenetv3_small_050", quick=True),
    timm("mobilenetv4_conv_small", quick=True),
    timm("resnet18"),
    timm("densenet121"),
    timm("efficientnet_b0"),
    timm("regnety_002"),
    timm("inception_v3", size=96),
    timm("fastvit_t8", size=64),
    timm("mobilevit_xxs", size=64),
    timm("swinv2_cr_tiny_224", size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 1), window_size=2),
    timm("test_maxvit", size=64),
    timm("test_coatnet", size=64),
    timm("tiny_vit_5m_224", size=64),
    timm("vgg11"),
    timm("xcit_nano_12_p16_224", "cls"),
    timm("levit_128s", size=64),
    timm("hiera_tiny_224", size=64),
    timm("pvt_v2_b0", size=64),
    timm("poolformer_s12", size=64),
    timm("ghostnet_050"),
    timm("edgenext_xx_small", size=64),
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
        weight = state[f"{backbone.last_layer}.weight"]
        features = torch.nn.functional.linear(features, weight, state.get(f"{backbone.last_layer}.bias"))
    return backbone, float((features - expected).abs().max() / expected.abs().max())


PARAMS = {
    "seed": 0,
    "device": "cpu",
    "prepare": {
        "dataset": "digits",
        "imbalance": {"profile": "exponential", "ratio": 100.0},
        "test_per_class": 5,
    },
    "extract": {"batch_size": 32, "batchnorm": ["stage1"]},
    "hosts": {"h": {"host": "dr", "backbone": "b", "optimiser": {"epochs": 1}, "grid": {"seed": [0]}}},
}


def journey(family: Family) -> list[str]:
    """Runs the commands from images to predictions in an empty folder; the names of the steps that worked."""
    done: list[str] = []
    backbone = {
        "arch": family.arch,
        "objective": "ce",
        "options": family.options,
        "input": {"size": family.size, "crop": 1.0},
        "frozen": True,
        "head": "probe",
        "probe": {"iterations": 50},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        values = yaml.safe_dump(yaml.safe_load(yaml.safe_dump({**PARAMS, "backbones": {"b": _plain(backbone)}})))
        Path("params.yaml").write_text(values, encoding="utf-8")
        Image.fromarray(np.full((40, 50, 3), 99, np.uint8)).save("one.png")
        steps = {
            "prepare": ("prepare", "s"),
            "train": ("train-backbone", "b", "s", "b"),
            "extract": ("extract", "b", "s", "b", "c"),
            "probe": ("probe", "b", "c", "p", "--backbone", "b"),
            "heads": ("train-classifier", "h", "c", "p", "h"),
            "evaluate": ("evaluate", "h", "c", "h", "p", "e"),
            "export": ("export", "h", "c", "b", "m", "--ratio", "0.3"),
            "predict": ("predict", "m", "one.png", "--out", "p.csv"),
            "onnx": ("export", "h", "c", "b", "n", "--ratio", "0.3", "--onnx"),
            "onnx predict": ("predict", "n/model.onnx", "one.png", "--out", "q.csv"),
        }
        for name, arguments in steps.items():
            try:
                h2t(*arguments)
            except Exception as error:  # noqa: BLE001 - the step is reported as one that does not work
                sys.stderr.write(f"{family}: {name}: {error}\n")
                break
            done.append(name)
    return done


def _plain(value: Any) -> Any:
    """`value` with lists in place of tuples, for YAML."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def line(family: Family) -> str:
    """The family's line of the table."""
    start = time.process_time()
    backbone, off = own_logits_differ_by(family)
    seconds = time.process_time() - start
    values = backbone.trunk(torch.zeros(1, 3, family.size, family.size))
    layout = "tokens" if values.dim() == 3 else "NCHW" if values.shape[1] == backbone.channels else "NHWC"
    prefix = str(backbone.prefix if backbone.prefix is not None else "") if layout == "tokens" else ""
    between = ", ".join(kind for _, kinds in backbone.ending.after for kind in kinds)
    proof = f"yes, {off:.0e}" if off is not None else f"no: {backbone.ending.why}"
    steps = journey(family)
    names = ("extract", "probe", "heads", "evaluate", "export", "predict", "onnx predict")
    cells = [
        f"{family.arch} `{family.name}`",
        layout,
        prefix,
        f"`{family.features}`",
        between,
        proof,
        *("yes" if name in steps else "no" for name in names),
        f"{seconds:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| network | layout | prefix tokens | features | between pooling and classifier | own logits | extract | probe | heads \
with H2T | evaluate | export | predict | ONNX | CPU seconds to build |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    text = PAGE.read_text(encoding="utf-8")
    known = re.search(r"(?s)<!-- table -->\n(.*?)\n<!-- end -->", text)
    assert known
    lines = {_of(row): row for row in known[1].splitlines()[2:]} if known[1].startswith(HEADER) else {}
    for family in FAMILIES:
        if not names or family.name in names:
            new = line(family)
            lines[_of(new)] = new
            sys.stdout.write(new + "\n")
            sys.stdout.flush()
            table = "\n".join([HEADER, *lines.values()])
            PAGE.write_text(text.replace(known[0], f"<!-- table -->\n{table}\n<!-- end -->"), "utf-8")


def _of(row: str) -> tuple[str, str]:
    """The network and the features of a row of the table."""
    cells = row.split("|")
    return cells[1], cells[4]


if __name__ == "__main__":
    main(sys.argv[1:])

"""docs/methods.md from the docstrings of hosts, samplers and objectives: `python tests/methods_page.py` writes it."""

# ruff: noqa: E501 - a row of a Markdown table is one line

import ast
import sys
from pathlib import Path

from parameters_page import built_in, written

from h2t.pipeline.base import plugins

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"

START = """\
# Methods

<!-- Written by python tests/methods_page.py from the docstrings in pipeline/hosts, samplers and objectives. Edit them there. -->

What stage II can train or fit on cached features: for each host its formula, source, constants and what differs from
the published method. `python -m benchmarks.arena` compares them on one cache, tuned alike
([how](../benchmarks/README.md)). Constants are keys of `hosts.NAME.loss`, with their defaults.

What differs from the published settings for every host: the backbone is frozen, so of methods for whole networks only
the part on features is here, and their published figures are not ours to reach. Images are the views in the cache, where
publications augment anew at each draw. Training is SGD with momentum 0.9, a rate on half a cosine, 10 epochs and batches
of 128, unless set otherwise; the last epoch counts, not the best one on test images. The paragraph "Published setting"
of each host says what its authors do otherwise, as far as it could be read in their public code or paper; "the whole
network" means that they train the backbone by this loss as well.

Batches: the sampler of the receivers, unless `receiver` says otherwise. H2T can be added to every host that is trained;
donors are drawn and fused as everywhere. With hosts whose batches are instance-wise the fused receivers are mostly of
large classes, unlike in the paper.
"""

STAGE_ONE = """\
## Objectives

What stage I can train a backbone with. Constants are keys of `backbones.NAME.loss`, with their defaults. Every objective
but `bbn` can be trained with `mixup` or with `cmo`, not with both.

`cmo`: CMO. A rectangle of every image is replaced by that of an image from a second, class-balanced sampler, and the
two labels are mixed by area: the loss is r l(z, y) + (1 - r) l(z, y').

Source: Park et al., "The Majority Can Help the Minority: Context-rich Minority Oversampling for Long-tailed
Classification", CVPR 2022, as in the authors' code: with probability `cmo` (0.5 there) a batch gets one rectangle, whose
sides are sqrt(1 - t) of the image's with t uniform in \\[0, 1\\], centred anywhere and clipped at the edges; r is the area
that is left; none in the first four epochs and the last three. The authors' second sampler weights each image by 1 / n of
its class (`cmo_power: 1`). Published with cross-entropy, balanced softmax, LDAM-DRW and RIDE: objectives `ce`,
`balanced_softmax`, `ldam_drw`, `ride`.

Published setting: 200 epochs on CIFAR-100-LT, rate 0.1, times 0.01 at epochs 160 and 180, in `presets/cifar10-100-objectives`;
400 epochs and RandAugment for the best figures on ImageNet-LT.
"""

END = """\
## Not here, and why

Formulas were read in public code where there is any. What could not be verified is not built under its name:

| method | why | published, CIFAR-100-LT, imbalance ratio 100, top-1 |
| --- | --- | --- |
| ABL (Jin, Lang and Lei, IJCV 2023) | neither formula nor code found | 46.80 |
| LEAP (Liu et al., CVPR 2020) | formula and constants not verified; made for face and person re-identification | – |
| ACE (Cai, Wang and Hwang, ICCV 2021) | losses and schedule not verified | 49.40 |
| MBJ, memory-based jitter (Liu, Li and Sun, AAAI 2022) | it stores features of past iterations; on a frozen backbone these are the same features again | 45.80 |
| LFME (Xiang, Ding and Han, ECCV 2020) | needs three teacher networks in every step and validation accuracy after every epoch, which decides its weights; stage I has neither | – |
| RSG (Wang et al., CVPR 2021) | trains modules inside the backbone | – |

The figures are those that the H2T paper quotes (Li et al., AAAI 2024, Table 1); they are of other trainings than ours.
"""


def text_of(kind: str, name: str) -> str:
    """The docstring of a built-in plug-in."""
    path = plugins.folders(kind)[0] / f"{name}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def escaped(text: str) -> str:
    """`text` with the characters that Markdown takes for markup made plain; code stays code."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for mark in ("\\", "*", "_", "<", "|", "[", "]"):
            parts[place] = parts[place].replace(mark, f"\\{mark}")
    return "`".join(parts)


def entry(kind: str, name: str) -> str:
    """A plug-in's heading, docstring and constants; for a host also what it needs."""
    lines = []
    module = plugins.load(kind, name)
    if kind == "hosts":
        lines.append(f"Batches: {'none: closed-form fit, no H2T' if module.Host.fitted else module.Host.receiver}.")
        lines += [f"Needs {more}."] if (more := module.Host.needs()) else []
    if kind in ("hosts", "objectives"):
        constants = [f"`{key}` {written(field.get_default())}" for key, field in module.Loss.model_fields.items()]
        lines += [f"Constants: {', '.join(constants)}."] if constants else []
    return "\n\n".join([f"### {name}", escaped(text_of(kind, name)), *([" ".join(lines)] if lines else [])])


def page() -> str:
    """The whole page."""
    hosts, samplers, objectives = (
        [entry(kind, name) for name in built_in(kind)] for kind in ("hosts", "samplers", "objectives")
    )
    parts = [
        START.rstrip(),
        "## Hosts",
        *hosts,
        "## Samplers",
        *samplers,
        STAGE_ONE.rstrip(),
        *objectives,
        END.rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

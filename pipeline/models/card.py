"""README.md beside an exported model: what it was trained on, how well it does with which certainty, and its licences.

The header is that of a model card on the Hugging Face hub.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from scipy.special import betaincinv

from h2t.cache.redaction import in_markdown
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.classes import GROUPS, groups
from h2t.pipeline.data.splits import shortened
from h2t.pipeline.evaluation.scoring import STAGE1

LEVEL = 0.95
SHOWN = 100  # classes in the table; of more, the most frequent and the rarest
NOT_STATED = "not stated; write it here before you share the model"
WORDS = {"head": "frequent", "medium": "medium", "tail": "rare"}


@dataclass(frozen=True)
class Measured:
    """Predictions for the test samples: `labels`, predicted classes `guesses` and their `groups`, int (n,) each."""

    labels: np.ndarray
    guesses: np.ndarray
    groups: np.ndarray


@dataclass(frozen=True)
class Stated:
    """What only people know: the `licence` of the model and its `use`; None is left for them to write."""

    licence: str | None = None
    use: str | None = None


def interval(right: np.ndarray, total: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """(weighted mean of the classes' accuracies, ends of its 95 % interval), in percent.

    `right` of `total` images of each class are right, int (K,); classes without images have weight 0. The interval is
    Jeffreys' for a proportion (Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion", Statistical
    Science 2001, section 4.3), of so many images as would give an unweighted mean the same variance: 1 / sum(w^2 / n)
    (Kish, "Survey Sampling", 1965).
    """
    used = weights > 0
    share, images = right[used] / total[used], float(1 / (weights[used] ** 2 / total[used]).sum())
    mean = float(share @ weights[used])
    low, high = betaincinv(mean * images + 0.5, (1 - mean) * images + 0.5, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return 100 * mean, 100 * min(float(low), mean), 100 * max(float(high), mean)  # 0 and 100 % are in their intervals


def card(
    about: Mapping[str, Any], counts: Sequence[int], dataset: str, measured: Measured | None, stated: Stated
) -> str:
    """The text of README.md. `about` describes the exported files, `counts` are the training images of each class."""
    classes = about["classes"]
    tags = ["image-classification", "long-tailed", "h2t"]
    header = {"license": "other", "license_name": stated.licence or "not stated", "tags": tags}
    setting = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in about["setting"].items())
    method = f"Host `{in_markdown(about['host'])}` with {setting}"
    if about["host"] == STAGE1:
        method = "Stage I's own classifier, or the logistic regression (probe) that stands for it"
    backbone = f"`{in_markdown(about['arch'])}`, " if "arch" in about else ""
    lines = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        f"# A classifier of {counted(len(classes), 'class', 'classes')}\n",
        *(
            ["`h2t predict FOLDER photos/` classifies images, where FOLDER is this folder.\n"]
            if "arch" in about
            else []
        ),
        "## Intended use\n",
        f"{in_markdown(stated.use or NOT_STATED)}\n",
        "## Licences\n",
        f"- This model: {in_markdown(stated.licence or NOT_STATED)}",
        f"- Its images: {NOT_STATED}",
        f"- The weights that its backbone started from: {NOT_STATED}\n",
        "## Data\n",
        f"{counted(sum(counts), 'training image')} of dataset `{in_markdown(dataset)}`, {max(counts):,} to "
        f"{min(counts):,} of a class; features in cache `{about['cache'][:12]}`.\n",
        "## Method\n",
        f"{method}, on features of backbone {backbone}weights "
        f"`{about['backbone'][:12]}`, batch-norm statistics `{about['statistics']}`.\n",
        "## Figures\n",
    ]
    if measured is None or not len(measured.labels):
        return "\n".join([*lines, "It was not measured: there were no test images."]) + "\n"
    total = np.bincount(measured.labels, minlength=len(classes))
    right = np.bincount(measured.labels[measured.labels == measured.guesses], minlength=len(classes))
    of = np.array([group or "" for group in groups(counts)["paper_index"]])
    lines += [
        f"Of this classifier alone, on {counted(len(measured.labels), 'test image')} that were not trained on. The "
        "95 % intervals cover other test images of the same classes and source; neither other seeds nor other cameras, "
        f"places or years.{_of_groups(measured.groups)}\n",
        "| accuracy | % | interval |\n| --- | ---: | --- |",
        _line("all images", right, total, total / total.sum()),
    ]
    for group in GROUPS:
        members = (of == group) & (total > 0)
        if members.any():
            what = (
                f"{WORDS[group]} classes ({counted(int(members.sum()), 'class', 'classes')}), mean of their accuracies"
            )
            lines.append(_line(what, right, total, members / members.sum()))
    if unmeasured := [name for name, n in zip(classes, total, strict=True) if not n]:
        lines.append(
            f"\nNot measured, without test images: {counted(len(unmeasured), 'class', 'classes')}: "
            f"{in_markdown(shortened(unmeasured))}."
        )
    shown = list(range(len(classes)))
    if len(classes) > SHOWN:
        shown = [*range(SHOWN // 2), *range(len(classes) - SHOWN // 2, len(classes))]
        lines.append(f"\nOf {len(classes):,} classes, the {SHOWN // 2} most frequent and the {SHOWN // 2} rarest:")
    lines.append(
        "\n| class | training images | test images | accuracy, % | interval |\n| --- | ---: | ---: | ---: | --- |"
    )
    for k in shown:
        own = _text(*interval(right[k : k + 1], total[k : k + 1], np.ones(1))) if total[k] else " | "
        lines.append(f"| {in_markdown(classes[k])} | {counts[k]:,} | {total[k]:,} | {own} |")
    return "\n".join(lines) + "\n"


def _of_groups(of_image: np.ndarray) -> str:
    many = len(np.unique(of_image))
    if many == len(of_image):
        return ""
    return f" The images come in {counted(many, 'group')}, but count singly here: the intervals are too narrow."


def _text(mean: float, low: float, high: float) -> str:
    return f"{mean:.1f} | {low:.1f} to {high:.1f}"


def _line(what: str, right: np.ndarray, total: np.ndarray, weights: np.ndarray) -> str:
    return f"| {what} | {_text(*interval(right, total, weights))} |"

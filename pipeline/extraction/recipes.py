"""Batch-norm recipes: under which statistics a cache's rows are stored, and which of them a host reads.

The published stage II runs batch norm in train mode, so receivers are normalised by balanced batches, donors by
instance batches, and test images by the running mixture of both. `branchwise` reproduces that from a frozen cache;
`calibrated` is one set re-estimated on both kinds of batches; `stage1` is the trained one. How the statistics are
estimated is in `extraction.batchnorm`, which the stages behind the cache need not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Statistics of the rows that a recipe stores and that a host under it reads.

    `train` and `evaluation`: what is stored for training and for evaluation samples. `receiver`, `donors` (by sampler)
    and `evaluate`: what stage II and evaluation read.
    """

    train: tuple[str, ...]
    evaluation: tuple[str, ...]
    receiver: str
    donors: Mapping[str, str]
    evaluate: str


def _one(name: str) -> Recipe:
    return Recipe((name,), (name,), name, {"instance": name, "balanced": name, "reverse": name}, name)


RECIPES: dict[str, Recipe] = {
    "stage1": _one("stage1"),
    "calibrated": _one("calibrated"),
    "branchwise": Recipe(
        train=("balanced", "instance"),
        evaluation=("mixture", "balanced"),
        receiver="balanced",
        donors={"instance": "instance", "balanced": "balanced", "reverse": "reverse"},
        evaluate="mixture",
    ),
}
#: Not a recipe of its own: adds the rows that a `reverse` donor under `branchwise` reads.
EXTRA = {"reverse": Recipe(("reverse",), (), "reverse", {}, "mixture")}
NAMES = (*RECIPES, *EXTRA)


def stored(recipes: list[str], split: str) -> list[str]:
    """The statistics under which rows of `split` are stored: the union over `recipes`.

    Evaluation rows under `stage1` are always stored: the stage-I head is evaluated on them.
    """
    chosen = [{**RECIPES, **EXTRA}[name] for name in recipes]
    if split == "train":
        return sorted({s for recipe in chosen for s in recipe.train})
    return sorted({"stage1"} | {s for recipe in chosen for s in recipe.evaluation})

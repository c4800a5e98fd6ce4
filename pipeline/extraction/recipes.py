"""Batch-norm recipes: the statistics that a cache's rows are stored under, and those that a host reads.

The published stage II runs batch norm in train mode: receivers are normalised by balanced batches, donors by instance
batches, and test images by running statistics that mix both. `branchwise` reproduces this from a frozen cache.
`calibrated` is one set of statistics, estimated on both kinds of batches. `stage1` is the set that stage I trained.
`extraction.batchnorm` estimates them; the stages after `extract` need this module alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Names of the statistics that a recipe stores, and that a host with this recipe reads.

    Stored: `train` for training samples, `evaluation` for evaluation samples. Read: `receiver` in stage
    II, or what `donors` has for the sampler of a row; `evaluate` in evaluation.
    """

    train: tuple[str, ...]
    evaluation: tuple[str, ...]
    receiver: str
    donors: Mapping[str, str]
    evaluate: str

    def read_under(self, sampler: str) -> str:
        """The statistics of rows drawn by `sampler`."""
        return self.donors.get(sampler, self.receiver)


def _one(name: str) -> Recipe:
    return Recipe((name,), (name,), name, {}, name)


RECIPES: dict[str, Recipe] = {
    "stage1": _one("stage1"),
    "calibrated": _one("calibrated"),
    "branchwise": Recipe(
        train=("balanced", "instance"),
        evaluation=("mixture", "balanced"),
        receiver="balanced",
        donors={"instance": "instance", "reverse": "reverse"},
        evaluate="mixture",
    ),
}
#: Not a recipe for a host: stores the rows that a `reverse` donor reads under `branchwise`.
EXTRA = {"reverse": Recipe(("reverse",), (), "reverse", {}, "mixture")}
NAMES = (*RECIPES, *EXTRA)


def stored(recipes: list[str], split: str) -> list[str]:
    """Sorted names of the statistics that rows of `split` are stored under, for all `recipes` together.

    Evaluation rows are always stored under `stage1` as well, as the stage-I classifier is evaluated on them.
    """
    chosen = [{**RECIPES, **EXTRA}[name] for name in recipes]
    if split == "train":
        return sorted({s for recipe in chosen for s in recipe.train})
    return sorted({"stage1"} | {s for recipe in chosen for s in recipe.evaluation})

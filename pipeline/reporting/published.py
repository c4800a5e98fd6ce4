"""Estimates the time of the published training, which runs the frozen backbone at every step of every head.

The estimate is based on the measured forward passes of the extraction that made the cache. Only forward passes count;
the published code also decodes and augments images, and trains the classifier.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from h2t.pipeline.reporting.results import HostResult

CLOCKS = ("seconds", "cpu")  # wall-clock and processor time


@dataclass(frozen=True)
class Estimate:
    """Time to train one host's heads: here on a cache, and in the published way.

    `twice` and `once` count the different runs among the heads with and without donors, which need two passes and one
    pass per step. `ours` and `theirs` are seconds by clock ("seconds" and "cpu"); None if not recorded, or only in part
    because training was interrupted. `shared` is `ours` plus the whole extraction; None if the extraction was resumed
    or took rows from another cache. `train` and `extract` are the run records.
    """

    host: str
    heads: int
    twice: int
    once: int
    steps: int
    batch_size: int
    ours: Mapping[str, float | None]
    theirs: Mapping[str, float | None]
    shared: Mapping[str, float | None]
    train: Mapping[str, Any]
    extract: Mapping[str, Any]

    @property
    def images(self) -> int:
        """Images that pass through the backbone in the published way."""
        return (2 * self.twice + self.once) * self.steps * self.batch_size

    def times(self, clock: str, of: str = "ours") -> float | None:
        """The time of the published way divided by `ours` or `shared`, both by `clock`; None if one is unknown."""
        theirs, mine = self.theirs[clock], getattr(self, of)[clock]
        return theirs / mine if theirs and mine else None


def different_runs(heads: pd.DataFrame, constants: Sequence[str] = ()) -> tuple[int, int]:
    """The number of runs that the published way needs for `heads`: (with donors, without). `constants`: columns.

    Heads that cannot differ count as one run: at ratio 0, donor and channels have no effect; at ratio 1, all channels
    come from one donor, whatever their selection (except `shuffled`, which mixes donors).
    """
    with_donors = heads[heads.ratio > 0]
    whole = (with_donors.ratio == 1) & (with_donors.selection != "shuffled")
    chosen = with_donors.selection.mask(whole, "all")
    runs = with_donors.assign(selection=chosen)[["ratio", "donor", "selection", "seed", *constants]].drop_duplicates()
    return len(runs), len(heads.loc[heads.ratio == 0, ["seed", *constants]].drop_duplicates())


def estimates(results: Sequence[HostResult], runs: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    """An estimate for each host whose training, and whose cache's forward passes, are in the run records `runs`."""
    trained = {r["name"]: r for r in runs if r["stage"] == "train_classifier"}
    extracted = {r.get("fingerprint"): r for r in runs if r["stage"] == "extract" and r.get("forward_images")}
    estimated = []
    for result in results:
        train, extract = trained.get(result.name), extracted.get(result.about["host"]["cache"])
        if train and extract and train.get("steps") and train.get("batch_size"):
            estimated.append(_estimate(result, train, extract))
    return estimated


def _estimate(result: HostResult, train: Mapping[str, Any], extract: Mapping[str, Any]) -> Estimate:
    twice, once = different_runs(result.every_head, result.constants)
    images = (2 * twice + once) * train["steps"] * train["batch_size"]
    whole = not extract["kept_shards"] and not extract["taken"]
    ours = {clock: None if train["resumed_steps"] else train.get(clock) for clock in CLOCKS}
    theirs = {clock: images * extract[f"forward_{clock}"] / extract["forward_images"] for clock in CLOCKS}
    shared = {c: ours[c] + extract[c] if whole and ours[c] and extract.get(c) else None for c in CLOCKS}
    return Estimate(
        host=result.name,
        heads=train["heads"],
        twice=twice,
        once=once,
        steps=train["steps"],
        batch_size=train["batch_size"],
        ours=ours,
        theirs=theirs,
        shared=shared,
        train=train,
        extract=extract,
    )

"""What the published way would take for the same heads: the frozen backbone run at every step of every head.

An estimate from a measured part: the forward passes of the extraction that made the cache. Only passes are counted; the
published way decodes and augments images and trains its classifier besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from h2t.pipeline.reporting.results import HostResult

CLOCKS = ("seconds", "cpu")


@dataclass(frozen=True)
class Estimate:
    """The heads of one host, trained here on a cache, beside the published way.

    `twice` and `once`: different runs among the heads, with and without donors. `ours` and `theirs`: seconds by the
    clock and of the processor; None for what was not recorded, or only in part because a killed process did the rest.
    `shared` is `ours` and the whole extraction, None where that went on from another's work.
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
        """How many go through the backbone in the published way."""
        return (2 * self.twice + self.once) * self.steps * self.batch_size

    def times(self, clock: str, of: str = "ours") -> float | None:
        """How many times longer the published way takes by `clock`, than `ours` or `shared`."""
        theirs, mine = self.theirs[clock], getattr(self, of)[clock]
        return theirs / mine if theirs and mine else None


def different_runs(heads: pd.DataFrame) -> tuple[int, int]:
    """How many runs the published way needs for `heads`: with donors, and without.

    At ratio 0 donor and channels change nothing; at ratio 1 all channels are a whole donor's, in whatever order.
    """
    with_donors = heads[heads.ratio > 0]
    whole = (with_donors.ratio == 1) & (with_donors.selection != "shuffled")
    chosen = with_donors.selection.mask(whole, "all")
    runs = with_donors.assign(selection=chosen)[["ratio", "donor", "selection", "seed"]].drop_duplicates()
    return len(runs), heads[heads.ratio == 0].seed.nunique()


def estimates(results: Sequence[HostResult], runs: Sequence[Mapping[str, Any]]) -> list[Estimate]:
    """One for each host whose training and whose cache's forward passes are among the run records `runs`."""
    trained = {r["name"]: r for r in runs if r["stage"] == "train_classifier"}
    extracted = {r.get("fingerprint"): r for r in runs if r["stage"] == "extract" and r.get("forward_images")}
    found = []
    for result in results:
        train, extract = trained.get(result.name), extracted.get(result.about["host"]["cache"])
        if train and extract and train.get("steps") and train.get("batch_size"):
            found.append(_estimate(result, train, extract))
    return found


def _estimate(result: HostResult, train: Mapping[str, Any], extract: Mapping[str, Any]) -> Estimate:
    twice, once = different_runs(result.heads)
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

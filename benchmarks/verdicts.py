"""Do verdicts hold when the whole pipeline runs again? `python -m benchmarks.verdicts --data DIR`.

The digits of `params.yaml`, on one thread and on two (other rounding, so other backbones), and with three other seeds
of division, stage I and statistics. Each run stands in DIR/<run>; what is finished is not run again. Prints, for every
host and figure, H2T minus without as replicate 0 alone says it and as all replicates say it; then, for both, how many
pairs of runs contradict each other (`higher` here, `lower` there), and in how many ordered pairs the mean of one run
lies in the interval of the other.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import yaml

from h2t.pipeline.evaluation.intervals import Difference

ROOT = Path(__file__).parent.parent
FIGURES = ("top1", "head", "medium", "tail", "ece")
HOSTS = ("dr",)  # of params.yaml, those with H2T
EVALUATED = {"one training": "data/evaluate_first", "all replicates": "data/evaluate"}


@dataclass(frozen=True)
class Repeat:
    """One run of the pipeline: seed of everything but stage II, and threads."""

    seed: int
    threads: int

    @property
    def name(self) -> str:
        return f"seed {self.seed}, {self.threads} thread{'s' if self.threads > 1 else ''}"


REPEATS = [Repeat(0, 1), Repeat(0, 2), Repeat(1, 1), Repeat(2, 1), Repeat(3, 1)]


def run(repeat: Repeat, folder: Path) -> None:
    """Runs what is missing of the pipeline in `folder`. Raises CalledProcessError."""
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values |= {"seed": repeat.seed, "device": "cpu"}
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    # On a busy machine, threads that spin while they wait take the processor from each other.
    threads = {"OMP_NUM_THREADS": str(repeat.threads), "OMP_WAIT_POLICY": "passive"}
    backbone, cache = "data/train_backbone/ce_mixup", "data/extract/ce_mixup"
    commands = [
        ["inputs", "inputs", "data/inputs"],
        ["prepare", "data/prepare"],
        ["train-backbone", "ce_mixup", "data/prepare", backbone],
        ["extract", "ce_mixup", "data/prepare", backbone, cache],
        ["replicates", "data/inputs", "data/replicates"],
    ]
    for name in HOSTS:
        heads = f"data/train_classifier/{name}"
        given = [name, cache, heads, backbone]
        commands += [
            ["train-classifier", name, cache, backbone, heads],
            ["evaluate", *given, f"{EVALUATED['all replicates']}/{name}"],
            ["evaluate", "--set", "replicates=[0]", *given, f"{EVALUATED['one training']}/{name}"],
        ]
    for command in commands:
        if not (folder / command[-1]).exists():
            h2t = [sys.executable, "-m", "h2t.pipeline", *command]
            subprocess.run(h2t, cwd=folder, env=os.environ | threads, check=True, stdout=sys.stderr)


def stated(evaluated: Path) -> dict[str, Difference]:
    """H2T minus without, by figure, as an evaluation says it."""
    found = json.loads((evaluated / "metrics.json").read_text(encoding="utf-8"))["difference"]
    return {figure: Difference(**{**found[figure], "covers": tuple(found[figure]["covers"])}) for figure in FIGURES}


def contradictions(said: Sequence[Difference]) -> int:
    """Pairs of runs of which one says `higher` and the other `lower`."""
    return sum({a.verdict, b.verdict} == {"higher", "lower"} for a, b in combinations(said, 2))


def inside(said: Sequence[Difference]) -> int:
    """Ordered pairs of runs where the mean of the second lies in the interval of the first."""
    return sum(a.low <= b.mean <= a.high for a, b in permutations(said, 2) if a.low is not None and a.high is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    folders = {repeat.name: given.data / f"{repeat.seed}-{repeat.threads}" for repeat in REPEATS}
    for repeat in REPEATS:
        run(repeat, folders[repeat.name])
    for host in HOSTS:
        found = {
            way: {name: stated(folder / place / host) for name, folder in folders.items()}
            for way, place in EVALUATED.items()
        }
        print(f"{host}:\n\n| figure | run | {' | '.join(EVALUATED)} |\n| --- | --- | --- | --- |")
        for figure in FIGURES:
            for name in folders:
                print(f"| {figure} | {name} | {' | '.join(runs[name][figure].text for runs in found.values())} |")
        print("\n| figure | intervals of | contradictions | mean of a run in the interval of another |")
        print("| --- | --- | --- | --- |")
        for figure in FIGURES:
            for way, runs in found.items():
                said = [differences[figure] for differences in runs.values()]
                pairs = len(said) * (len(said) - 1)
                print(f"| {figure} | {way} | {contradictions(said)} | {inside(said)} of {pairs} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

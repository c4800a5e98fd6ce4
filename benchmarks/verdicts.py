"""Do verdicts hold when the whole pipeline runs again? `python -m benchmarks.verdicts --data DIR`.

The digits of `params.yaml`, on one thread and on two (other rounding, so another backbone), and with three other seeds
of division, stage I and statistics. Each run stands in DIR/<run>; what is finished is not run again. Prints, for every
host, H2T minus without as its interval over seeds alone says it, and as the evaluation says it, which covers test
images too; and which pairs of runs contradict each other: `higher` here, `lower` there.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml

from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting.results import difference, load_result

ROOT = Path(__file__).parent.parent
FIGURES = ("top1", "head", "medium", "tail", "ece")
HOSTS = ("dr",)  # of params.yaml, those with H2T


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
    folder.mkdir(parents=True, exist_ok=True)
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values |= {"seed": repeat.seed, "device": "cpu"}
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    # On a busy machine, threads that spin while they wait take the processor from each other.
    threads = {"OMP_NUM_THREADS": str(repeat.threads), "OMP_WAIT_POLICY": "passive"}
    backbone, cache = "data/train_backbone/ce_mixup", "data/extract/ce_mixup"
    commands = [
        ["prepare", "data/prepare"],
        ["train-backbone", "ce_mixup", "data/prepare", backbone],
        ["extract", "ce_mixup", "data/prepare", backbone, cache],
    ]
    for name in HOSTS:
        heads = f"data/train_classifier/{name}"
        commands.append(["train-classifier", name, cache, backbone, heads])
        commands.append(["evaluate", name, cache, heads, backbone, f"data/evaluate/{name}"])
    for command in commands:
        if not (folder / command[-1]).exists():
            h2t = [sys.executable, "-m", "h2t.pipeline", *command]
            subprocess.run(h2t, cwd=folder, env=os.environ | threads, check=True, stdout=sys.stderr)


def verdicts(folder: Path, host: str) -> dict[str, tuple[Difference, Difference]]:
    """H2T minus without, by figure: over seeds alone, and as evaluated."""
    result = load_result(host, folder / "data/evaluate" / host)
    with_h2t, without = result.at(result.metrics["with_h2t"]["ratio"]), result.at(0.0)
    found = {}
    for figure in FIGURES:
        seeds = difference(with_h2t, without, figure)
        stated = result.metrics["difference"][figure]
        if seeds and stated:
            found[figure] = (seeds, Difference(**{**stated, "covers": tuple(stated["covers"])}))
    return found


def contradictions(said: Sequence[str | None]) -> int:
    """Pairs of runs of which one says `higher` and the other `lower`."""
    return sum({a, b} == {"higher", "lower"} for a, b in combinations(said, 2))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    found = {}
    for repeat in REPEATS:
        folder = given.data / f"{repeat.seed}-{repeat.threads}"
        run(repeat, folder)
        found[repeat.name] = {host: verdicts(folder, host) for host in HOSTS}
    print("| host, figure | run | over seeds alone | over seeds and test images |\n| --- | --- | --- | --- |")
    opposed = [0, 0]
    for host in HOSTS:
        for figure in FIGURES:
            lines = {name: hosts[host][figure] for name, hosts in found.items()}
            for name, (seeds, both) in lines.items():
                print(f"| {host}, {figure} | {name} | {seeds.text} | {both.text} |")
            for which in (0, 1):
                opposed[which] += contradictions([pair[which].verdict for pair in lines.values()])
    print(f"\n{json.dumps({'contradictions over seeds alone': opposed[0], 'over seeds and test images': opposed[1]})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

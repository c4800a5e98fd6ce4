"""SIGKILL at random instants of writing a cache of 14 shards; after each, the run is started again and must end.

    python tests/faults/kill.py --kills 100 --seed 1

Counts results that are byte for byte those of an undisturbed run, and the shards whose work was lost: begun before the
kill and yet written again. Exit 1 if one result differs or one kill costs more than one shard.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("writing.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@dataclass(frozen=True)
class Outcome:
    """One kill: when (seconds after writing began), shards begun and finished by then, lost, and the result."""

    after: float
    begun: int
    finished: int
    lost: int
    identical: bool
    litter: tuple[str, ...]


def start(target: Path, *options: str) -> tuple[subprocess.Popen[str], set[int]]:
    """A writing process, and the shards that it says it will write."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, CHILD, target, *options], **pipes, env=ENVIRONMENT, text=True)
    assert process.stdout is not None
    return process, {int(shard) for shard in process.stdout.readline().split()[1:]}


def undisturbed(target: Path) -> float:
    """Writes the cache; returns the seconds from the first shard to the end of the process."""
    process, _ = start(target)
    began = time.perf_counter()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return time.perf_counter() - began


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def kills(folder: Path, count: int, seed: int) -> Iterator[Outcome]:
    """`count` kills that hit a running process, each on a new target, uniform over the writing and the commit."""
    draws = random.Random(seed)
    whole = folder / "whole"
    work = min(undisturbed(whole), undisturbed(folder / "again"))
    expected = contents(whole)
    assert contents(folder / "again") == expected
    while count:
        target = folder / "c" / "cache"
        target.parent.mkdir()
        process, _ = start(target)
        after = draws.uniform(0, work)
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
        if process.returncode == -signal.SIGKILL and not target.exists():
            count -= 1
            begun = {int(line.split()[1]) for line in said.splitlines() if line.startswith("begin ")}
            finished = {int(line.split()[1]) for line in said.splitlines() if line.startswith("end ")}
            process, again = start(target)
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            litter = tuple(sorted(p.name for p in target.parent.iterdir() if p != target))
            lost = len(begun & again)
            yield Outcome(after, len(begun), len(finished), lost, contents(target) == expected, litter)
        shutil.rmtree(target.parent)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        found = list(kills(Path(folder), given.kills, given.seed))
    identical = sum(outcome.identical and not outcome.litter for outcome in found)
    lost = Counter(outcome.lost for outcome in found)
    within = Counter(outcome.finished for outcome in found)
    print(f"{identical} of {len(found)} results byte-identical after resuming")  # noqa: T201
    print(f"shards lost per kill: {dict(sorted(lost.items()))}; finished before it: {dict(sorted(within.items()))}")  # noqa: T201
    if identical < len(found) or max(lost) > 1:
        raise SystemExit("a kill did harm")


if __name__ == "__main__":
    main()

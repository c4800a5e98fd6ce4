"""Faults at random instants of every stage of presets/tiny.yaml; after each, the same command must end in its bytes.

    python tests/faults/campaign.py --runs 320 --seed 1
    python tests/faults/campaign.py --seed 1 --only 17      # one of them again

A run copies what a stage reads, starts the stage's command, holds it at an instant of its work, strikes, and looks: is
the output the old one, the new one or none, is what was read untouched, does the exit code tell the truth, is what it
said one line? Then the fault is lifted and the same command must give, byte for byte, the undisturbed output and leave
nothing else behind. Exit 1 if one of this fails.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fault import Fault, Place
from faults import faults
from outcomes import Outcome, counted, table
from process import COLD, Command
from stages import ROOT, STAGES, Stage, furnish
from undisturbed import Undisturbed
from verdict import converged, lines, struck

COLD_SHARE = 1 / 20  # of the runs that may start warm; a new interpreter takes seconds
TIME_SHARE = 1 / 2  # of the warm runs that are struck after a random time, and not just before a change
OVER_SHARE = 1 / 3  # of the runs that begin over an older output
ATTEMPTS = 30  # to strike a command before it ends


def cells(seed: int, given: Sequence[Fault], skipped: Container[str] = ()) -> Iterator[tuple[Fault, Stage]]:
    """Faults and stages by turns, so that the first few runs meet every fault and every stage.

    What a machine lacks is left out of a turn that is the same on all machines.
    """
    draws = random.Random(seed)
    while True:
        order, stages = draws.sample(list(given), len(given)), draws.sample(list(STAGES.values()), len(STAGES))
        for shift in range(len(stages)):
            for i, fault in enumerate(order):
                stage = stages[(i + shift) % len(stages)]
                if shift % fault.every == 0 and fault.concerns(stage) and fault.name not in skipped:
                    yield fault, stage


def run(number: int, seed: int, fault: Fault, stage: Stage, undisturbed: Undisturbed, folder: Path) -> Outcome:
    """One fault at one instant of one stage, and the same command again."""
    draws = random.Random(f"{seed}/{number}")
    for attempt in range(ATTEMPTS):
        room = folder / f"{number}-{attempt}"
        found = strike(number, draws, fault, stage, undisturbed, room)
        if found is None or not found.wrong:
            shutil.rmtree(room, ignore_errors=True)
        if found is not None:
            return found
    raise RuntimeError(f"{fault.name}, {stage.name}: ended before the fault {ATTEMPTS} times")


def strike(
    number: int, draws: random.Random, fault: Fault, stage: Stage, undisturbed: Undisturbed, room: Path
) -> Outcome | None:
    """None if the command ended before the instant."""
    began = time.perf_counter()
    cold = COLD if fault.cold or draws.random() < COLD_SHARE else None
    over = draws.random() < OVER_SHARE
    measured = undisturbed.cold(stage) if cold else undisturbed.warm[stage.name]
    instant = measured.instant(draws, "seconds" if cold or draws.random() < TIME_SHARE else fault.before)
    arguments = (*stage.arguments, *stage.record, *(("--replace",) if over and stage.other else ()))
    place = Place(room, lambda: Command(arguments, place.folder, room / "second"))
    place.folder.mkdir(parents=True)
    data = place.folder / "data"
    fault.prepare(place)
    try:
        furnish(place.folder, stage, undisturbed.whole)
        if over:
            shutil.copytree(undisturbed.old(stage), data / stage.writes)
        fault.furnished(place, stage.reads)
        command = Command(
            arguments, place.folder, room / "first", cold=cold, environment=fault.environment, holds=instant
        )
        if not command.hold(instant):
            command.wait()
            return None
        fault.strike(command, place, draws)
        both = [command, *([place.second] if place.second else [])]
        ends = [c.wait() for c in both]
        said = [c.errors for c in both]
        fault.lift(place)
        wrong = ["hangs"] if any(c.hung for c in both) else []
        wrong += struck(fault, stage, undisturbed, data, ends, said, over=over)
        again = Command(arguments, place.folder, room / "again")
        wrong += converged(stage, undisturbed, data, again.wait(), again.errors)
    finally:
        fault.clear(place)
    last = next((lines(text)[-1] for text in said if lines(text)), "")
    start = "cold" if cold else "warm"
    seconds = round(time.perf_counter() - began, 2)
    return Outcome(number, fault.name, stage.name, start, over, str(instant), tuple(ends), last, seconds, tuple(wrong))


def campaign(runs: int, seed: int, minutes: float, folder: Path, only: int | None = None) -> dict[str, Any]:
    """The runs and what became of them, as JSON."""
    given = faults()
    skipped = {f.name: reason for f in given if (reason := f.lacking())}
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}", flush=True)  # noqa: T201
    began = time.perf_counter()
    undisturbed = Undisturbed(folder / "undisturbed")
    for name, one in undisturbed.warm.items():
        files = f"{one.change} changes of the disk, {one.reading} files opened to read"
        print(f"undisturbed: {name} {one.seconds:.2f} s, {files}", flush=True)  # noqa: T201
    outcomes: list[Outcome] = []
    turns = cells(seed, given, skipped)
    for number, (fault, stage) in zip(range(runs), turns, strict=False):
        if only not in (None, number):
            continue
        if time.perf_counter() - began > 60 * minutes:
            print(f"stopped after {minutes:g} minutes", flush=True)  # noqa: T201
            break
        outcomes.append(found := run(number, seed, fault, stage, undisturbed, folder))
        print(found, flush=True)  # noqa: T201
    return {
        **counted(outcomes, [f.name for f in given]),
        "seed": seed,
        "skipped": skipped,
        "seconds": round(time.perf_counter() - began),
        "undisturbed": {name: asdict(one) for name, one in undisturbed.warm.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=320)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--minutes", type=float, default=50, help="no run begins later than this")
    parser.add_argument("--only", type=int, help="the number of one run, to see it again")
    parser.add_argument("--out", type=Path, help="a JSON file for the runs and the machine")
    parser.add_argument(
        "--keep", type=Path, help="a folder to work in, which stays; wrong runs leave their places there"
    )
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for the processes that this one starts
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")  # nothing has imported torch yet
    print(f"seed {given.seed}", flush=True)  # noqa: T201
    sys.path.append(str(ROOT))
    from benchmarks.measure import machine, save

    about = machine()
    with tempfile.TemporaryDirectory(prefix="h2t-faults-") as scratch:
        body = campaign(given.runs, given.seed, given.minutes, given.keep or Path(scratch), given.only)
    print(table(body))  # noqa: T201
    print(f"seed {given.seed}: {body['runs']} runs in {body['seconds']} s, {len(body['wrong'])} lost or wrong")  # noqa: T201
    if given.out:
        save(given.out, {**body, "machine": about})
    if body["wrong"]:
        raise SystemExit("a fault did harm")


if __name__ == "__main__":
    main()

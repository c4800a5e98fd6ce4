"""Kills a run at random moments and starts it again until it ends, or strikes it before a file operation."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

ATTEMPTS = 20


def finish(command: Sequence[str], env: dict[str, str], cwd: Path) -> None:
    """Runs to the end."""
    done = subprocess.run(command, capture_output=True, env=env, cwd=cwd, timeout=1200)
    assert done.returncode == 0, done.stderr.decode()


def journalled(staging: Path) -> int:
    """Shards in the journal; a line that was cut short does not count."""
    journal = staging / "journal"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def heard() -> None:
    """In a new process: Ctrl-C is heard, also where whoever started the tests ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_and_restart(
    command: Sequence[str],
    env: dict[str, str],
    cwd: Path,
    target: Path,
    *,
    kills: int,
    shards: int,
    seed: int,
    pause: float = 0.05,
    how: Sequence[signal.Signals] = (signal.SIGKILL,),
) -> list[int]:
    """Ends the run at `kills` random moments of its work, by the signals `how` in turn, and lets the last run end.

    A moment is a random amount of finished work plus a random pause of at most `pause` seconds, not a wall-clock time,
    so that kills spread over the whole of the work on a slow machine and on a fast one. One that struck before the
    first shard or after the last one is repeated. Returns the shards in the journal after each kill.
    """
    draws = random.Random(seed)
    staging = target.parent / f".{target.name}.staging"
    found: list[int] = []
    for moment, number in zip(sorted(draws.sample(range(1, shards - 1), kills)), cycle(how), strict=False):
        for _ in range(ATTEMPTS):
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd, preexec_fn=heard
            )
            process.stdout.readline()  # what it will do: rows, bytes, shards kept; now it works
            while journalled(staging) < moment and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draws.uniform(0, pause))
            process.send_signal(number)
            errors = process.communicate()[1]
            assert b"Traceback" not in errors, errors.decode()
            if process.returncode != 0 and 0 < journalled(staging) < shards:
                break
            if process.returncode == 0:  # faster than the kill
                shutil.rmtree(target)
        else:
            raise AssertionError(f"no kill amid the work in {ATTEMPTS} runs: {errors.decode()}")
        if number == signal.SIGKILL:
            assert process.returncode == -number, errors.decode()
        found.append(journalled(staging))
    finish(command, env, cwd)
    return found


CHANGES = ("os.rename", "os.rmdir", "os.remove", "os.mkdir")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def struck(work: Callable[[], None], step: int, strike: Callable[[], None] = killed) -> int:
    """The exit code of `work` in a fork of this process; `strike` is called once, just before change number `step`.

    A change renames or removes a file, or makes or removes a directory.
    """

    def child() -> None:
        left = step

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left == -1:
                    strike()

        sys.addaudithook(count)
        work()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode

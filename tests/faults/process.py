"""A command of the pipeline as a process that can be held at an instant of its work.

A cold command is a new interpreter. A warm one is a fork of this process, which has imported everything: it begins to
work at once, so that nearly every instant falls into the work and a campaign of hundreds is a matter of minutes.
"""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import ROOT

FORK = multiprocessing.get_context("fork")
LONGEST = 120.0  # seconds; whoever takes longer hangs
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Instant:
    """Seconds after the work began, or just before a change of the disk or the opening of a file to read, by number.

    Changes are files opened for writing, renamed or removed, and directories made or removed.
    """

    kind: str  # seconds | change | reading
    value: float

    def __str__(self) -> str:
        return f"{self.value:.3f} s" if self.kind == "seconds" else f"{self.kind} {self.value}"


@dataclass(frozen=True)
class Measured:
    """An undisturbed command: how long it worked, and how many changes and readings that took."""

    seconds: float
    change: int = 0
    reading: int = 0

    def instant(self, draws: random.Random, kind: str) -> Instant:
        if kind == "seconds" or not getattr(self, kind):
            return Instant("seconds", draws.uniform(0, self.seconds))
        return Instant(kind, draws.randrange(getattr(self, kind)))


class Command:
    """`h2t ARGUMENTS` in `folder`, started. What it says goes to files in `log`."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        log: Path,
        *,
        cold: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        holds: Instant | None = None,
    ) -> None:
        """`cold`: the words before the arguments, as in (python, -m, pipeline); None is a warm start.

        A warm command holds itself at the change or the reading `holds`.
        """
        log.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.hung = False
        if cold is None:
            ready, tell = FORK.Pipe(duplex=False)
            self._warm = FORK.Process(target=_work, args=(arguments, folder, log, holds, tell))
            self._cold = None
            self._warm.start()
            tell.close()
            with suppress(EOFError):
                ready.recv()
            self.pid = int(self._warm.pid or 0)
        else:
            self._warm = None
            with (log / "out").open("wb") as out, (log / "err").open("wb") as err:
                self._cold = subprocess.Popen(
                    [*cold, *arguments],
                    cwd=folder,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
            self.pid = self._cold.pid
        self._began = time.perf_counter()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._cold.poll() if self._cold else self._warm.exitcode  # type: ignore[union-attr]

    def wait(self) -> int:
        """The exit code at its end. One that hangs is killed."""
        while (code := self.poll()) is None:
            if time.perf_counter() - self._began > LONGEST and not self.hung:
                self.hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        self.seconds = time.perf_counter() - self._began
        return code

    def hold(self, instant: Instant) -> bool:
        """Waits until it is held at `instant`; False if it ended before."""
        if instant.kind == "seconds":
            time.sleep(max(0.0, instant.value - (time.perf_counter() - self._began)))
            if self.poll() is not None:
                return False
            os.kill(self.pid, signal.SIGSTOP)
        while not self.held:
            if self.poll() is not None:
                return False
            time.sleep(0.001)
        return True

    @property
    def held(self) -> bool:
        with suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    @property
    def errors(self) -> str:
        return (self.log / "err").read_text(errors="replace") if (self.log / "err").exists() else ""

    @property
    def modules(self) -> list[str]:
        """What a warm command that has ended had imported by then."""
        return (self.log / "modules").read_text().splitlines()

    @property
    def measured(self) -> Measured:
        """Of a warm command that has ended."""
        return Measured(self.seconds, *map(int, (self.log / "counts").read_text().split()))


def _work(arguments: Sequence[str], folder: Path, log: Path, holds: Instant | None, tell: Any) -> None:
    """In the forked process: the command, as `h2t` would run it."""
    from h2t.pipeline.command_line.main import main

    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counters = {"change": itertools.count(), "reading": itertools.count()}
    inside = f"{folder}{os.sep}"
    done = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if done or (event != "open" and event not in CHANGES) or isinstance(args[0], int):
            return
        path = os.fsdecode(args[0])
        if path.startswith(os.sep) and not path.startswith(inside):
            return
        kind = "reading" if event == "open" and not args[2] & WRITING else "change"
        if next(counters[kind]) == (holds.value if holds and holds.kind == kind else None):
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)
    tell.send(None)
    tell.close()
    try:
        main(args=list(arguments), prog_name="h2t")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is not the command's
        done = True
        (log / "counts").write_text(" ".join(str(next(c)) for c in counters.values()))
        (log / "modules").write_text("\n".join(sys.modules))


COLD = (sys.executable, "-m", "h2t.pipeline")

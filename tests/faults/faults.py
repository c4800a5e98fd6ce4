"""Every fault of the campaign; those of signals, memory, the clock and a second process are here."""

import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from disks import Deleted, FullDisk, ReadOnly, SlowDisk
from fault import Fault, Place
from process import Command

OVERTAKEN = 5.0  # seconds that the first of two commands is held at most, so that the second can end before it
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))


class Signalled(Fault):
    def __init__(self, name: str, number: signal.Signals, **more: object) -> None:
        super().__init__(name, **more)  # type: ignore[arg-type]
        self.number = number

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        os.kill(command.pid, self.number)
        with suppress(ProcessLookupError):
            command.go_on()


class Stopped(Fault):
    """SIGSTOP, a pause, SIGCONT."""

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        time.sleep(draws.uniform(0.05, 0.5))
        command.go_on()


class AddressSpace(Fault):
    """RLIMIT_AS a little above what is mapped: the next larger allocation fails."""

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        pages = int(Path(f"/proc/{command.pid}/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + draws.choice([0, draws.randrange(2**24)])
        resource.prlimit(command.pid, resource.RLIMIT_AS, (limit, limit))
        command.go_on()


class MemoryGroup(Fault):
    """A control group with little memory: the kernel kills whoever asks for more."""

    group: Path | None = None

    def lacking(self) -> str | None:
        try:
            self.group = _memory_group()
        except OSError as error:
            return f"no control group for memory ({error.strerror})"
        self.group.rmdir()
        return None

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        self.group = _memory_group()
        limit = str(draws.choice([1, 2, 4, 8, 16]) * 2**20)
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (self.group / name).exists():
                (self.group / name).write_text(limit)
        if (self.group / "memory.swap.max").exists():
            (self.group / "memory.swap.max").write_text("0")
        (self.group / "cgroup.procs").write_text(str(command.pid))
        command.go_on()

    def lift(self, place: Place) -> None:
        for _ in range(100):
            if self.group is None or not self.group.exists():
                return
            with suppress(OSError):  # busy, until the kernel has let go of the process
                self.group.rmdir()
            time.sleep(0.02)


class Clock(Fault):
    """The clock of the day jumps by hours to years, and sometimes the monotonic one with it (libfaketime)."""

    def lacking(self) -> str | None:
        return None if FAKETIME else "no libfaketime (Debian: faketime)"

    def furnished(self, place: Place, reads: tuple[str, ...]) -> None:
        (place.room / "offset").write_text("+0\n")
        self.environment = {
            "LD_PRELOAD": str(FAKETIME[0]),
            "FAKETIME_TIMESTAMP_FILE": str(place.room / "offset"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        jump = draws.choice(["-2h", "+2h", "-400d", "+400d", "-8y", "+8y"])
        (place.room / "offset").write_text(f"{jump}\n")
        command.go_on()


class Twice(Fault):
    """The same command once more, in the same place, while the first is at work."""

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        place.second = place.again()
        until = time.perf_counter() + draws.choice([0, draws.uniform(0, 0.5), OVERTAKEN])
        while time.perf_counter() < until and place.second.poll() is None:
            time.sleep(0.005)
        command.go_on()


def _memory_group() -> Path:
    """A new control group of version 1 or 2."""
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.is_dir() else Path("/sys/fs/cgroup")) / f"h2t-faults-{os.getpid()}"
    group.mkdir(exist_ok=True)
    if not any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes")):
        group.rmdir()
        raise OSError(0, "the memory controller is not enabled there")
    return group


def faults() -> list[Fault]:
    """Every fault, in the order of the table."""
    kill, term = -signal.SIGKILL, -signal.SIGTERM
    return [
        Signalled("SIGKILL", signal.SIGKILL, ends=(kill,), cleans=False),
        Signalled("SIGTERM", signal.SIGTERM, ends=(term, 143), cleans=False),
        Signalled("Ctrl-C", signal.SIGINT),
        Stopped("SIGSTOP, SIGCONT", ends=(0,)),
        FullDisk("full disk"),
        ReadOnly("read-only disk", cleans=False),  # what was renamed last may be lost with the disk
        SlowDisk("slow disk", ends=(0,)),
        AddressSpace("address space limit", quiet=False, cleans=False, before="reading"),
        MemoryGroup("out of memory", ends=(0, kill), cleans=False),
        Clock("clock jump", ends=(0,), cold=True, every=3),
        Twice("two processes"),
        Deleted("shared cache deleted", before="reading"),
    ]


if sys.platform != "linux":
    raise SystemExit("the fault campaign needs Linux: it reads /proc, and most faults are the kernel's")

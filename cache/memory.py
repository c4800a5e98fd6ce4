"""How much memory there is to use: the machine's, within what a container and `ulimit -v` allow."""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

M_MMAP_THRESHOLD = -3  # of malloc.h
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Version of control groups -> folder, limit, use, and that part of the use which the kernel takes back when asked.
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("", "memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes of host memory that this process could use now."""
    return max(0, min(_machine(), _address_space(), *_groups()))


def return_freed_arrays() -> None:
    """Gives memory of arrays above 1 MiB back to the system as soon as they are freed; for small machines.

    The C library otherwise keeps freed pieces of up to 32 MiB for later use: training in 1 GB held 150 MB of them. The
    price is that new arrays are cleared by the system. Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def _machine() -> int:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 1024**3


def _address_space() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    pages = int(_read(PROC / "self" / "statm").split()[0])
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def _groups() -> Iterator[int]:
    """What each control group above this process leaves; inside a container only those that it sees."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            folder, *files = V1 if controllers else V2
            at = GROUPS / folder / path.strip("/")
            yield from (_left(g, *files) for g in (at, *at.parents) if g.is_relative_to(GROUPS / folder))


def _left(group: Path, limit: str, used: str, reclaimable: str) -> int:
    try:
        if (most := _read(group / limit).strip()) == "max":
            return sys.maxsize
        parts = dict(map(str.split, _read(group / "memory.stat").splitlines()))
        return int(most) - int(_read(group / used)) + int(parts[reclaimable])
    except (OSError, KeyError):  # not shown here
        return sys.maxsize


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")

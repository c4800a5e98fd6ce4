"""How much memory this process can use: what the machine has free, within its control groups and `ulimit -v`.

On Linux the kernel says it in /proc; elsewhere psutil asks the system, and there are no control groups.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

M_MMAP_THRESHOLD = -3  # from malloc.h
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: For each version of control groups: folder, limit, usage, and the part of the usage that the kernel can reclaim.
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("", "memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes of host memory that this process can still allocate."""
    return max(0, min(_machine(), _address_space(), *_groups()))


def return_freed_arrays() -> None:
    """Makes malloc return arrays above 1 MiB to the system as soon as they are freed; for small machines.

    By default the C library keeps freed blocks of up to 32 MiB for reuse; training in 1 GB held 150 MB of them. The
    cost is that the system clears the memory of every new array. Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def _machine() -> int:
    try:
        told = _read(PROC / "meminfo")
    except OSError:
        with suppress(OSError, RuntimeError, ImportError):  # on a Linux that hides /proc, it asks there or is missing
            import psutil

            return int(psutil.virtual_memory().available)
    else:
        for line in told.splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * 1024**3


def _address_space() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        used = int(_read(PROC / "self" / "statm").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # macOS takes this limit and does not enforce it
        return sys.maxsize
    return limit - used


def _groups() -> Iterator[int]:
    """Bytes left in each control group of this process and its parents; in a container, only in the visible ones."""
    lines = ""
    with suppress(OSError):
        lines = _read(PROC / "self" / "cgroup")
    for line in lines.splitlines():
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
    except (OSError, KeyError):  # this group does not report its memory
        return sys.maxsize


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")

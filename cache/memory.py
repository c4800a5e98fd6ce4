"""How much memory there is to use: the machine's, within what a container and `ulimit -v` allow."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: Version of control groups -> folder, limit, use, and that part of the use which the kernel takes back when asked.
V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("", "memory.max", "memory.current", "inactive_file")


def available_memory() -> int:
    """Bytes of host memory that this process could use now."""
    return max(0, min(_machine(), _address_space(), *_groups()))


def _machine() -> int:
    for line in (PROC / "meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 * 1024**3


def _address_space() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    pages = int((PROC / "self" / "statm").read_text(encoding="ascii").split()[0])
    return limit - pages * os.sysconf("SC_PAGE_SIZE")


def _groups() -> Iterator[int]:
    """What each control group above this process leaves; inside a container only those that it sees."""
    for line in (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limit, used, reclaimable = V1 if controllers else V2
        at = GROUPS / folder / path.strip("/")
        for group in (at, *at.parents):
            if not group.is_relative_to(GROUPS / folder):
                break
            try:
                most = (group / limit).read_text(encoding="ascii").strip()
                if most != "max":
                    statistics = dict(
                        s.split() for s in (group / "memory.stat").read_text(encoding="ascii").splitlines()
                    )
                    now = int((group / used).read_text(encoding="ascii")) - int(statistics[reclaimable])
                    yield int(most) - now
            except (OSError, KeyError):  # a group that is not shown here
                continue

"""What systems do differently: cores, processes, open files, and writing through to the disk. The portable ways.

Each way is chosen by what the system has, not by its name, so that one system can stand in for another in a test.
"""

import fcntl
import os
import resource
from contextlib import suppress

#: A cache keeps 256 open at most, and each thread that reads 128 more; macOS allows 10,240.
MANY_FILES = 4096
#: What macOS leaves in each folder that its Finder shows. It is nobody's work.
LITTER = frozenset({".DS_Store"})


def cores() -> int:
    """How many cores this process may use; where the system does not say, those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def alive(pid: int) -> bool:
    """Whether there is a process `pid`, of whichever user. Asks the kernel, as not every system has /proc."""
    try:
        if pid > 0:  # 0 and less mean groups of processes
            os.kill(pid, 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return pid > 0


def open_files() -> int:
    """How many files this process may have open; on macOS 256, unless somebody raised it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY_FILES if soft == resource.RLIM_INFINITY else soft


def may_open_many_files() -> None:
    """Raises the limit of `open_files` for this process, as far as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if open_files() < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def flush(handle: int) -> None:
    """Writes an open file, or a directory's entries, through to the disk, so that they survive a power cut.

    On macOS `fsync` ends when the disk has the bytes in its own memory, which a power cut clears.
    """
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # a network disk does not know it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)

"""Errors that the user can fix: one line, no traceback."""

import difflib
import errno
import os
from collections.abc import Iterable

from h2t.cache.redaction import one_line, redacted

LONGEST_MESSAGE = 200  # characters of a library's message that are shown
LONGEST_NAME = 100  # the time to compare two names grows with the square of their length


class UserError(Exception):
    """An error in one line: what is wrong, the rule, what was given, the way out. URLs lose login and query."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(redacted(message)))


#: Errors of a disk or a path that cannot be written, and the way out of each.
CANNOT_WRITE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "fix the permissions",
    errno.EPERM: "fix the permissions",
    errno.EROFS: "make the disk writable, or work on another one",
    errno.EIO: "check the disk, which may be broken",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOTDIR: "give another path",
    errno.EISDIR: "give another path",
    errno.EEXIST: "give another path",
    errno.ELOOP: "correct the links",
}
#: Those of them that blame a path, which must be known to be said.
OF_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
#: Messages of torch, of threads and of the library loader for "out of memory", where they do not raise MemoryError.
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread", "map segment")

#: Import names of the packages that the extra `pipeline` installs and the base install leaves out.
PIPELINE = {
    "PIL", "jinja2", "pandas", "pydantic", "safetensors", "scipy", "sklearn", "threadpoolctl",
    "torch", "torchvision", "tqdm",
}  # fmt: skip


def of_the_machine(error: BaseException) -> UserError | None:
    """A UserError for an `error` caused by the machine, otherwise None.

    Causes are a disk or path that cannot be written, too many open files, no folder for temporary files, no memory, a
    package that only the extra `pipeline` installs, and a user whose home folder or name is not known.
    """
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in PIPELINE:
        return UserError(f"{package}: not installed, and this command needs it; type: pip install 'h2t[pipeline]'")
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE and (error.filename or error.errno not in OF_PATHS):
        why, way_out = os.strerror(error.errno), CANNOT_WRITE[error.errno]
        return UserError(f"{error.filename or 'disk'}: {why}; {way_out}, then run again")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return UserError(f"files: {os.strerror(error.errno)}; raise the limit (ulimit -n 4096), then run again")
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # tempfile
        return UserError("TMPDIR: must name a folder that can be written, none can; type: export TMPDIR=PATH")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib, platformdirs
        return UserError("HOME: must name your home folder, which the system does not know; type: export HOME=PATH")
    nameless = any(words in str(error) for words in ("getpwuid()", "No username set"))  # getpass, which DVC asks
    if isinstance(error, KeyError | OSError) and nameless:
        return UserError("USER: must be set, as the system has no name for this user; type: export USER=NAME")
    known = isinstance(error, RuntimeError | ImportError) and any(words in str(error) for words in NO_MEMORY)
    if known or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        said = next(iter(str(error).splitlines()), "").rstrip(". ") or "not enough"
        return UserError(f"memory: {said}; raise the limit or close other programs, then run again")
    return None


def in_brief(error: BaseException) -> str:
    """The message of a library's error on one line of at most 200 characters, or the name of its class."""
    return " ".join(str(error).split())[:LONGEST_MESSAGE] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: object, known: Iterable[object]) -> str:
    """The hint "; did you mean 'x'?" if a name in `known` is close to `name`, else an empty string."""
    if len(text := str(name)) > LONGEST_NAME:
        return ""
    match = difflib.get_close_matches(text, [str(k) for k in known], n=1)
    return f"; did you mean {match[0]!r}?" if match else ""

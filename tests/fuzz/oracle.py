"""What a parser may do with hostile input: give a value, or refuse it in one line. Everything else is a finding.

Watched while it runs: the exception, its text, the memory it takes, and by an audit hook what it opens, removes,
starts, connects to or unpickles. The hook stays for the life of the process, as Python has no way to take one back.
"""

import os
import resource
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from h2t.cache.errors import CacheError
from h2t.pipeline.base.errors import UserError

REFUSALS = (CacheError, UserError, click.ClickException)
MAX_MESSAGE = 4000  # characters of a refusal
MAX_GROWTH_KB = 512 * 1024  # resident memory that one execution may add
ADDRESS_SPACE = 3 * 2**30  # beyond what the imports take; what asks for more gets MemoryError, which is a finding

HOMES = tuple({os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(),
Path(__file__).parents[2])}
              | {os.path.realpath(p) for p in sys.path if "site-packages" in p})  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Event -> where among its details a path stands, and where the directory that this is relative to.
CHANGES = {"os.remove": [(0, 1)], "os.rmdir": [(0, 1)], "os.mkdir": [(0, 2)], "os.rename": [(0, 2), (1, 3)],
           "os.link": [(1, 3)],
           "os.symlink": [(1, 2)], "os.truncate": [(0, 9)], "os.utime": [(0, 3)], "os.chmod": [(0, 2)],
           "os.chown": [(0, 3)],
           "shutil.rmtree": [(0, 1)], "shutil.move": [(0, 9), (1, 9)], "shutil.copyfile": [(1, 9)]}  # fmt: skip
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
         "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "webbrowser.open", "ftplib.connect",
         "urllib.Request", "http.client.connect", "code.__new__", "marshal.loads")  # fmt: skip


class Finding(Exception):
    """What a parser did and may not do."""


class Watch:
    """Notes what the process does outside of the folder it may write to, while `armed`."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)
        self.armed = False
        self.seen: list[str] = []
        self.known = set(sys.modules)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event == "open":
            path, mode, flags = details
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & WRITING):
                self._inside(event, path)
        elif event in CHANGES:
            for at, relative_to in CHANGES[event]:
                folder = details[relative_to] if relative_to < len(details) else None
                self._inside(event, details[at], folder if isinstance(folder, int) and folder >= 0 else None)
        elif event in NEVER:
            # Python's own import reads its compiled files by `marshal`, and `code.__new__` is `exec` of no text.
            # dask copies its own functions by pickling them.
            own = event in ("marshal.loads", "code.__new__") and _under("<frozen importlib")
            if not own and not (event == "pickle.find_class" and _under("site-packages/dask/")):
                self.seen.append(f"{event} {details[:1]!r}")
        # `ast.parse` says <unknown>, and what it makes cannot run.
        elif event == "compile" and str(details[1]) != "<unknown>" and not _under("<frozen importlib"):
            self.seen.append(f"compile {details[0]!r}"[:200])

    def _inside(self, event: str, path: Any, folder: int | None = None) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.realpath(f"/proc/self/fd/{folder}") if folder is not None else ""
            given = Path(place, os.fsdecode(path))
            link = event in ("os.remove", "os.rename")  # these take the link itself
            real = f"{os.path.realpath(given.parent)}/x" if link else os.path.realpath(given)
            if real != os.devnull and not f"{real}/".startswith(f"{self.folder}/"):
                self.seen.append(f"{event} {real}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raises Finding for whatever was noted while the block ran."""
        self.seen.clear()
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
        if len(sys.modules) != len(self.known):
            new = set(sys.modules) - self.known
            self.seen += [f"import {name}" for name in new if not _installed(sys.modules[name])]
            self.known = set(sys.modules)
        if self.seen:
            raise Finding(f"went beyond its input: {'; '.join(self.seen[:3])}")


def _installed(module: Any) -> bool:
    """Whether a module belongs to Python, to an installed package or to this project."""
    file = getattr(module, "__file__", None)
    return file is None or os.path.realpath(file).startswith(HOMES)


def _under(code: str) -> bool:
    """Whether a function of the files called so is at work."""
    frame = sys._getframe(2)
    while frame is not None:
        if code in frame.f_code.co_filename:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def judge(parse: Callable[[bytes], object], data: bytes, watch: Watch) -> bool:
    """Whether `data` gives a value (else it is refused, rightly). Raises Finding, or what `parse` may not raise."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = True
    with watch.watching():
        try:
            parse(data)
        except REFUSALS as error:
            value = False
            text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    if not value and (not text or not text.isprintable() or len(text) > MAX_MESSAGE):
        raise Finding(f"a refusal is one line of at most {MAX_MESSAGE} characters; got {text[:500]!r}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > MAX_GROWTH_KB:
        raise Finding(f"took {grown // 1024} MiB for {len(data)} bytes of input")
    return value


def limit_memory() -> None:
    """Lets this process take `ADDRESS_SPACE` more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextmanager
def workplace() -> Iterator[Path]:
    """A folder that a parser may write to, in one that must stay empty otherwise; the process works in the latter."""
    here = Path.cwd()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # thousands of small files a second
    with tempfile.TemporaryDirectory(prefix="h2t-fuzz-", dir=memory) as outer:
        inner, elsewhere = Path(outer, "inside"), Path(outer, "elsewhere")
        inner.mkdir()
        elsewhere.mkdir()
        os.chdir(elsewhere)
        try:
            yield inner
        finally:
            os.chdir(here)
        left = [p.name for p in (*Path(outer).iterdir(), *elsewhere.iterdir()) if p not in (inner, elsewhere)]
        if left:
            raise Finding(f"wrote outside of its folder: {left}")

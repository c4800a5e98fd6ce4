"""Writing a stage's outputs: all of them or none, the same bytes for the same content."""

import datetime
import errno
import fcntl
import glob
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from h2t.pipeline.base import code
from h2t.pipeline.base.errors import CANNOT_WRITE, UserError

NO_PLACE = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """A directory to fill that becomes `out` in one rename when the block ends well, and vanishes when it does not.

    An earlier output at `out` is replaced. Also after a kill or a power cut it is never there in part: the new one is
    written durably, and the old one is renamed away before it takes its place. A file, and a directory that holds
    anything else, is refused, not deleted; of a link only the link is replaced. Of two processes the later one wins.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - `resolve` would follow a link that is to be replaced
    if out.is_file() and not out.is_symlink():
        raise UserError(f"{out}: is a file, this command writes a directory; give another place or remove it")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _clear_abandoned(out)
            partial.mkdir()
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise
            raise UserError(f"{out}: cannot be made ({error.strerror}); give another place") from None
        yield partial
        for path in (*partial.rglob("*"), partial):
            _make_durable(path)
        with _alone_in(out.parent):
            _replace_directory(partial, out)
            _make_durable(out.parent)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        why = os.strerror(error.errno)  # pyarrow says it at length
        raise UserError(f"{out}: cannot be written ({why}); make room or change its owner") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process renames outputs in `folder` meanwhile. The lock is on the directory: it leaves no file."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace_directory(partial: Path, out: Path) -> None:
    if out.is_dir() and not out.is_symlink():
        foreign = sorted({p.name for p in out.iterdir()} - {p.name for p in partial.iterdir()})
        if foreign:
            raise UserError(f"{out}: holds {foreign[0]!r}, which is not of this stage; give another place or remove it")
        replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
        try:
            out.rename(replaced)
            partial.rename(out)
        finally:
            if not os.path.lexists(out):  # Ctrl-C between the two
                replaced.rename(out)
            shutil.rmtree(replaced, ignore_errors=True)
        return
    if out.is_symlink():
        out.unlink()
    partial.rename(out)


def _clear_abandoned(out: Path) -> None:
    """Removes what killed runs left behind; one may have had our own process number.

    What one was about to replace when it was killed is put back. Names that end in no process number are not ours.
    """
    name = glob.escape(out.name)
    for path in (*out.parent.glob(f".{name}.replaced-*"), *out.parent.glob(f".{name}.partial-*")):
        pid = path.name.rpartition("-")[2]
        if not pid.isdigit() or (pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()):
            continue
        if ".replaced-" in path.name[len(out.name) :] and not os.path.lexists(out):
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def replace_file(partial: Path, path: Path) -> None:
    """Puts the file `partial` in place of `path` so that a crash leaves the one or the other, whole."""
    _make_durable(partial)
    partial.replace(path)


def _make_durable(path: Path) -> None:
    """What `path` holds survives a power cut; of a directory, the names in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no directories
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with sorted keys and no NaN."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_run_record(path: Path, facts: Mapping[str, Any]) -> None:
    """What happened in a run (time, machine, commit, `facts`), for `data/runs`; no stage depends on it.

    `load`: how many processes wanted a core in the last minute, without which times of a shared machine say little.
    A disk that cannot take it fails no run, and never leaves half of a record.
    """
    partial = path.with_name(f".{path.name}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "zarr", "numcodecs", "numpy", "dvc")},
            "commit": _commit(),
            "code": code.digests(sys.modules),
            **facts,
        }
        try:
            write_json(partial, record)
            replace_file(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _commit() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return found.stdout.strip() or None
    return None

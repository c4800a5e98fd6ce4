"""Writing outputs and files of the user: completely or not at all, and the same bytes for the same content."""

import datetime
import errno
import fcntl
import glob
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from h2t.cache.errors import NO_PLACE
from h2t.cache.machine import LITTER, alive, flush
from h2t.pipeline.base import code
from h2t.pipeline.base.errors import CANNOT_WRITE, UserError


@contextmanager
def creating(out: Path) -> Iterator[None]:
    """Raises UserError where the block finds no place for `out`: below a file, in /proc, by too long a name."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise UserError(f"{out}: cannot be created ({error.strerror}); give another path") from None


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raises UserError that names `out` where the block cannot write: no permission, no space, a read-only disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        why = os.strerror(error.errno)  # shorter than pyarrow's own text
        raise UserError(f"{out}: cannot be written ({why}); {CANNOT_WRITE[error.errno]}, then run again") from None


def check_place(out: Path) -> None:
    """Raises UserError where `fresh_directory(out)` would find no place, which is better known before hours of work.

    Makes a directory in the nearest folder that is there, as in /proc permissions say nothing, and removes it.
    """
    out = _free(out)
    with _writing(out), creating(out):
        folder = next(parent for parent in out.parents if parent.exists())
        trial = folder / _partial(out).name
        with suppress(FileExistsError):  # of a killed run that had this process number
            trial.mkdir()
            trial.rmdir()


def _free(out: Path) -> Path:
    """`out` as an absolute path. Raises UserError if it is a file, or a device."""
    out = Path(os.path.abspath(out))  # noqa: PTH100 - `resolve` would follow the link that will be replaced
    kind = stat.S_IFDIR
    with _writing(out), creating(out), suppress(FileNotFoundError):
        kind = stat.S_IFMT(out.lstat().st_mode)  # asked once, as another process may be replacing it
    if kind not in (stat.S_IFDIR, stat.S_IFLNK):
        raise UserError(f"{out}: must be a directory; got a file; give another path or remove the file")
    return out


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial-{os.getpid()}"


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """Yields an empty directory to fill. It becomes `out` by one rename if the block succeeds, and is removed if not.

    An earlier output at `out` is replaced. `out` is never incomplete, not even after a kill or a power cut: the new
    directory is flushed to disk, then the old one is renamed away, then the new one takes its place. Raises UserError
    if `out` is a file, or a directory that holds other files; neither is deleted. If `out` is a link, the link is
    replaced and its target is not. If two processes write the same `out`, the later one wins.
    """
    out = _free(out)
    partial = _partial(out)
    try:
        with _writing(out):
            with creating(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                _clear_abandoned(out)
                partial.mkdir()
            yield partial
            for path in (*partial.rglob("*"), partial):
                _make_durable(path)
            with _alone_in(out.parent):
                _replace_directory(partial, out)
                _make_durable(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes from renaming outputs in `folder`. Locks the directory itself, so no lock file stays."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace_directory(partial: Path, out: Path) -> None:
    if not os.path.lexists(out):
        partial.rename(out)
        return
    foreign = [] if out.is_symlink() else {p.name for p in out.iterdir()} - {p.name for p in partial.iterdir()} - LITTER
    if foreign:
        raise UserError(
            f"{out}: must hold outputs of this stage only; got {min(foreign)!r}; give another path or remove it"
        )
    replaced = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        out.rename(replaced)
        partial.rename(out)
    finally:
        if not os.path.lexists(out):  # Ctrl-C between the two renames
            replaced.rename(out)
        _remove(replaced)


def _clear_abandoned(out: Path) -> None:
    """Removes the temporary directories of killed runs, and restores an output that was renamed away but not replaced.

    A killed run may have had the process number of this one. Names that do not end in a process number are left alone.
    """
    name = glob.escape(out.name)
    for path in (p for kind in ("replaced", "partial", "trial") for p in out.parent.glob(f".{name}.{kind}-*")):
        pid = path.name.rpartition("-")[2]
        if not pid.isdecimal() or (pid != str(os.getpid()) and alive(int(pid))):
            continue
        if ".replaced-" in path.name[len(out.name) :] and not os.path.lexists(out):
            path.rename(out)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write a file to. It becomes `path` by one rename if the block succeeds, and is
    removed if not; what killed processes left of theirs is removed, too. A link at `path` is replaced.
    """
    partial = _partial(path)
    _clear_abandoned(path)
    try:
        yield partial
        replace_file(partial, path)
        _make_durable(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def rewriting(path: Path) -> Iterator[Path]:
    """As `fresh_file`, for a file of the user: a link stays one, and so do mode and owner.

    What is yielded is a copy of the file, or nothing where there is none yet. Raises UserError where it cannot be
    written.
    """
    path = Path(os.path.realpath(path))  # `resolve` raises for links in a circle
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: must be a file; got something else; move it away")
    with _writing(path), creating(path), fresh_file(path) as partial:
        with suppress(FileNotFoundError), path.open("r+b") as file:  # "+": refused where the file may not be written
            before = os.fstat(file.fileno())
            partial.touch(0o600)  # the text may be a secret
            with suppress(OSError):  # another user's file in a folder of ours; a user without a number here
                os.chown(partial, before.st_uid, before.st_gid)
            with suppress(OSError):  # a disk without modes
                partial.chmod(stat.S_IMODE(before.st_mode))
            partial.write_bytes(file.read())
        yield partial


def rewrite(path: Path, text: str) -> None:
    """Writes `text` to a file of the user, by `rewriting`, unless the file holds it already."""
    data = text.encode(errors="surrogateescape")
    if not path.is_file() or path.read_bytes() != data:
        with rewriting(path) as partial:
            partial.write_bytes(data)


def text_of(path: Path) -> tuple[str, str]:
    """(the text of a file of the user as it is, for `rewrite`; how its lines end). Empty if there is none."""
    text = path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""
    return text, "\r\n" if "\r\n" in text else "\n"


def replace_file(partial: Path, path: Path) -> None:
    """Replaces `path` by the file `partial`. After a crash `path` is either the old or the new file, complete."""
    _make_durable(partial)
    partial.replace(path)


def _make_durable(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk, so that they survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync directories
            raise
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as indented JSON with sorted keys. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_run_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Writes the record of a run (time, machine, commit, `facts`) to `path` in `data/runs`. No stage depends on it.

    `load` is the number of processes that wanted a core in the last minute; it tells how far to trust the times.
    If the record cannot be written, the run still succeeds, and no incomplete record is left. A device such as
    /dev/null stays what it is.
    """
    with suppress(OSError):
        if path.exists() and not path.is_file():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in ("torch", "zarr", "numcodecs", "numpy", "dvc")},
            "commit": _commit(),
            "code": code.digests(sys.modules),
            **facts,
        }
        with fresh_file(path) as partial:
            write_json(partial, record)


def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


def _commit() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        described = subprocess.run(
            ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        return described.stdout.strip() or None
    return None

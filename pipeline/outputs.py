"""Writing a stage's outputs: all of them or none, the same bytes for the same content."""

import datetime
import errno
import glob
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
NO_PLACE = {errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}


@contextmanager
def fresh_directory(out: Path) -> Iterator[Path]:
    """A directory to fill that becomes `out` in one rename when the block ends well, and vanishes when it does not.

    An earlier output at `out` is replaced. A directory that holds anything else is refused, not deleted.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - `resolve` would follow a link that is to be replaced
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
        if out.is_dir() and not out.is_symlink():
            foreign = sorted({p.name for p in out.iterdir()} - {p.name for p in partial.iterdir()})
            if foreign:
                raise UserError(
                    f"{out}: holds {foreign[0]!r}, which is not of this stage; give another place or remove it"
                )
            shutil.rmtree(out)
        elif out.exists() or out.is_symlink():
            out.unlink()
        partial.rename(out)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{out}: cannot be written ({error.strerror}); make room or change its owner") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_abandoned(out: Path) -> None:
    """Removes what killed runs left behind; one may have had our own process number."""
    for path in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid == str(os.getpid()) or not (pid.isdigit() and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(path, ignore_errors=True)


def replace_file(partial: Path, path: Path) -> None:
    """Puts the file `partial` in place of `path` so that a crash leaves the one or the other, whole."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON with sorted keys and no NaN."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def write_run_record(path: Path, facts: Mapping[str, Any]) -> None:
    """What happened in a run (time, machine, commit, `facts`), for `data/runs`; no stage depends on it.

    `load`: how many processes wanted a core in the last minute, without which times of a shared machine say little.
    """
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
            "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "zarr", "numcodecs", "numpy", "dvc")},
            "commit": _commit(),
            **facts,
        }
        write_json(path, record)


def _commit() -> str | None:
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, timeout=10
        )
        return found.stdout.strip() or None
    return None

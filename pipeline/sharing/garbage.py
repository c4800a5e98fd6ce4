"""Clearing away what nobody needs: abandoned staging directories, and DVC objects that nothing uses."""

import fcntl
import shutil
from pathlib import Path

from pipeline.sharing.repository import Say, git, in_one_line, repository


def abandoned(data: Path) -> list[Path]:
    """Staging directories and partial outputs below `data` in which nobody works."""
    found = [
        path
        for pattern in (".*.staging", ".*.staging.done", ".*.partial-*", ".*.pulled-*")
        for path in data.rglob(pattern)
        if path.is_dir() and not held(path) and not _alive(path)
    ]
    return sorted(set(found))


def held(staging: Path) -> bool:
    """Whether a process holds the lock of this staging directory."""
    lock = staging / "lock"
    return lock.is_file() and locked(lock)


def locked(path: Path) -> bool:
    """Whether a process holds an flock on `path`."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _alive(path: Path) -> bool:
    """Whether the process that a directory is named after still runs."""
    number = path.name.rpartition("-")[2]
    return number.isdigit() and Path(f"/proc/{number}").exists()


def collect_garbage(start: Path, say: Say, *, apply: bool) -> int:
    """Removes abandoned staging directories (returns their bytes), and DVC objects that nothing in git or here uses.

    Without `apply` it only says what would go.
    """
    from dvc.repo import Repo

    root = repository(start)
    verb = "removed" if apply else "would remove"
    total = 0
    for path in abandoned(root / "data") if (root / "data").is_dir() else []:
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        total += size
        say(f"{verb} {path.relative_to(root)}: {size / 1e6:.1f} MB of an unfinished run")
        if apply:
            shutil.rmtree(path, ignore_errors=True)
    git("rev-parse", "--verify", "HEAD", where=root)  # without a commit every object would be garbage
    with in_one_line("dvc gc"), Repo(str(root)) as repo:
        repo.gc(workspace=True, all_branches=True, all_tags=True, all_experiments=True, force=True, dry=not apply)
    if not apply:
        say("nothing was removed; pass --apply to remove")
    return total

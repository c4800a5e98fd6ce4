"""`h2t cache gc`: removes directories of unfinished runs, and DVC objects that nothing uses.

It keeps what others may use: objects of a DVC cache that other clones may link to, and directories that a process is
working in.
"""

import fcntl
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from h2t.cache.errors import CacheError
from h2t.cache.machine import alive
from h2t.cache.sizes import sized
from h2t.cache.write.staging import Staging
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.sharing.repository import config_of, dvc_folder, git, in_one_line, repository

STAGING = re.compile(r"\.(?P<target>.+?)\.staging(\.done)?")
LEFT_BY_PROCESS = re.compile(r"\..+\.(partial|pulled)-(?P<process>\d+)")
EVERY_PROJECT = "dvc gc --workspace --all-branches --all-tags --all-experiments --projects OTHER ..."


def collect_garbage(start: Path, say: Say, *, apply: bool, alone: bool = False) -> None:
    """Removes directories of unfinished runs below `data`, and DVC objects used neither in git nor in the workspace.

    Without `apply`, it only says what would be removed. If other projects may use the DVC cache, its objects are kept
    and UserError is raised after the directories are removed; `alone` states that there are no other projects.
    """
    from dvc.repo import Repo

    root = repository(start)
    git("rev-parse", "--git-dir", where=root)
    try:
        git("rev-parse", "--verify", "HEAD", where=root)
    except UserError:
        raise UserError(
            f"{root}: has no commit yet, and what no commit names would count as unused; type: git add . && git commit"
        ) from None
    said = 0

    def tell(text: str) -> None:
        nonlocal said
        said += 1
        say(text)

    removable = _clear_unfinished(root, tell, apply=apply, alone=alone)
    with in_one_line("dvc gc"), Repo(str(root)) as repo:
        objects = _unused(repo)
        size = sum(path.stat().st_size for path in objects)
        what = f"{counted(len(objects), 'object')} of DVC's cache, {sized(size)}"
        reason = _in_use(root, Path(repo.cache.local.path), alone=alone) if objects else None
        if reason and apply:
            raise UserError(f"not removed: {what}: unused here, but {reason}")
        if reason:
            tell(f"would not remove {what}: unused here, but {reason}")
        elif objects:
            if apply:
                with _dvc_silent():
                    _gc(repo, dry=False)
            tell(f"{'removed' if apply else 'would remove'} {what}: no branch, tag, experiment or workspace uses them")
            removable = True
    if not said:
        say("nothing to remove")
    elif removable and not apply:
        say("nothing was removed; pass --apply to remove")


def _in_use(root: Path, objects: Path, *, alone: bool) -> str | None:
    """Why objects that seem unused may be in use, and the way out; None if there is no sign of it."""
    dvc = dvc_folder(root)
    exps = dvc / "tmp/exps"
    running = sorted(path for pattern in ("tmp*", "standalone/tmp*") for path in exps.glob(pattern) if path.is_dir())
    if running:
        place = running[0].relative_to(dvc.parent)
        return f"an experiment is running, or was stopped, in {place}; wait until it ends, or remove that folder"
    if not alone and (others := who_else(dvc.parent, objects)):
        return (
            f"{others}, so another project may use them; name all projects ({EVERY_PROJECT}), or pass --alone if "
            "there is no other project"
        )
    return None


def who_else(root: Path, objects: Path) -> str | None:
    """Why projects other than the one at `root` may use the DVC objects in the folder `objects`; None if none seem to.

    Symbolic links from other projects cannot be counted, so any folder outside the repository counts as shared.
    """
    if config_of(root).get("cache", {}).get("shared"):
        return "cache.shared is set"
    if not objects.resolve().is_relative_to(root.resolve()):
        return f"cache.dir ({objects.parent.parent}) lies outside this repository"
    here: Counter[tuple[int, int]] = Counter()
    linked: dict[tuple[int, int], int] = {}
    for folder, inside, names in os.walk(root):
        if ".dvc" in inside and Path(folder) != root and not Path(folder).is_relative_to(root / ".dvc" / "tmp"):
            return f"{Path(folder).relative_to(root)} is a DVC repository of its own"  # unknown to this one
        for name in names:
            about = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - a Path for each of many files takes long
            if about.st_nlink > 1:
                here[about.st_dev, about.st_ino] += 1
                if Path(folder).is_relative_to(objects):
                    linked[about.st_dev, about.st_ino] = about.st_nlink
    elsewhere = sum(links > here[key] for key, links in linked.items())
    if elsewhere:
        verb = "has" if elsewhere == 1 else "have"
        return f"{counted(elsewhere, 'object')} {verb} hard links outside this repository"
    return None


def _gc(repo: Any, *, dry: bool) -> None:
    """DVC's own garbage collection; with `dry`, it only logs what it would remove."""
    repo.gc(workspace=True, all_branches=True, all_tags=True, all_experiments=True, force=True, dry=dry)


def _unused(repo: Any) -> list[Path]:
    """The objects that DVC's own garbage collection would remove."""
    with _dvc_silent() as records:
        _gc(repo, dry=True)
    paths = (Path(str(record.args[0])) for record in records if isinstance(record.args, tuple) and record.args)
    return sorted({path for path in paths if path.is_file()})


@contextmanager
def _dvc_silent() -> Iterator[list[logging.LogRecord]]:
    """Collects the log of DVC's garbage collection ("Removing ...", in dry runs too) instead of printing it."""
    records: list[logging.LogRecord] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    objects, summary, collect = logging.getLogger("dvc_data.hashfile.gc"), logging.getLogger("dvc.repo.gc"), Collect()
    before = [(log, log.level, log.propagate) for log in (objects, summary)]
    try:
        objects.setLevel(logging.INFO)
        summary.setLevel(logging.WARNING)
        objects.propagate = False
        objects.addHandler(collect)
        yield records
    finally:
        objects.removeHandler(collect)
        for log, level, propagate in before:
            log.setLevel(level)
            log.propagate = propagate


def _clear_unfinished(root: Path, say: Say, *, apply: bool, alone: bool) -> bool:
    """Removes the directories of unfinished runs below `data`. True if any was removed, or would be."""
    data = root / "data"
    unfinished = abandoned(data) if data.is_dir() else []
    if unfinished and not alone and not data.resolve().is_relative_to(root.resolve()):
        say(f"note: {data} leads out of this repository, so others may work there; pass --alone to clear it too")
        return False
    removable = False
    for path in unfinished:
        place, size = path.relative_to(root), _bytes_in(path)
        aside = _set_aside(path)
        if aside is not None:
            size -= _bytes_in(path / "replaced")
            say(f"{'put' if apply else 'would put'} back {aside.relative_to(root)}, which a stopped run had moved away")
        if apply and not _clear(path):
            say(f"kept {place}: it is in use now")
            continue
        say(f"{'removed' if apply else 'would remove'} {place}: {sized(size)} of an unfinished run")
        removable = True
    return removable


def _bytes_in(folder: Path) -> int:
    """The bytes of all files and links below `folder`."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _target(staging: Path) -> Path | None:
    """The cache that a staging directory belongs to; None if `staging` is no staging directory."""
    match = STAGING.fullmatch(staging.name)
    return staging.parent / match["target"] if match else None


def _set_aside(path: Path) -> Path | None:
    """Where the committed cache in this staging directory belongs; None if there is none.

    A writer that replaces a cache moves the old one into its staging directory, then the new one into its place. If the
    writer is stopped between the two, the old cache must be put back.
    """
    target = _target(path)
    return target if target and (path / "replaced").exists() and not target.exists() else None


def _clear(path: Path) -> bool:
    """Removes the directory of an unfinished run, under its lock. True if it is removed, False if it is in use.

    Raises OSError and CacheError for a disk that cannot be written.
    """
    target = _target(path)
    if target is None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
        return True
    try:
        with Staging(target) as staging:  # puts a cache that was moved away back in its place
            staging.discard(strict=True)
    except CacheError as error:
        if error.reason != "busy":
            raise
        return False
    return True


def abandoned(data: Path) -> list[Path]:
    """Directories of unfinished runs below `data` that no process is using, sorted. Links are left out."""
    unused = []
    for path in data.rglob(".*"):
        process = LEFT_BY_PROCESS.fullmatch(path.name)
        if not (process or STAGING.fullmatch(path.name)) or path.is_symlink() or not path.is_dir():
            continue
        if not held(path) and not (process and alive(int(process["process"]))):
            unused.append(path)
    return sorted(unused)


def held(staging: Path) -> bool:
    """True if a process holds the lock of this staging directory."""
    lock = staging / "lock"
    return lock.is_file() and locked(lock)


def locked(path: Path) -> bool:
    """True if a process holds an flock on `path`."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
    return False

"""`h2t cache pull`: downloads a published cache without cloning its repository, and checks every byte."""

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from h2t.cache.format.spec import RECORD, parse_record
from h2t.cache.read.dvc_files import split_revision
from h2t.cache.redaction import redacted
from h2t.cache.write.staging import Staging, sync
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.sharing.repository import Say, in_one_line

THREADS = 8  # files downloaded at a time


@dataclass(frozen=True)
class Pulled:
    """The result of a pull: the folders, the bytes downloaded, and the seconds it took."""

    places: list[Path]
    size: int
    seconds: float


def pull(
    url: str, say: Say, *, rev: str | None = None, name: str | None = None, pooled: bool = False, into: Path
) -> Pulled:
    """Downloads a cache and its backbone from a git repository with DVC, and verifies them.

    They go to `into`/extract/NAME (with `pooled`, the pooled copy, to `into`/pool/NAME) and `into`/train_backbone/NAME.
    `name` may be None if the repository has one cache. If a byte is wrong, nothing appears at those places. Files that
    arrived before a failure are kept beside them, and the same call resumes from there. Raises UserError.
    """
    from dvc.repo import Repo

    url, rev = (url, rev) if rev else split_revision(url)
    kind = "pool" if pooled else "extract"
    started = time.perf_counter()
    where = redacted(url) + (f"@{rev}" if rev else "")
    # With its own index: a shared one can be damaged by other processes.
    with tempfile.TemporaryDirectory(prefix="h2t-pull-") as scratch, in_one_line(where):
        config = {"core": {"site_cache_dir": scratch}}
        with Repo.open(url, rev=rev, subrepos=True, uninitialized=True, config=config) as repo:
            files = repo.dvcfs
            chosen = _one_of(_folders(files, f"data/{kind}"), name, where, kind)
            parts = {part: _listing(files, f"data/{part}") for part in (f"{kind}/{chosen}", f"train_backbone/{chosen}")}
            whole = {part for part, listing in parts.items() if _is_here(into / part, listing)}
            size = 0
            for part, listing in parts.items():
                if part in whole:
                    say(f"{into / part}: already here, every byte checked")
                else:
                    size += _fetch(files, listing, into / part, where, is_cache=part.startswith(kind))
    places = [into / part for part in parts]
    seconds = time.perf_counter() - started
    spec = parse_record((places[0] / RECORD).read_bytes()).spec
    say(f"{places[0]}: {counted(spec.rows, 'row')}, fingerprint {spec.fingerprint[:12]}, every byte checked")
    say(f"pulled {size / 1e6:.1f} MB in {seconds:.1f} s from {where}")
    return Pulled(places, size, seconds)


@dataclass(frozen=True)
class _Remote:
    """A file of the repository: its path there, and its md5 (None for a file that is not an output of a stage)."""

    path: str
    md5: str | None

    def is_at(self, place: Path) -> bool:
        """Whether the file at `place` has the same content."""
        if self.md5 is None or not place.is_file():
            return False
        with place.open("rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest() == self.md5


def _listing(files: Any, folder: str) -> dict[str, _Remote]:
    """The files below a folder of the repository, by path relative to it. Raises UserError for a path outside it."""
    listing = {}
    for root, _, infos in files.walk(folder, detail=True):
        for name, info in infos.items():
            path = f"{root}/{name}"
            inside = PurePosixPath(path.lstrip("/")).relative_to(folder)
            if ".." in inside.parts:
                raise UserError(f"{path}: leads out of {folder}; do not trust this repository")
            listing[str(inside)] = _Remote(path, (info.get("dvc_info") or {}).get("md5"))
    return listing


def _files_in(folder: Path) -> set[str]:
    """Files and links below `folder`, by path relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def _is_here(target: Path, listing: Mapping[str, _Remote]) -> bool:
    """True if `target` holds exactly these files, False if it does not exist. Raises UserError for anything else."""
    if not os.path.lexists(target):
        return False
    if _files_in(target) == set(listing) and all(file.is_at(target / name) for name, file in listing.items()):
        return True
    raise UserError(f"{target}: exists and holds something else; remove it, or give another --into")


def _fetch(files: Any, listing: Mapping[str, _Remote], target: Path, where: str, *, is_cache: bool) -> int:
    """Downloads these files and moves them to `target` once all are complete; returns the bytes downloaded.

    Files that an earlier attempt left beside `target` are kept if their content is right. Raises UserError for damaged
    files, and CacheError if another process writes there.
    """
    with Staging(target) as staging:
        place = staging.cache
        for name in (_files_in(place) if place.is_dir() else set()) - set(listing):
            (place / name).unlink()
        missing = [name for name, file in listing.items() if not file.is_at(place / name)]

        def get(name: str) -> str | None:
            """What is wrong with the file now: None, "missing" or "damaged"."""
            into = place / name
            into.parent.mkdir(parents=True, exist_ok=True)
            into.unlink(missing_ok=True)
            try:
                files.get_file(listing[name].path, str(into.resolve()))
            except FileNotFoundError:
                into.unlink(missing_ok=True)
                return "missing"
            return None if listing[name].md5 is None or listing[name].is_at(into) else "damaged"

        with ThreadPoolExecutor(THREADS) as pool:
            wrong = {name: fault for name, fault in zip(missing, pool.map(get, missing), strict=True) if fault}
        _refuse(wrong, where)
        if is_cache:
            _check_whole(place, where)
        size = sum((place / name).stat().st_size for name in missing)
        for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
            sync(folder)
        staging.publish(replace=False)
    return size


def _refuse(wrong: Mapping[str, str], where: str) -> None:
    """Raises UserError if a file is "missing" or "damaged", naming the first one and how many there are."""
    for fault, way_out in (("damaged", "h2t cache publish --repair"), ("missing", "h2t cache publish")):
        if names := [name for name, found in wrong.items() if found == fault]:
            first = names[0] if len(names) == 1 else f"first: {names[0]}"
            raise UserError(
                f"{where}: {counted(len(names), 'file')} {fault} at the remote ({first}), the others are kept; ask the "
                f"owner to type: {way_out}, then run this command again"
            )


def _folders(files: Any, folder: str) -> list[str]:
    """Names of the directories in `folder`, sorted; none if it does not exist."""
    try:
        return sorted(Path(e["name"]).name for e in files.ls(folder, detail=True) if e["type"] == "directory")
    except FileNotFoundError:
        return []


def _one_of(names: list[str], wanted: str | None, where: str, kind: str) -> str:
    """The name of the cache to pull. Raises UserError if it does not exist, or several could be meant."""
    if wanted in names or (wanted is None and len(names) == 1):
        return wanted or names[0]
    asked = f"no {wanted!r}" if wanted else f"{len(names)} caches" if names else "no cache"
    way = f"choose by --name: {', '.join(names)}" if names else "ask the owner to publish one, or give another --rev"
    raise UserError(f"{where}: {asked} in data/{kind}; {way}")


def _check_whole(cache: Path, where: str) -> None:
    """Verifies a downloaded cache by its own checksums. Raises UserError for the first fault."""
    from h2t.cache.tools.verify import verify

    faults = verify(str(cache))
    if faults:
        raise UserError(
            f"{where}: the downloaded cache is damaged ({faults[0]}); ask the owner to type: h2t cache publish --repair"
        )

"""`h2t cache pull`: downloads a published cache without cloning its repository, and checks every byte.

DVC finds the objects of the files in the remote. They are then downloaded like files behind any URL: unencoded, no
more bytes than recorded, at a minimum rate (h2t.cache.read.transfer).
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import MAX_RECORD_BYTES, RECORD, parse_record
from h2t.cache.machine import flush
from h2t.cache.read.dvc_files import DvcFiles, folders, of_projects_below, split_revision
from h2t.cache.redaction import redacted
from h2t.cache.sizes import sized
from h2t.cache.write.staging import Staging, bad_disk_is_one_line, sync
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.sharing.repository import in_one_line

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
    """Downloads a cache and its backbone from the DVC remote of a git repository, and verifies them.

    They go to `into`/extract/NAME (with `pooled`, the pooled copy, to `into`/pool/NAME) and `into`/train_backbone/NAME.
    `name` may be None if the repository has one cache. If a byte is wrong, nothing appears at those places. Files that
    arrived before a failure are kept beside them, and the same call resumes from there. Raises UserError, and
    CacheError if the remote cannot be reached or is too slow.
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
            if not repo.config.get("core", {}).get("remote") and not any(out.remote for out in repo.index.outs):
                raise UserError(
                    f"{where}: has no default DVC remote to fetch from; there, type: dvc remote default NAME, or dvc "
                    "remote add --default store PATH, then h2t cache publish"
                )
            known = folders(repo, f"data/{kind}")
            if not known and (below := of_projects_below(repo, f"data/{kind}")):
                raise UserError(
                    f"{where}: only the project at its top can be pulled from, and has no cache; read that of a folder "
                    f"as dvc+{where}#{below[0]}, or clone it and type, in that folder: dvc repro --pull"
                )
            chosen = _one_of(known, name, where, kind)
            names = (f"{kind}/{chosen}", f"train_backbone/{chosen}")
            parts = {part: DvcFiles.of(repo, f"{url}@{rev}" if rev else url, f"data/{part}") for part in names}
            for files in parts.values():
                _check_names(files)
            whole = {part for part, files in parts.items() if _is_here(into / part, files.digests)}
            size = 0
            for part, files in parts.items():
                if part in whole:
                    say(f"{into / part}: already here, every byte checked")
                else:
                    size += _fetch(files, into / part, where, is_cache=part.startswith(kind))
    places = [into / part for part in parts]
    seconds = time.perf_counter() - started
    spec = parse_record((places[0] / RECORD).read_bytes()).spec
    say(f"{places[0]}: {counted(spec.rows, 'row')}, fingerprint {spec.fingerprint[:12]}, every byte checked")
    say(f"pulled {sized(size)} in {seconds:.1f} s from {where}")
    return Pulled(places, size, seconds)


def _check_names(files: DvcFiles) -> None:
    """Raises UserError for a file that would lie outside of the folder."""
    for name in files.digests:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{files}/{name}: leads out of the folder; do not trust this repository")


def _is_at(place: Path, md5: str) -> bool:
    """Whether the file at `place` has this content."""
    if not place.is_file():
        return False
    with place.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest() == md5


def _files_in(folder: Path) -> set[str]:
    """Files and links below `folder`, by path relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def _is_here(target: Path, digests: Mapping[str, str]) -> bool:
    """True if `target` holds exactly these files, False if it does not exist. Raises UserError for anything else."""
    if not os.path.lexists(target):
        return False
    if _files_in(target) == set(digests) and all(_is_at(target / name, md5) for name, md5 in digests.items()):
        return True
    raise UserError(f"{target}: exists and holds something else; remove it, or give another --into")


def _fetch(files: DvcFiles, target: Path, where: str, *, is_cache: bool) -> int:
    """Downloads these files and moves them to `target` once all are complete; returns the bytes downloaded.

    Files that an earlier attempt left beside `target` are kept if their content is right. Raises UserError for missing
    and damaged files, and CacheError if another process writes there or the remote does not answer.
    """
    with Staging(target) as staging:
        place = staging.cache
        for name in (_files_in(place) if place.is_dir() else set()) - set(files.digests):
            (place / name).unlink()
        missing = [name for name, md5 in files.digests.items() if not _is_at(place / name, md5)]
        wrong: dict[str, CacheError] = {}
        sizes: dict[str, int] = {}
        if is_cache:  # the record comes first, because it bounds the other files
            wrong |= _download(files, [name for name in missing if name == RECORD], place, {RECORD: MAX_RECORD_BYTES})
            if RECORD in files.digests and not wrong:
                sizes = {name: size for name, (size, _) in parse_record((place / RECORD).read_bytes()).files.items()}
        wrong |= _download(files, [name for name in missing if name not in wrong and name != RECORD], place, sizes)
        _refuse(wrong, files, where)
        if is_cache:
            _check_whole(place, where)
        size = sum((place / name).stat().st_size for name in missing)
        for folder in (place, *(path for path in place.rglob("*") if path.is_dir())):
            sync(folder)
        staging.publish(replace=False)
    return size


def _download(files: DvcFiles, names: Iterable[str], place: Path, sizes: Mapping[str, int]) -> dict[str, CacheError]:
    """Downloads the files, none longer than its size in `sizes` or the whole output; returns what is wrong with which.

    A file that is missing or damaged at the remote does not stop the others, but a remote that does not answer does.
    """

    def get(name: str) -> CacheError | None:
        into = place / name
        try:
            _copy(files, name, into, min(sizes.get(name, files.most_bytes), files.most_bytes))
            if not _is_at(into, files.digests[name]):
                raise CacheError("damaged", f"{files}/{name}: has other content than recorded")
        except CacheError as error:
            if error.reason not in ("missing", "damaged"):
                raise
            into.unlink()
            return error
        return None

    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return {name: error for name, error in zip(names, pool.map(get, names), strict=True) if error}


def _copy(files: DvcFiles, name: str, into: Path, at_most: int) -> None:
    """Downloads one file to `into`, also to the disk. Raises CacheError."""
    with bad_disk_is_one_line(into):
        into.parent.mkdir(parents=True, exist_ok=True)
        into.unlink(missing_ok=True)
        with into.open("xb") as file:

            def take(part: bytes) -> None:
                with bad_disk_is_one_line(into):
                    file.write(part)

            def start() -> Callable[[bytes], None]:
                file.seek(0)
                file.truncate()
                return take

            files.copy(name, start, at_most)
            file.flush()
            flush(file.fileno())


def _refuse(wrong: Mapping[str, CacheError], files: DvcFiles, where: str) -> None:
    """Raises UserError if a file is missing or damaged at the remote; names the first one and how many there are."""
    for reason, way_out in (("damaged", "h2t cache publish --repair"), ("missing", "h2t cache publish")):
        if found := {name: error for name, error in wrong.items() if error.reason == reason}:
            name, error = next(iter(found.items()))
            first = name if reason == "missing" else error.detail.removeprefix(f"{files}/")
            more = "first: " if len(found) > 1 else ""
            raise UserError(
                f"{where}: {counted(len(found), 'file')} {reason} at the remote ({more}{first}); the others are kept; "
                f"ask the owner to type: {way_out}, then run this command again"
            )


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

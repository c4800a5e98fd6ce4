"""`h2t cache pull`: a published cache without the repository it is from, and every byte of it checked."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.dvc_files import split_revision
from cache.redaction import redacted
from cache.spec import RECORD, parse_record
from pipeline.errors import UserError
from pipeline.sharing.repository import Say, in_one_line


@dataclass(frozen=True)
class Pulled:
    """What was pulled: places, bytes, seconds."""

    places: list[Path]
    size: int
    seconds: float


def pull(
    url: str, say: Say, *, rev: str | None = None, name: str | None = None, pooled: bool = False, into: Path
) -> Pulled:
    """A cache of a git repository with DVC, verified, and its backbone, to the same places below `into`.

    `into`/extract/NAME (`pooled`: the pooled copy, `into`/pool/NAME) and `into`/train_backbone/NAME. Nothing is left
    at those places if a byte is wrong. Raises UserError.
    """
    from dvc.fs import download
    from dvc.repo import Repo

    url, rev = (url, rev) if rev else split_revision(url)
    kind = "pool" if pooled else "extract"
    started = time.perf_counter()
    where = redacted(url) + (f"@{rev}" if rev else "")
    places: list[Path] = []
    # An index of our own: a shared one can be damaged by others.
    with tempfile.TemporaryDirectory(prefix="h2t-pull-") as scratch, in_one_line(where):
        config = {"core": {"site_cache_dir": scratch}}
        with Repo.open(url, rev=rev, subrepos=True, uninitialized=True, config=config) as repo:
            files = repo.dvcfs
            chosen = _one_of(_folders(files, f"data/{kind}"), name, where, kind)
            wanted = [f"{kind}/{chosen}", f"train_backbone/{chosen}"]
            for part in wanted:
                if (into / part).exists():
                    raise UserError(f"{into / part}: is there already; remove it, or give another --into")
            for part in wanted:
                target = into / part
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.parent / f".{target.name}.pulled-{os.getpid()}"
                try:
                    download(files, f"data/{part}", str(partial.resolve()))
                    if part == wanted[0]:
                        _check_whole(partial, where)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
                places.append(target)
    size = sum(f.stat().st_size for place in places for f in place.rglob("*") if f.is_file())
    seconds = time.perf_counter() - started
    spec = parse_record((places[0] / RECORD).read_bytes()).spec
    say(f"{places[0]}: {spec.rows} rows, fingerprint {spec.fingerprint[:12]}, every byte checked")
    say(f"pulled {size / 1e6:.1f} MB in {seconds:.1f} s from {where}")
    return Pulled(places, size, seconds)


def _folders(files: Any, folder: str) -> list[str]:
    """Names of the directories in `folder`; none where it does not exist."""
    try:
        return sorted(Path(e["name"]).name for e in files.ls(folder, detail=True) if e["type"] == "directory")
    except FileNotFoundError:
        return []


def _one_of(names: list[str], wanted: str | None, where: str, kind: str) -> str:
    if wanted in names or (wanted is None and len(names) == 1):
        return wanted or names[0]
    asked = f"no {wanted!r}" if wanted else f"{len(names)} caches"
    way = f"choose by --name: {', '.join(names)}" if names else "there is none"
    raise UserError(f"{where}: {asked} in data/{kind}; {way}")


def _check_whole(cache: Path, where: str) -> None:
    from cache.verify import verify

    faults = verify(str(cache))
    if faults:
        raise UserError(f"{where}: what came is damaged ({faults[0]}); ask its owner to publish again")

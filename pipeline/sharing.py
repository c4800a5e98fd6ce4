"""Sharing caches by DVC: publish with proof, pull without the repository.

DVC moves the bytes and holds the credentials. What it does not say is checked here: that what is published is committed
and whole, that the remote holds the content of every object, that what was pulled is what was extracted.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cache.dvc_files import split_revision
from cache.errors import CacheError
from cache.redaction import redacted
from cache.spec import RECORD, parse_record
from pipeline.errors import UserError

Say = Callable[[str], None]

THREADS = 8  # requests to a remote at a time
PART_BYTES = 1024 * 1024  # of an object that is read to be compared
SHOWN = 3
LAYOUT = ("dvc.yaml", "dvc.lock", "params.yaml")


def git(*arguments: str, where: Path) -> str:
    """Output of a git command. Raises UserError with its first line of complaint if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git: is not installed") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise UserError(f"git {arguments[0]}: {redacted(lines[0])}")
    return done.stdout


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turns whatever DVC and the storage behind it raise into UserError, without secrets."""
    try:
        yield
    except (UserError, CacheError):
        raise
    except Exception as error:  # noqa: BLE001 - every protocol raises its own
        raise UserError(f"{what}: {redacted(_short(error))}") from None


def repository(start: Path) -> Path:
    """The root of the DVC repository around `start`. Raises UserError."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder
    raise UserError(f"{start}: not inside a DVC repository; type: dvc init")


def config_of(root: Path) -> Mapping[str, Any]:
    """DVC's configuration, all levels merged; never printed, it may hold secrets."""
    from dvc.config import Config, ConfigError

    try:
        return dict(Config(dvc_dir=str(root / ".dvc")))
    except ConfigError as error:
        raise UserError(f".dvc/config: {' '.join(str(error).split())}") from None


def remote_name(config: Mapping[str, Any], wanted: str | None) -> str:
    """The remote `wanted`, or the default one. Raises UserError."""
    name = wanted or config.get("core", {}).get("remote")
    known = sorted(config.get("remote", {}))
    if not name:
        raise UserError("remote: none is set; type: dvc remote add --default store PATH (or s3://..., ssh://...)")
    if name not in known:
        raise UserError(f"remote {name!r}: not configured (there are: {', '.join(known) or 'none'}); dvc remote add")
    return str(name)


@dataclass(frozen=True)
class Out:
    """An output that dvc.lock records: of which stage, where, its digest and its bytes."""

    stage: str
    path: str
    digest: str
    size: int


def outs(root: Path) -> list[Out]:
    """Every output in dvc.lock. Raises UserError."""
    path = root / "dvc.lock"
    try:
        stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {})["stages"]
        return [
            Out(name, o["path"], o["md5"], int(o.get("size", 0)))
            for name, stage in stages.items()
            for o in stage.get("outs", [])
        ]
    except FileNotFoundError:
        raise UserError(f"{path}: missing, nothing was run yet; type: dvc repro") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a lock file of DVC ({_short(error)}); restore it from git") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def caches(root: Path) -> list[Path]:
    """Directories of caches among the outputs in dvc.lock, relative to `root`."""
    return [Path(o.path) for o in outs(root) if (root / o.path / RECORD).is_file()]


# publish


@dataclass(frozen=True)
class Proof:
    """Objects that the remote must hold, and those it does not hold whole (in words)."""

    objects: int
    size: int
    faults: list[str]


def publish(
    start: Path, say: Say, *, remote: str | None = None, uncommitted: bool = False, quick: bool = False
) -> Proof:
    """Pushes the configuration that is checked out, and shows that the remote holds all of it. Raises UserError.

    `quick` compares the lengths of the objects only, not their content.
    """
    from dvc.repo import Repo

    root = repository(start)
    name = remote_name(config_of(root), remote)
    found = outs(root)
    for cache in caches(root):
        _check_cache(root / cache)
    _check_commit(root, uncommitted, say)
    with in_one_line("dvc"), Repo(str(root)) as repo:
        _check_workspace(repo)
        if set_verify(root, name):
            say(f"remote {name}: set verify = true, so that a damaged object is refused when it is pulled")
        say(f"{len(found)} outputs, {len(caches(root))} of them caches: pushing to {name}")
        with in_one_line(f"remote {name}"):
            repo.push(run_cache=True, remote=name)
            proof = prove(repo, name, found, quick=quick)
    if proof.faults:
        more = f" and {len(proof.faults) - SHOWN} more" if len(proof.faults) > SHOWN else ""
        raise UserError(
            f"remote {name}: {len(proof.faults)} of {proof.objects} objects are not whole there "
            f"({'; '.join(proof.faults[:SHOWN])}{more}); remove these from the remote and publish again"
        )
    how = "each of full length" if quick else "the content of each compared"
    say(f"published: remote {name} holds all {proof.objects} objects, {proof.size / 1e6:.1f} MB, {how}")
    for line in _next_steps(root):
        say(line)
    return proof


def _check_workspace(repo: Any) -> None:
    """Raises UserError unless every stage is as dvc.lock says."""
    with in_one_line("dvc status"):
        changed = repo.status()
    if changed:
        names = ", ".join(list(changed)[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise UserError(f"dvc status: {len(changed)} stages are not up to date ({names}); type: dvc repro")


def _check_cache(cache: Path) -> None:
    from cache.verify import verify

    faults = verify(str(cache), quick=True)
    if faults:
        raise UserError(f"{cache}: is damaged ({faults[0]}); type: h2t cache verify {cache}")


def set_verify(root: Path, name: str) -> bool:
    """Sets `verify = true` on the remote, in the file that configures it; True if it was not set."""
    from dvc.config import Config

    config = Config(dvc_dir=str(root / ".dvc"))
    if config["remote"][name].get("verify"):
        return False
    inside = [level for level in ("local", "repo") if name in config.load_one(level).get("remote", {})]
    level = inside[0] if inside else "local"  # else it is configured for the user or machine
    path = Path(config.files[level])
    header = f"['remote \"{name}\"']\n"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if header in text and "verify" not in config.load_one(level)["remote"][name]:
        # As text: DVC writes the file anew, without its comments.
        path.write_text(text.replace(header, f"{header}    verify = true\n"), encoding="utf-8")
        return True
    with config.edit(level) as section:
        section["remote"].setdefault(name, {})["verify"] = "true"
    return True


def _check_commit(root: Path, uncommitted: bool, say: Say) -> None:
    """Raises UserError for files of the configuration that git does not hold, unless they may be."""
    changed = [line[3:] for line in git("status", "--porcelain", "--", *LAYOUT, where=root).splitlines()]
    if changed and not uncommitted:
        raise UserError(
            f"{', '.join(changed)}: not committed, so nobody else can ask for this configuration; type: git add "
            f"{' '.join(changed)} && git commit, or pass --uncommitted"
        )
    if changed:
        say(f"note: {', '.join(changed)} not committed; others need the same parameters and dvc repro --pull")


def prove(repo: Any, remote: str, found: list[Out], *, quick: bool = False) -> Proof:
    """Asks the remote for every object behind `found`: its length and, unless `quick`, its content, by DVC's digest."""
    local, far = repo.cache.local, repo.cloud.get_remote_odb(remote)
    sizes: dict[str, int] = {}
    for out in found:
        for digest in [out.digest, *_members(local, out.digest)]:
            sizes[digest] = int(local.fs.size(local.oid_to_path(digest)))

    def ask(digest: str) -> str | None:
        place = far.oid_to_path(digest)
        try:
            about = far.fs.info(place)
            if int(about["size"]) != sizes[digest]:
                return f"{redacted(place)} has {about['size']} of {sizes[digest]} bytes"
            if quick or _content(far.fs, place, about, digest.partition(".")[0]):
                return None
        except FileNotFoundError:
            return f"{redacted(place)} missing"
        return f"{redacted(place)} holds something else"

    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(ask, sizes) if fault]
    return Proof(len(sizes), sum(sizes.values()), faults)


def _content(fs: Any, place: str, about: Mapping[str, Any], md5: str) -> bool:
    """Whether the object at `place` has this md5: by S3's ETag where that is one, else by reading the object."""
    if str(about.get("ETag", "")).strip('"') == md5:
        return True
    found = hashlib.md5(usedforsecurity=False)
    with fs.open(place, "rb") as file:
        while part := file.read(PART_BYTES):
            found.update(part)
    return found.hexdigest() == md5


def _members(odb: Any, digest: str) -> list[str]:
    """The objects of a directory."""
    if not digest.endswith(".dir"):
        return []
    return sorted({entry["md5"] for entry in json.loads(odb.fs.cat_file(odb.oid_to_path(digest)))})


def _next_steps(root: Path) -> list[str]:
    lines = []
    if git("status", "--porcelain", "--", ".dvc/config", where=root):
        lines.append("to do: git add .dvc/config && git commit")
    try:
        ahead = int(git("rev-list", "--count", "@{upstream}..HEAD", where=root))
    except UserError:
        ahead = 1
    if ahead:
        lines.append("to do: git push")
    try:
        origin = redacted(git("remote", "get-url", "origin", where=root).strip())
    except UserError:
        origin = "URL"
    lines.append(f"others type: git clone {origin} && dvc repro --pull, or: h2t cache pull {origin}")
    return lines


# pull


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

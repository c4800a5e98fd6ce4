"""`h2t cache publish`: push by DVC, with proof.

DVC moves the bytes and holds the credentials. What it does not say is checked here: that what is published is committed
and whole, and that the remote holds the content of every object.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.sharing.repository import (
    Out,
    Say,
    caches,
    config_of,
    counted,
    git,
    in_one_line,
    outs,
    remote_name,
    repository,
)

THREADS = 8  # requests to a remote at a time
PART_BYTES = 1024 * 1024  # of an object that is read to be compared
SHOWN = 3
LAYOUT = ("dvc.yaml", "dvc.lock", "params.yaml")


@dataclass(frozen=True)
class Proof:
    """Objects that the remote must hold, their bytes, and what is wrong with those that it does not hold whole."""

    objects: int
    size: int
    faults: dict[str, str]  # by digest, in words


def publish(
    start: Path,
    say: Say,
    *,
    remote: str | None = None,
    uncommitted: bool = False,
    quick: bool = False,
    repair: bool = False,
) -> Proof:
    """Pushes the configuration that is checked out, and shows that the remote holds all of it. Raises UserError.

    `quick` compares the lengths of the objects only, not their content. `repair` sends again, once, what the remote
    does not hold whole: DVC itself sends only what is missing.
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
        say(f"{counted(len(found), 'output')}, {len(caches(root))} of them caches: pushing to {name}")
        with in_one_line(f"remote {name}"):
            repo.push(run_cache=True, remote=name)
            proof = prove(repo, name, found, quick=quick)
            if proof.faults and repair:
                broken = counted(len(proof.faults), "object")
                say(f"remote {name}: {broken} not whole there ({_some(proof)}): sending again")
                _send(repo, name, proof.faults)
                proof = prove(repo, name, found, quick=quick)
    if proof.faults:
        way_out = (
            "mend the remote itself, it does not keep what is sent" if repair else "type: h2t cache publish --repair"
        )
        raise UserError(
            f"remote {name}: {len(proof.faults)} of {counted(proof.objects, 'object')} not whole there "
            f"({_some(proof)}); {way_out}"
        )
    how = "each of full length" if quick else "the content of each compared"
    say(f"published: remote {name} holds all of {counted(proof.objects, 'object')}, {proof.size / 1e6:.1f} MB, {how}")
    for line in _next_steps(root):
        say(line)
    return proof


def _check_workspace(repo: Any) -> None:
    """Raises UserError unless every stage is as dvc.lock says."""
    with in_one_line("dvc status"):
        changed = {name: why for name, why in repo.status().items() if not _absent_input(name, why)}
    if changed:
        names = ", ".join(list(changed)[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise UserError(f"dvc status: {counted(len(changed), 'stage')} not up to date ({names}); type: dvc repro")


def _absent_input(stage: str, changes: Any) -> bool:
    """Whether all that differs is that the files of an input are not here; their digest is."""
    deps = [set(change.get("changed deps", {"": ""}).values()) for change in changes if isinstance(change, dict)]
    return (
        stage.rpartition(":")[2].startswith("watch@")
        and len(deps) == len(changes)
        and all(kinds == {"deleted"} for kinds in deps)
    )


def _check_cache(cache: Path) -> None:
    from h2t.cache.tools.verify import verify

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
        try:
            for digest in [out.digest, *_members(local, out.digest)]:
                sizes[digest] = int(local.fs.size(local.oid_to_path(digest)))
        except FileNotFoundError:
            raise UserError(f"{out.path}: objects of it are missing in DVC's cache here; type: h2t doctor") from None

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
        faults = {digest: fault for digest, fault in zip(sizes, pool.map(ask, sizes), strict=True) if fault}
    return Proof(len(sizes), sum(sizes.values()), faults)


def _some(proof: Proof) -> str:
    more = f" and {len(proof.faults) - SHOWN} more" if len(proof.faults) > SHOWN else ""
    return "; ".join(list(proof.faults.values())[:SHOWN]) + more


def _send(repo: Any, remote: str, digests: Iterable[str]) -> None:
    """Writes these objects to the remote, whatever it holds in their places. Raises UserError for one damaged here."""
    local, far = repo.cache.local, repo.cloud.get_remote_odb(remote)
    for digest in digests:
        place = local.oid_to_path(digest)
        if not _content(local.fs, place, {}, digest.partition(".")[0]):
            raise UserError(f"{place}: is damaged here, too; type: h2t doctor --full")
        far.fs.put_file(place, far.oid_to_path(digest))


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

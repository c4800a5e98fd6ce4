"""`h2t cache publish`: pushes with DVC and verifies the result.

DVC transfers the bytes and manages the credentials. This module checks what DVC does not: that everything published is
committed and undamaged, and that the remote holds the content of every object.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2t.cache.redaction import redacted
from h2t.cache.sizes import sized
from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import rewrite, rewriting, text_of
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted
from h2t.pipeline.sharing.repository import (
    Out,
    caches,
    config_of,
    dvc_folder,
    git,
    in_one_line,
    outs,
    remote_name,
    repository,
)

THREADS = 8  # requests to a remote at a time
PART_BYTES = 1024 * 1024  # bytes read at a time when an object is compared
SHOWN = 3  # names listed in a message
LAYOUT = ("dvc.yaml", "dvc.lock", "params.yaml", "stages.yaml", "plugins")  # what a clone needs to get the outputs
#: Keys of params.yaml that name a plug-in -> its kind; the name of an entry of `backbones` or `hosts` may do so, too.
NAMING = {
    "dataset": "datasets", "arch": "backbones", "objective": "objectives", "host": "hosts", "pool": "pools",
    "receiver": "samplers", "donor": "samplers", "backbones": "backbones", "hosts": "hosts",
}  # fmt: skip
COMPILED = ":(exclude,glob)plugins/**/__pycache__/**"


@dataclass(frozen=True)
class Proof:
    """What the remote must hold: number of objects, their bytes, and a fault for each missing or damaged object."""

    objects: int
    size: int
    faults: dict[str, str]  # digest -> the fault in words


def publish(
    start: Path,
    say: Say,
    *,
    remote: str | None = None,
    uncommitted: bool = False,
    quick: bool = False,
    repair: bool = False,
) -> Proof:
    """Pushes the outputs of the checked-out configuration, and verifies that the remote holds all of them.

    `quick` compares only the lengths of the objects, not their content. `repair` sends damaged objects again, once,
    because DVC sends only missing ones. `uncommitted` allows changes that git does not hold. Raises UserError.
    """
    from dvc.repo import Repo

    root = repository(start)
    name = remote_name(config_of(root), remote)
    outputs = outs(root)
    for cache in caches(root):
        _check_cache(root / cache)
    _check_commit(root, uncommitted, say)
    _check_plugins(root)
    with in_one_line("dvc"), Repo(str(root)) as repo:
        _check_workspace(repo, root)
        if set_verify(root, name):
            say(f"remote {name}: set verify = true, so that a damaged object is refused when it is pulled")
        say(f"pushing {counted(len(outputs), 'output')}, of which {counted(len(caches(root)), 'cache')}, to {name}")
        if any(Path(stage.path).parent != root for stage in repo.index.stages if stage.path.endswith("dvc.yaml")):
            say("note: dvc push takes what other projects of this repository have here, too")
        with in_one_line(f"remote {name}"):
            repo.push(run_cache=True, remote=name)
            proof = prove(repo, name, outputs, quick=quick)
            if proof.faults and repair:
                broken = counted(len(proof.faults), "object")
                say(f"remote {name}: {broken} missing or damaged there ({_some(proof)}); sending again")
                _send(repo, name, proof.faults)
                proof = prove(repo, name, outputs, quick=quick)
    if proof.faults:
        way_out = (
            "repair the remote itself: it does not keep what is sent" if repair else "type: h2t cache publish --repair"
        )
        raise UserError(
            f"remote {name}: {len(proof.faults):,} of {counted(proof.objects, 'object')} missing or damaged there "
            f"({_some(proof)}); {way_out}"
        )
    how = "lengths compared" if quick else "contents compared"
    size = sized(proof.size)
    say(f"published: remote {name} holds all outputs, {counted(proof.objects, 'object')}, {size}; {how}")
    for line in _next_steps(root):
        say(line)
    return proof


def _check_workspace(repo: Any, root: Path) -> None:
    """Raises UserError unless every stage of the project at `root` is up to date with dvc.lock."""
    with in_one_line("dvc status"), contextlib.chdir(root):  # DVC names stages by their path from here
        changed = {
            name: why
            for name, why in repo.status().items()
            if name.rpartition(":")[0] in ("", "dvc.yaml") and not _absent_input(name, why)
        }
    if changed:
        names = ", ".join(list(changed)[:SHOWN]) + (", ..." if len(changed) > SHOWN else "")
        raise UserError(f"dvc status: {counted(len(changed), 'stage')} not up to date ({names}); type: dvc repro")


def _absent_input(stage: str, changes: Any) -> bool:
    """Whether the only difference is that the files of an input are missing here; their digest is recorded."""
    deps = [change.get("changed deps", {}) for change in changes if isinstance(change, dict)]
    return (
        stage.rpartition(":")[2].startswith("watch@")
        and len(deps) == len(changes)
        and all(kinds and all(kind == "deleted" for kind in kinds.values()) for kinds in deps)
    )


def _check_cache(cache: Path) -> None:
    """Raises UserError if a quick check finds the cache damaged."""
    from h2t.cache.tools.verify import verify

    faults = verify(str(cache), quick=True)
    if faults:
        raise UserError(f"{cache}: damaged ({faults[0]}); for all its faults, type: h2t cache verify {cache}")


def set_verify(root: Path, name: str) -> bool:
    """Sets `verify = true` for the remote, in the file that configures it. True if it was not set before."""
    from dvc.config import Config

    config = Config(dvc_dir=str(dvc_folder(root)))
    if config["remote"][name].get("verify"):
        return False
    inside = [level for level in ("local", "repo") if name in config.load_one(level).get("remote", {})]
    level = inside[0] if inside else "local"  # for a remote configured for the user or the machine
    path = Path(config.files[level])
    text, end = text_of(path)
    header = f"['remote \"{name}\"']{end}"
    if header in text and "verify" not in config.load_one(level)["remote"][name]:
        # Edited as text, because DVC would drop the comments.
        rewrite(path, text.replace(header, f"{header}    verify = true{end}"))
        return True
    with rewriting(path) as partial:
        config.files[level] = str(partial)  # DVC empties a file before it writes it
        with config.edit(level) as section:
            section["remote"].setdefault(name, {})["verify"] = "true"
    return True


def _check_commit(root: Path, uncommitted: bool, say: Say) -> None:
    """Raises UserError for uncommitted files of the configuration; with `uncommitted`, it only says so."""
    changed = [line[3:] for line in git("status", "--porcelain", "--", *LAYOUT, COMPILED, where=root).splitlines()]
    if changed and not uncommitted:
        raise UserError(
            f"{', '.join(changed)}: not committed, so nobody else can get this configuration; type: git add "
            f"{' '.join(changed)} && git commit, or pass --uncommitted"
        )
    if changed:
        say(f"note: {', '.join(changed)} not committed; others need the same parameters, and dvc repro --pull")


def _check_plugins(root: Path) -> None:
    """Raises UserError for a plug-in in the parameters that only a folder outside the repository has."""
    if not (outside := os.environ.get("H2T_PLUGINS")) or Path(outside).resolve() == (root / "plugins").resolve():
        return
    values = params.load(root / "params.yaml")
    built_in = Path(plugins.__file__).parents[1]
    for kind, name in _named(values):
        file = Path(kind, f"{name}.py")
        inside = any((folder / file).is_file() for folder in (built_in, root / "plugins"))
        if (Path(outside) / file).is_file() and not inside:
            raise UserError(
                f"{Path(outside) / file}: lies outside this repository, so nobody else can get it; copy it into "
                f"plugins/{kind}, type: h2t upgrade --apply && dvc repro, and commit it"
            )


def _named(values: Any) -> Iterator[tuple[str, str]]:
    """(kind, name) of what may be a plug-in in the parameters."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if kind := NAMING.get(str(key)):
                names = [value] if isinstance(value, str) else value if isinstance(value, Iterable) else []
                yield from ((kind, str(name)) for name in names)
            yield from _named(value)


def prove(repo: Any, remote: str, outputs: list[Out], *, quick: bool = False) -> Proof:
    """Checks every object of `outputs` at the remote: its length and, unless `quick`, its content by DVC's digest.

    Raises UserError if an object is missing in DVC's cache here.
    """
    local, far = repo.cache.local, repo.cloud.get_remote_odb(remote)
    sizes: dict[str, int] = {}
    for out in outputs:
        try:
            for digest in [out.digest, *_members(local, out.digest)]:
                sizes[digest] = int(local.fs.size(local.oid_to_path(digest)))
        except FileNotFoundError:
            raise UserError(f"{out.path}: objects are missing in DVC's cache here; type: h2t doctor") from None

    def fault_of(digest: str) -> str | None:
        place = far.oid_to_path(digest)
        try:
            about = far.fs.info(place)
            if int(about["size"]) != sizes[digest]:
                return f"{redacted(place)} has {about['size']} of {sizes[digest]} bytes"
            if quick or _content(far.fs, place, about, digest.partition(".")[0]):
                return None
        except FileNotFoundError:
            return f"{redacted(place)} is missing"
        return f"{redacted(place)} has other content"

    with ThreadPoolExecutor(THREADS) as pool:
        faults = {digest: fault for digest, fault in zip(sizes, pool.map(fault_of, sizes), strict=True) if fault}
    return Proof(len(sizes), sum(sizes.values()), faults)


def _some(proof: Proof) -> str:
    """The first faults, and how many more there are."""
    more = f" and {len(proof.faults) - SHOWN} more" if len(proof.faults) > SHOWN else ""
    return "; ".join(list(proof.faults.values())[:SHOWN]) + more


def _send(repo: Any, remote: str, digests: Iterable[str]) -> None:
    """Overwrites these objects at the remote. Raises UserError for an object that is damaged here too."""
    local, far = repo.cache.local, repo.cloud.get_remote_odb(remote)
    for digest in digests:
        place = local.oid_to_path(digest)
        if not _content(local.fs, place, {}, digest.partition(".")[0]):
            raise UserError(f"{place}: damaged here too; type: h2t doctor --full")
        far.fs.put_file(place, far.oid_to_path(digest))


def _content(fs: Any, place: str, about: Mapping[str, Any], md5: str) -> bool:
    """Whether the object at `place` has this md5: by S3's ETag if that is an md5, otherwise by reading the object."""
    if str(about.get("ETag", "")).strip('"') == md5:
        return True
    read = hashlib.md5(usedforsecurity=False)
    with fs.open(place, "rb") as file:
        while part := file.read(PART_BYTES):
            read.update(part)
    return read.hexdigest() == md5


def _members(odb: Any, digest: str) -> list[str]:
    """Digests of the files in an output that is a directory; none for a file."""
    if not digest.endswith(".dir"):
        return []
    return sorted({entry["md5"] for entry in json.loads(odb.fs.cat_file(odb.oid_to_path(digest)))})


def _next_steps(root: Path) -> list[str]:
    """What to commit and push, and what others type to get the outputs."""
    lines = []
    if git("status", "--porcelain", "--", ".dvc/config", where=dvc_folder(root).parent):
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
    lines.append(f"for others: git clone {origin} && dvc repro --pull, or: h2t cache pull {origin}")
    return lines

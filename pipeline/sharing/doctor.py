"""What is wrong with this place, and what to type: one check after the other, none of which stops the next."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from cache.errors import CacheError
from cache.redaction import redacted
from cache.spec import RECORD
from pipeline.errors import UserError
from pipeline.sharing import garbage, repository

State = Literal["ok", "note", "fault"]

LOW_DISK = 2 * 10**9
NAMED_BY_DVC = {"backbones": ("arch", "objective"), "hosts": ("host", "backbone", "pool")}
PATIENCE = 30  # seconds that a remote may take to answer
FICLONE = 0x40049409


@dataclass(frozen=True)
class Finding:
    """What one check found, in one line, and what to type."""

    check: str
    state: State
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:5} {self.check:12} {self.detail}"
        return f"{line}; type: {self.remedy}" if self.remedy else line


def examine(start: Path, params_file: Path, *, full: bool = False) -> list[Finding]:
    """Every finding about the repository around `start`; `full` reads every byte of every cache."""
    found = [*_versions(), *_params(params_file), *_inputs(params_file), *_device(params_file), *_disk(start)]
    try:
        root = repository.repository(start)
    except UserError as error:
        return [*found, Finding("repository", "fault", str(error))]
    for check in (_locks, _links, _remote, _data):
        try:
            found += check(root)
        except (UserError, CacheError) as error:
            found.append(Finding(check.__name__.strip("_"), "fault", str(error)))
    return [*found, *_caches(root, full)]


def _versions() -> list[Finding]:
    """The installed packages against what this one asks for."""
    from packaging.requirements import Requirement

    faults = []
    try:
        needed = requires("h2t") or []
    except PackageNotFoundError:
        return [Finding("versions", "fault", "h2t is not installed", "pip install --editable .")]
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            faults.append(f"{requirement.name} {have}, needed {requirement.specifier}")
    if faults:
        return [Finding("versions", "fault", "; ".join(faults), "pip install --upgrade --editable .")]
    return [Finding("versions", "ok", ", ".join(f"{n} {version(n)}" for n in ("torch", "zarr", "dvc")))]


def _params(path: Path) -> list[Finding]:
    """Every section of the parameters, and the keys that dvc.yaml names, which DVC fills with no default."""
    from pipeline import params, settings

    try:
        values = params.load(path)
        settings.check(values)
    except UserError as error:
        return [Finding("params", "fault", str(error))]
    for section, keys in NAMED_BY_DVC.items():
        for name, entry in values[section].items():
            if lacking := [key for key in keys if key not in entry]:
                detail = f"{section}.{name}: dvc.yaml needs {', '.join(lacking)} in every entry; write it out"
                return [Finding("params", "fault", detail)]
    return [Finding("params", "ok", f"{path} is complete and right")]


def _inputs(path: Path) -> list[Finding]:
    """Files and folders from outside: watched by DVC, there, and such that DVC can watch them."""
    from pipeline import params, settings
    from pipeline.stages import inputs, watch

    try:
        values = params.load(path)
        settings.check(values)
    except UserError:  # told by the check of the parameters
        return []
    given = values["inputs"] or {}
    found = []
    try:
        inputs.check(values, path.parent)
    except UserError as error:
        found.append(Finding("inputs", "fault", str(error)))
    for name, place in given.items():
        if not Path(place).exists():
            remedy = "dvc repro --pull, which needs it only where images are read anew"
            found.append(Finding("inputs", "note", f"inputs.{name}: {place} is not here", remedy))
            continue
        try:
            watch.check(name, given)
        except UserError as error:
            found.append(Finding("inputs", "fault", str(error)))
        if not Path(place).is_absolute():
            detail = (
                f"inputs.{name}: {place} is a relative path, which experiment queues (dvc exp run --queue) do not find"
            )
            found.append(Finding("inputs", "note", f"{detail}; write {Path(place).absolute()} for them"))
    return found or [Finding("inputs", "ok", f"{len(given)} watched by DVC")]


def _device(path: Path) -> list[Finding]:
    """The device that the parameters ask for."""
    import torch

    from pipeline import device, params

    try:
        wanted = params.load(path).get("device", "auto")
    except UserError:  # told by the check of the parameters
        wanted = "auto"
    try:
        chosen = device.choose(str(wanted))
    except UserError as error:
        return [Finding("device", "fault", str(error))]
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return [Finding("device", "ok", name)]


def _disk(start: Path) -> list[Finding]:
    free = shutil.disk_usage(start).free
    detail = f"{free / 1e9:.1f} GB free"
    if free < LOW_DISK:
        return [Finding("disk", "fault", f"{detail}, less than {LOW_DISK / 1e9:.0f} GB", "h2t cache gc")]
    return [Finding("disk", "ok", detail)]


def _locks(root: Path) -> list[Finding]:
    """Who works here: DVC's own locks and writers of caches."""
    found = []
    lock = root / ".dvc/tmp/lock"
    if lock.is_file() and garbage.locked(lock):
        found.append(Finding("lock", "fault", "another dvc command holds .dvc/tmp/lock; wait for it or stop it"))
    for path, number in sorted(_rwlock(root)):
        if Path(f"/proc/{number}").exists():
            found.append(Finding("lock", "fault", f"{path} is in use by dvc, process {number}; wait for it or stop it"))
    for staging in sorted((root / "data").rglob(".*.staging")) if (root / "data").is_dir() else []:
        place = staging.relative_to(root)
        if garbage.held(staging):
            found.append(Finding("lock", "fault", f"{place}: a cache is being written; wait for it or stop it"))
        else:
            found.append(
                Finding(
                    "lock", "note", f"{place}: unfinished; run the same command to go on", "h2t cache gc, to forget"
                )
            )
    return found or [Finding("lock", "ok", "nobody works here")]


def _rwlock(root: Path) -> Iterator[tuple[str, int]]:
    """(output, process) of what running stages write; what they only read is long, and says no more."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        locks = json.loads((root / ".dvc/tmp/rwlock").read_text(encoding="utf-8") or "{}")
        for path, holder in locks.get("write", {}).items():
            name = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path(path).name
            yield str(name), int(holder["pid"])


def _links(root: Path) -> list[Finding]:
    """How files get from DVC's cache into the workspace: without a copy, if the file system can."""
    config = repository.config_of(root)
    kinds = config.get("cache", {}).get("type") or ["reflink", "copy"]
    kinds = [k.strip() for k in kinds.split(",")] if isinstance(kinds, str) else list(kinds)
    place = Path(config.get("cache", {}).get("dir") or root / ".dvc/cache")
    try:
        place.mkdir(parents=True, exist_ok=True)
        works = next((kind for kind in kinds if _link_works(kind, place, root)), None)
    except OSError as error:
        return [Finding("links", "fault", f"DVC's cache cannot be written ({error.strerror})", "dvc cache dir PATH")]
    wanted = "dvc config cache.type reflink,hardlink,symlink,copy"
    if works is None:
        return [Finding("links", "fault", f"none of {', '.join(kinds)} works between cache and workspace", wanted)]
    if works == "copy" and "hardlink" not in kinds:
        return [Finding("links", "fault", "every cache takes its space twice: files are copied", wanted)]
    return [Finding("links", "ok" if works != "copy" else "note", f"{works} from DVC's cache")]


def _link_works(kind: str, cache: Path, workspace: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=cache) as a, tempfile.TemporaryDirectory(dir=workspace, prefix=".h2t-") as b:
        source, target = Path(a) / "x", Path(b) / "x"
        source.write_bytes(b"x")
        with suppress(OSError):
            if kind == "hardlink":
                target.hardlink_to(source)
            elif kind == "symlink":
                target.symlink_to(source)
            elif kind == "reflink":
                with source.open("rb") as origin, target.open("wb") as clone:
                    fcntl.ioctl(clone, FICLONE, origin.fileno())
            return kind in ("hardlink", "symlink", "reflink", "copy")
    return False


def _remote(root: Path) -> list[Finding]:
    """The default remote: configured, checked on arrival, reachable, allowed."""
    config = repository.config_of(root)
    if not config.get("remote"):
        return [Finding("remote", "note", "none: nobody else gets these caches", "dvc remote add --default store PATH")]
    try:
        name = repository.remote_name(config, None)
    except UserError as error:
        return [Finding("remote", "fault", str(error))]
    found = []
    if not config["remote"][name].get("verify"):
        remedy = f"dvc remote modify {name} verify true"
        found.append(Finding("verify", "fault", f"remote {name}: damaged objects would be pulled in silence", remedy))
    pool = ThreadPoolExecutor(1)
    try:
        problem = pool.submit(_reach, root, name).result(PATIENCE)
    except Late:
        problem = ("remote", f"no answer within {PATIENCE} s")
    finally:
        pool.shutdown(wait=False)
    url = redacted(str(config["remote"][name]["url"]))
    if problem:
        remedy = {"credentials": "the login of that service (aws configure, ssh-add, ...)"}.get(problem[0], "")
        return [*found, Finding(problem[0], "fault", f"remote {name} ({url}): {problem[1]}", remedy)]
    return [*found, Finding("remote", "ok", f"{name} ({url}) answers")]


def _reach(root: Path, name: str) -> tuple[str, str] | None:
    """(check, reason) if the remote cannot be read; its message is cut to what holds no secret."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            odb = repo.cloud.get_remote_odb(name)
            if odb.fs.protocol in ("local", "file"):
                return _reach_folder(Path(odb.path))
            odb.fs.exists(odb.oid_to_path("00" * 16))
    except DvcException as error:
        return "remote", redacted(_line(error))
    except PermissionError:
        return "credentials", "access is denied"
    except Exception as error:  # noqa: BLE001 - every protocol raises its own
        kind, text = type(error).__name__, _line(error)
        told = f"{kind} {text}".lower()
        signs = ("credential", "auth", "denied", "forbidden", "token", "permission", "login", "signature", "accesskey")
        return ("credentials" if any(s in told for s in signs) else "remote"), redacted(f"{kind}: {text}")
    return None


def _reach_folder(path: Path) -> tuple[str, str] | None:
    store = path
    while not store.exists() and store != store.parent:
        store = store.parent
    # DVC makes files/md5 below the remote; the remote itself must be there, or a mount is missing.
    if not any(p.exists() for p in (path, path.parent, path.parent.parent)):
        return "remote", "the directory is not there; is it mounted?"
    if not os.access(store, os.R_OK | os.X_OK):
        return "credentials", "the directory cannot be read; ask its owner for the group"
    if not os.access(store, os.W_OK):
        return "credentials", "the directory cannot be written; pulling works, publishing does not"
    return None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _data(root: Path) -> list[Finding]:
    """Outputs of dvc.lock that are not in the workspace."""
    found = repository.outs(root)
    gone = [o.path for o in found if not (root / o.path).exists()]
    if gone:
        names = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
        return [Finding("data", "fault", f"{names} not here", "dvc repro --pull")]
    return [Finding("data", "ok", f"{len(found)} outputs are here")]


def _caches(root: Path, full: bool) -> list[Finding]:
    """Every cache below `data`, by its own checksums."""
    from cache.verify import verify

    found = []
    for record in sorted((root / "data").glob(f"*/*/{RECORD}")) if (root / "data").is_dir() else []:
        place = record.parent.relative_to(root)
        try:
            faults: list[Any] = verify(str(record.parent), quick=not full)
        except (CacheError, OSError) as error:
            faults = [error]
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            remedy = f"rm -r {place} && dvc checkout {place}, or dvc repro --pull"
            found.append(Finding("cache", "fault", f"{place}: {faults[0]}{more}", remedy))
        else:
            found.append(Finding("cache", "ok", f"{place} is sound ({'every byte' if full else 'quick'})"))
    return found

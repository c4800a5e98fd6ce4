"""`h2t doctor`: checks the project and says what to type. A check that fails does not stop the others."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.redaction import redacted
from h2t.pipeline.base import numbers
from h2t.pipeline.base.code import made_by_other_code
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.sharing import garbage, repository

State = Literal["ok", "note", "fault"]

LOW_DISK = 2 * 10**9  # bytes
NAMED_BY_DVC = {"backbones": ("arch", "objective"), "hosts": ("host", "backbone")}  # keys read by dvc.yaml
PATIENCE = 30  # seconds to wait for the remote
FICLONE = 0x40049409  # the ioctl that makes a reflink


@dataclass(frozen=True)
class Finding:
    """The result of one check, in one line; what to type; and the path of the output it concerns, if any."""

    check: str
    state: State
    detail: str
    remedy: str = ""
    place: str = ""

    def __str__(self) -> str:
        line = f"{self.state:5} {self.check:12} {self.detail}"
        return f"{line}; type: {self.remedy}" if self.remedy else line


def examine(start: Path, params_file: Path, *, full: bool = False) -> list[Finding]:
    """All findings about the repository around `start`; `full` reads every byte of every output.

    Errors become findings; none is raised for a fault of the project.
    """
    versions = _versions()
    if find_spec("torch") is None:  # the base install, which the other checks cannot run in
        return versions
    findings = [*versions, *_params(params_file), *_inputs(params_file), *_device(params_file), *_disk(start)]
    try:
        root = repository.repository(start)
    except UserError as error:
        return [*findings, Finding("repository", "fault", str(error))]
    caches = _caches(root, full)
    known = {f.place for f in caches if f.state == "fault"}
    checks: dict[str, Callable[[], list[Finding]]] = {
        "numbers": lambda: _numbers(root),
        "locks": lambda: _locks(root),
        "links": lambda: _links(root),
        "queue": lambda: _queue(root, params_file),
        "remote": lambda: _remote(root),
        "data": lambda: _data(root, known, full=full),
        "code": lambda: _code(root),
    }
    for name, check in checks.items():
        try:
            findings += check()
        except (UserError, CacheError, OSError) as error:
            findings.append(Finding(name, "fault", redacted(str(error))))
    return [*findings, *caches]


def _versions() -> list[Finding]:
    """Compares the installed packages with the requirements of h2t and its extra `pipeline`."""
    from packaging.requirements import Requirement

    faults = []
    try:
        needed = requires("h2t") or []
    except PackageNotFoundError:
        return [Finding("versions", "fault", "h2t is not installed", "pip install --editable '.[pipeline]'")]
    for text in needed:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": "pipeline"}):
            continue
        try:
            have = version(requirement.name)
        except PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            faults.append(f"{requirement.name} {have}, needed {requirement.specifier}")
    if faults:
        return [Finding("versions", "fault", "; ".join(faults), "pip install 'h2t[pipeline]'")]
    return [Finding("versions", "ok", ", ".join(f"{n} {version(n)}" for n in ("torch", "zarr", "dvc")))]


def _params(path: Path) -> list[Finding]:
    """Checks every section of the parameters, and the keys that dvc.yaml reads, for which DVC knows no defaults."""
    from h2t.pipeline.base import params
    from h2t.pipeline.inspection import settings

    try:
        values = params.load(path)
        settings.check(values)
    except UserError as error:
        return [Finding("params", "fault", str(error))]
    for section, keys in NAMED_BY_DVC.items():
        for name, entry in values[section].items():
            if lacking := [key for key in keys if key not in entry]:
                detail = f"{section}.{name}: dvc.yaml needs {', '.join(lacking)} in every entry; add it, defaults too"
                return [Finding("params", "fault", detail)]
    return [Finding("params", "ok", f"{path} is complete and valid")]


def _inputs(path: Path) -> list[Finding]:
    """Checks the files and folders of the section `inputs`: watched by DVC, present, and possible to watch."""
    from h2t.pipeline.base import params
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.stages import inputs, watch

    try:
        values = params.load(path)
        settings.check(values)
    except UserError:  # reported by `_params`
        return []
    given = values["inputs"] or {}
    findings = []
    try:
        inputs.check(values, path.parent)
    except UserError as error:
        findings.append(Finding("inputs", "fault", str(error)))
    for name, place in given.items():
        if not Path(place).exists():
            remedy = "dvc repro --pull, which needs it only if images must be read again"
            findings.append(Finding("inputs", "note", f"inputs.{name}: {place} is missing here", remedy))
            continue
        try:
            watch.check(name, given)
        except UserError as error:
            findings.append(Finding("inputs", "fault", str(error)))
        if not Path(place).is_absolute():
            detail = f"inputs.{name}: {place} is a relative path, and dvc exp run --queue needs an absolute one"
            findings.append(Finding("inputs", "note", f"{detail}; write {Path(place).absolute()}"))
    return findings or [Finding("inputs", "ok", f"{counted(len(given), 'input')} watched by DVC")]


def _device(path: Path) -> list[Finding]:
    """Checks that the device of the parameters exists."""
    import torch

    from h2t.pipeline.base import device, params

    try:
        wanted = params.load(path).get("device", "auto")
    except UserError:  # reported by `_params`
        wanted = "auto"
    try:
        chosen = device.choose(str(wanted))
    except UserError as error:
        return [Finding("device", "fault", str(error))]
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"cpu, {threads}"
    return [Finding("device", "ok", name)]


def _disk(start: Path) -> list[Finding]:
    """Checks that the disk has room."""
    free = shutil.disk_usage(start).free
    detail = f"{free / 1e9:.1f} GB free"
    if free < LOW_DISK:
        return [Finding("disk", "fault", f"{detail}; at least {LOW_DISK / 1e9:.0f} GB are needed", "h2t cache gc")]
    return [Finding("disk", "ok", detail)]


def _numbers(root: Path) -> list[Finding]:
    """Compares stages.yaml with the numbers in the code and in this project's plug-ins."""
    path = root / numbers.FILE
    if not path.is_file():
        return []
    numbers.check(path)
    missing = sorted(numbers.in_code().keys() - numbers.read(path).keys())
    if missing:
        detail = f"{numbers.FILE} has no line for {', '.join(missing)}, which DVC needs"
        return [Finding("numbers", "fault", detail, "h2t upgrade --apply")]
    return [Finding("numbers", "ok", f"{numbers.FILE} has the numbers of this version")]


def _code(root: Path) -> list[Finding]:
    """Finds outputs made by different code with the same stage number, as far as run records show it."""
    try:
        lock = dict(yaml.safe_load((root / "dvc.lock").read_text(encoding="utf-8"))["stages"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):  # reported by `_data`
        return []
    return [
        Finding(
            "code",
            "note",
            f"{stage} was run by other code of the same number ({', '.join(files[:3])}"
            + (f" and {len(files) - 3} more)" if len(files) > 3 else ")"),
            f"dvc repro --force --single-item {stage}, to see if its results change",
        )
        for stage, files in made_by_other_code(root, lock)
    ]


def _locks(root: Path) -> list[Finding]:
    """Finds processes at work here, by DVC's locks and those of cache writers, and unfinished caches."""
    findings = []
    lock = root / ".dvc/tmp/lock"
    if lock.is_file() and garbage.locked(lock):
        findings.append(Finding("lock", "fault", "another dvc command holds .dvc/tmp/lock; wait for it or stop it"))
    for path, process in sorted(_rwlock(root)):
        if Path(f"/proc/{process}").exists():
            detail = f"{path} is in use by dvc, process {process}; wait for it or stop it"
            findings.append(Finding("lock", "fault", detail))
    for staging in sorted((root / "data").rglob(".*.staging")) if (root / "data").is_dir() else []:
        place = staging.relative_to(root)
        if garbage.held(staging):
            findings.append(Finding("lock", "fault", f"{place}: a cache is being written; wait for it or stop it"))
        else:
            detail = f"{place}: unfinished; run the same command again to resume"
            findings.append(Finding("lock", "note", detail, "h2t cache gc --apply, to remove it"))
    return findings or [Finding("lock", "ok", "no process is at work here")]


def _rwlock(root: Path) -> Iterator[tuple[str, int]]:
    """Yields (output, process id) of what running stages write. Their long lists of inputs are left out."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        locks = json.loads((root / ".dvc/tmp/rwlock").read_text(encoding="utf-8") or "{}")
        for path, holder in locks.get("write", {}).items():
            name = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path(path).name
            yield str(name), int(holder["pid"])


def _links(root: Path) -> list[Finding]:
    """Checks how DVC places files of its cache into the workspace: linked, if the file system can, not copied."""
    config = repository.config_of(root)
    kinds = config.get("cache", {}).get("type") or ["reflink", "copy"]
    kinds = [k.strip() for k in kinds.split(",")] if isinstance(kinds, str) else list(kinds)
    place = repository.dvc_cache(root)
    try:
        place.mkdir(parents=True, exist_ok=True)
        works = next((kind for kind in kinds if _link_works(kind, place, root)), None)
    except OSError as error:
        return [Finding("links", "fault", f"DVC's cache cannot be written ({error.strerror})", "dvc cache dir PATH")]
    wanted = "dvc config cache.type reflink,hardlink,symlink,copy"
    if works is None:
        detail = f"none of {', '.join(kinds)} works between DVC's cache and the workspace"
        return [Finding("links", "fault", detail, wanted)]
    if works == "copy" and "hardlink" not in kinds:
        detail = "files are copied from DVC's cache, so every output takes its space twice"
        return [Finding("links", "fault", detail, wanted)]
    return [Finding("links", "ok" if works != "copy" else "note", f"{works} from DVC's cache")]


def _link_works(kind: str, cache: Path, workspace: Path) -> bool:
    """Whether a file of `cache` can be placed into `workspace` by this kind of link."""
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
    """Checks that the default remote is configured with `verify`, can be reached, and allows access."""
    config = repository.config_of(root)
    if not config.get("remote"):
        detail = "none configured, so these caches cannot be shared"
        return [Finding("remote", "note", detail, "dvc remote add --default store PATH")]
    try:
        name = repository.remote_name(config, None)
    except UserError as error:
        return [Finding("remote", "fault", str(error))]
    findings = []
    if not config["remote"][name].get("verify"):
        remedy = f"dvc remote modify {name} verify true"
        detail = f"remote {name}: verify is not set, so damaged objects would be pulled without a warning"
        findings.append(Finding("verify", "fault", detail, remedy))
    pool = ThreadPoolExecutor(1)
    try:
        problem = pool.submit(_reach, root, name).result(PATIENCE)
    except Late:
        problem = ("remote", f"no answer within {PATIENCE} s")
    finally:
        pool.shutdown(wait=False)
    url = redacted(str(config["remote"][name]["url"]))
    if problem:
        remedy = {"credentials": "the login command of that service (aws configure, ssh-add, ...)"}.get(problem[0], "")
        return [*findings, Finding(problem[0], "fault", f"remote {name} ({url}): {problem[1]}", remedy)]
    return [*findings, Finding("remote", "ok", f"{name} ({url}) answers")]


def _reach(root: Path, name: str) -> tuple[str, str] | None:
    """(check, reason) if the remote cannot be read, without secrets; None if it can."""
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
        message = f"{kind} {text}".lower()
        signs = ("credential", "auth", "denied", "forbidden", "token", "permission", "login", "signature", "accesskey")
        return ("credentials" if any(s in message for s in signs) else "remote"), redacted(f"{kind}: {text}")
    return None


def _reach_folder(path: Path) -> tuple[str, str] | None:
    """(check, reason) if a remote that is a folder cannot be read and written; None if it can."""
    store = path
    while not store.exists() and store != store.parent:
        store = store.parent
    # DVC creates files/md5 below the remote. The remote itself must exist; otherwise a mount is missing.
    if not any(p.exists() for p in (path, path.parent, path.parent.parent)):
        return "remote", "the directory does not exist; is it mounted?"
    if not os.access(store, os.R_OK | os.X_OK):
        return "credentials", "the directory cannot be read; ask its owner for access"
    if not os.access(store, os.W_OK):
        return "credentials", "the directory cannot be written; pulling works, but publishing needs write access"
    return None


def _line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _queue(root: Path, params_file: Path) -> list[Finding]:
    """Finds what `dvc exp run --queue` and `--temp` would miss: they run in a copy of what git holds, elsewhere."""
    from h2t.pipeline.base import params

    findings = []
    if not str(root).isascii():
        detail = f"dvc exp run --queue and --temp fail in {root}: DVC needs an ASCII path; move the project to one"
        findings.append(Finding("queue", "note", detail))
    try:
        named = list(_paths(params.load(params_file)))
    except UserError:  # reported by `_params`
        return findings
    for key, path in named:
        if os.path.isabs(path) or not os.path.exists(root / path) or _in_the_copy(root, path):  # noqa: PTH110, PTH117
            continue
        detail = f"{key}: {path} is relative and not in git, so dvc exp run --queue and --temp will not find it"
        findings.append(Finding("queue", "note", f"{detail}; write {root / path}"))
    return findings


def _paths(values: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of every parameter that may name a file or folder of data."""
    sections = {
        "prepare.options": _mapping(_mapping(values, "prepare"), "options"),
        "extract": {"statistics_from": _mapping(values, "extract").get("statistics_from")},
    }
    for name in _mapping(values, "backbones"):
        entry = _mapping(_mapping(values, "backbones"), name)
        sections[f"backbones.{name}"] = {key: entry.get(key) for key in ("weights", "start")}
    for section, entries in sections.items():
        for key, value in entries.items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and text:
                    yield f"{section}.{key}", text


def _mapping(values: Any, key: str) -> dict[str, Any]:
    """The mapping `values[key]`; empty if it is anything else, which `_params` reports."""
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, dict) else {}


def _in_the_copy(root: Path, path: str) -> bool:
    """Whether git or DVC would place all of `path` in a copy of the repository."""
    if any((root / f"{part}.dvc").is_file() for part in (path.rstrip("/"), *map(str, Path(path).parents))):
        return True
    try:
        return not repository.git("ls-files", "--others", "--directory", "--", path, where=root)
    except UserError:  # no git, or the path leads out of the repository
        return False


def _data(root: Path, known: Collection[str], *, full: bool) -> list[Finding]:
    """Checks each file of each output in dvc.lock, and its DVC object. Skips `known`, the caches already reported."""
    outs = repository.outs(root)
    gone = [out.path for out in outs if not os.path.lexists(root / out.path)]
    findings = []
    if gone:
        names = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
        findings.append(Finding("data", "fault", f"missing here: {names}", "dvc repro --pull"))
    store = repository.dvc_cache(root)
    files = 0
    for out in outs:
        if out.path in gone or out.path in known:
            continue
        about = _Output(out, root / out.path, store)
        files += about.examine(full=full)
        if about.faults:
            more = f" and {len(about.faults) - 1} more" if len(about.faults) > 1 else ""
            findings.append(Finding("data", "fault", f"{out.path}: {about.faults[0]}{more}", about.remedy, out.path))
    if findings:
        return findings
    how = "every byte compared" if full else "sizes compared"
    detail = f"{counted(len(outs), 'output')} with {counted(files, 'file')}, complete here and in DVC's cache; {how}"
    return [Finding("data", "ok", detail)]


class _Output:
    """One output of dvc.lock: compares its files at `place` with the objects in DVC's cache `store`."""

    def __init__(self, out: repository.Out, place: Path, store: Path) -> None:
        self.out, self.place, self.store = out, place, store
        self.here: list[str] = []  # faults in the workspace
        self.objects: list[str] = []  # faults in DVC's cache

    @property
    def faults(self) -> list[str]:
        """All faults, those in the workspace first."""
        return self.here + self.objects

    @property
    def remedy(self) -> str:
        """The command that repairs the output."""
        if not self.objects:
            return f"dvc checkout {self.out.path}"
        if self.here:
            return f"dvc fetch {self.out.path} && dvc checkout {self.out.path}, or dvc repro"
        return "dvc commit, which stores the files here in DVC's cache again"

    def examine(self, *, full: bool) -> int:
        """Fills the lists of faults and returns the number of files compared."""
        self._dangling()
        members = self._members()
        total = 0
        for name, digest in sorted(members.items()):
            path, stored = self.place / name, self._object(digest)
            size = stored.stat().st_size if stored.is_file() else None
            total += size or 0
            if size is None:
                self.objects.append(f"the DVC object of {name or self.out.path} is missing")
            elif full and _md5(stored) != digest:
                self.objects.append(f"the DVC object of {name or self.out.path} is damaged")
            if not path.is_file():
                if not path.is_symlink():  # `_dangling` reports the link
                    self.here.append(f"{name or 'the file'} is missing")
            elif size is not None and path.stat().st_size != size:
                self.here.append(f"{name or 'the file'} has {path.stat().st_size} bytes, but {size} in DVC's cache")
            elif full and not (size is not None and path.samefile(stored)) and _md5(path) != digest:
                self.here.append(f"{name or 'the file'} has other content than dvc.lock records")
        if not self.objects and members and self.out.size not in (0, total):
            self.objects.append(f"its DVC objects have {total} bytes, but {self.out.size} in dvc.lock")
        return len(members)

    def _dangling(self) -> None:
        """Adds a fault for each link whose target is missing, also for links that dvc.lock does not list."""
        paths = [self.place, *(self.place.rglob("*") if self.place.is_dir() else ())]
        for path in sorted(path for path in paths if path.is_symlink() and not path.exists()):
            name = path.relative_to(self.place).as_posix()
            self.here.append(f"{name} is a link to {path.readlink()}, which does not exist")

    def _members(self) -> dict[str, str]:
        """The md5 of each file, by its path within the output; an output that is one file has the empty path."""
        if not self.out.digest.endswith(".dir"):
            return {"": self.out.digest}
        try:
            listing = json.loads(self._object(self.out.digest).read_bytes())
            return {str(entry["relpath"]): str(entry["md5"]) for entry in listing}
        except FileNotFoundError:
            self.objects.append("its list of files is missing in DVC's cache")
        except (OSError, ValueError, TypeError, KeyError):
            self.objects.append("its list of files in DVC's cache is damaged")
        return {}

    def _object(self, digest: str) -> Path:
        """Where DVC's cache stores the object with this md5."""
        return self.store / "files/md5" / digest[:2] / digest[2:]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _caches(root: Path, full: bool) -> list[Finding]:
    """Verifies every cache below `data` by its own checksums."""
    from h2t.cache.tools.verify import verify

    findings = []
    for record in sorted((root / "data").glob(f"*/*/{RECORD}")) if (root / "data").is_dir() else []:
        place = record.parent.relative_to(root)
        try:
            faults: list[Any] = verify(str(record.parent), quick=not full)
        except (CacheError, OSError) as error:
            faults = [error]
        if faults:
            more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
            remedy = f"rm -r {place} && dvc checkout {place}, or dvc repro --pull"
            findings.append(Finding("cache", "fault", f"{place}: {faults[0]}{more}", remedy, str(place)))
        else:
            how = "every byte checked" if full else "quick check; --full reads every byte"
            findings.append(Finding("cache", "ok", f"{place} is sound ({how})"))
    return findings

"""Checks of `h2t doctor` on DVC's stores: links from its cache into the workspace, and the remote."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from contextlib import suppress
from pathlib import Path

from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import LONGEST_MESSAGE, UserError, first_line
from h2t.pipeline.inspection.findings import Finding
from h2t.pipeline.sharing import repository

PATIENCE = 30  # seconds to wait for the remote


def links(root: Path) -> list[Finding]:
    """Checks how DVC places files of its cache into the workspace: linked, if the file system can, not copied."""
    config = repository.config_of(root)
    kinds = config.get("cache", {}).get("type") or ["reflink", "copy"]
    kinds = [k.strip() for k in kinds.split(",")] if isinstance(kinds, str) else list(kinds)
    place = repository.dvc_cache(root)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [Finding("links", "fault", f"DVC's cache cannot be written ({error.strerror})", "dvc cache dir PATH")]
    try:
        works = next((kind for kind in kinds if _link_works(kind, place, root)), None)
    except OSError as error:
        if not Path(error.filename or place).is_relative_to(place):
            detail = f"{root} cannot be written ({error.strerror}), so nothing can run here; work in a clone"
            return [Finding("links", "fault", detail)]
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
    from dvc.fs import localfs

    with tempfile.TemporaryDirectory(dir=cache) as a, tempfile.TemporaryDirectory(dir=workspace, prefix=".h2t-") as b:
        source, target = Path(a) / "x", Path(b) / "x"
        source.write_bytes(b"x")
        with suppress(OSError):
            if kind == "hardlink":
                target.hardlink_to(source)
            elif kind == "symlink":
                target.symlink_to(source)
            elif kind == "reflink":
                localfs.reflink(str(source), str(target))  # Linux and macOS have calls of their own
            return kind in ("hardlink", "symlink", "reflink", "copy")
    return False


def remote(root: Path) -> list[Finding]:
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
        return "remote", redacted(first_line(error)[:LONGEST_MESSAGE])
    except PermissionError:
        return "credentials", "access is denied"
    except Exception as error:  # noqa: BLE001 - every protocol raises its own
        kind, text = type(error).__name__, first_line(error)[:LONGEST_MESSAGE]
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
        return "remote", "the directory does not exist; is it mounted? If it is new, create it"
    if not os.access(store, os.R_OK | os.X_OK):
        return "credentials", "the directory cannot be read; ask its owner for access"
    if not os.access(store, os.W_OK):
        return "credentials", "the directory cannot be written; pulling works, but publishing needs write access"
    return None

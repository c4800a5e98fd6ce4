"""The DVC repository around a folder: git, DVC's configuration and remotes, and the outputs in `dvc.lock`."""

import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError, in_brief, of_the_machine
from h2t.pipeline.base.text import counted


def git(*arguments: str, where: Path) -> str:
    """The output of a git command, run in `where`. Raises UserError with git's first line of error if it fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("git: not installed; install git and run again") from None
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise _not_trusted(lines[0], where) or UserError(f"git {arguments[0]}: {redacted(lines[0])}")
    return done.stdout


def _not_trusted(message: str, where: object) -> UserError | None:
    """The error for a repository of another user, which git and dulwich refuse with these words; otherwise None."""
    if not any(words in message for words in ("dubious ownership", "not owned by current user")):
        return None
    place = re.findall(r"'([^']+)'", message)[-1:] or [where]
    return UserError(
        f"git: {place[0]} belongs to another user; if you trust what is there, type: "
        f"git config --global --add safe.directory {shlex.quote(str(place[0]))}"
    )


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turns any error of DVC or a storage service into a one-line UserError without secrets.

    `what` begins the message. UserError and CacheError pass as they are.
    """
    from dvc.scm import CloneError

    try:
        yield
    except (UserError, CacheError):
        raise
    except CloneError:
        raise UserError(
            f"{what}: no git repository can be read there; check the address and your access to it"
        ) from None
    except Exception as error:  # noqa: BLE001 - every protocol raises its own
        # S3 gives numbers of disk errors to errors of its own, with other words.
        theirs = isinstance(error, OSError) and error.errno is not None and error.strerror != os.strerror(error.errno)
        known = None if theirs else of_the_machine(error)
        said = known or redacted(_of_yaml(error) or in_brief(error))
        raise _not_trusted(str(error), what) or UserError(f"{what}: {said}") from None


def _of_yaml(error: Exception) -> str:
    """What is wrong where in a YAML file of DVC, which says it on its screen only; empty for any other error."""
    from dvc.utils.serialize import parse_yaml_for_update
    from dvc.utils.strictyaml import YAMLSyntaxError, YAMLValidationError

    if isinstance(error, YAMLSyntaxError):
        if error.hint:
            return f"{error.relpath}: holds marks of a merge (<<<<<<<); settle it"
        at, why = getattr(error.__cause__, "problem_mark", None), getattr(error.__cause__, "problem", None)
        return f"{error.relpath}: {f'line {at.line + 1}: ' if at else ''}not YAML ({why}); correct it" if why else ""
    if not isinstance(error, YAMLValidationError):
        return ""
    first, *others = error.exc.errors
    here: Any = parse_yaml_for_update(error.text, error.path)
    line = 0
    with suppress(KeyError, IndexError, TypeError, AttributeError):  # what is missing has no line, its parent has
        for key in first.path:
            place = here.lc
            line = (place.key(key) if isinstance(here, dict) else place.item(key))[0] + 1
            here = here[key]
    more = f", and {counted(len(others), 'other fault')}" if others else ""
    where = f" in {'.'.join(map(str, first.path))}" if first.path else ""
    return f"{error.path}: {f'line {line}: ' if line else ''}{first.error_message}{where}{more}; correct it"


def repository(start: Path) -> Path:
    """The project that contains `start`: the nearest folder with a dvc.yaml, or else the root of the DVC repository.

    One DVC repository can hold several projects. Raises UserError if there is none.
    """
    top = dvc_folder(start).parent
    within = [folder for folder in (start.resolve(), *start.resolve().parents) if folder.is_relative_to(top)]
    return next((folder for folder in within if (folder / "dvc.yaml").is_file()), top)


def dvc_folder(start: Path) -> Path:
    """The folder `.dvc` of the repository that contains `start`. Raises UserError if there is none."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / ".dvc").is_dir():
            return folder / ".dvc"
    raise UserError(f"{start}: not inside a DVC repository; change to one, or type: dvc init")


def config_of(root: Path) -> Mapping[str, Any]:
    """DVC's configuration, all levels merged. It may hold secrets: never print it. Raises UserError."""
    from dvc.config import Config, ConfigError

    try:
        return dict(Config(dvc_dir=str(dvc_folder(root))))
    except ConfigError as error:
        raise UserError(f".dvc/config: not readable ({' '.join(str(error).split())}); correct it") from None


def remote_name(config: Mapping[str, Any], wanted: str | None) -> str:
    """The name of the remote `wanted`, or of the default remote. Raises UserError if it is not configured."""
    name = wanted or config.get("core", {}).get("remote")
    known = sorted(config.get("remote", {}))
    if not name:
        raise UserError("remote: none is set; type: dvc remote add --default store PATH (or s3://..., ssh://...)")
    if name not in known:
        raise UserError(
            f"remote {name!r}: not configured (there are: {', '.join(known) or 'none'}); type: dvc remote add"
        )
    return str(name)


@dataclass(frozen=True)
class Out:
    """An output in dvc.lock: its stage, its path, its md5 (of a directory, with the suffix .dir) and its bytes."""

    stage: str
    path: str
    digest: str
    size: int


@contextmanager
def _lock_file(root: Path) -> Iterator[Path]:
    """The path of dvc.lock. Raises UserError in place of what reading a damaged one raises."""
    path = root / "dvc.lock"
    try:
        yield path
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a lock file of DVC ({in_brief(error)}); restore it from git") from None


def locked_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The stages in dvc.lock by name; empty if nothing was run yet. Raises UserError if the file is damaged."""
    with _lock_file(root) as path, suppress(FileNotFoundError):
        stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {})["stages"]
        return {name: dict(stage) for name, stage in stages.items()}
    return {}


def outs(root: Path) -> list[Out]:
    """Every output in dvc.lock of a stage that is still there. Raises UserError if the file is missing or damaged.

    DVC keeps the lines of a host that params.yaml no longer names, and neither pushes nor pulls its outputs.
    """
    stages = locked_stages(root)
    if not stages:
        raise UserError(f"{root / 'dvc.lock'}: missing, because nothing was run yet; type: dvc repro")
    present = _present_stages(root)
    if present is not None:
        stages = {name: stage for name, stage in stages.items() if name in present}
    with _lock_file(root):
        return [
            Out(name, o["path"], o["md5"], int(o.get("size", 0)))
            for name, stage in stages.items()
            for o in stage.get("outs", [])
        ]


def _present_stages(root: Path) -> set[str] | None:
    """The stages that dvc.yaml and params.yaml make; None if DVC cannot read them, which its own commands explain."""
    from dvc.repo import Repo

    with suppress(UserError), in_one_line("dvc.yaml"), Repo(str(root)) as repo:
        return {str(stage.name) for stage in repo.index.stages if Path(stage.path) == root / "dvc.yaml"}
    return None


def dvc_cache(root: Path) -> Path:
    """The folder of DVC's cache, by the configuration of all levels."""
    return Path(config_of(root).get("cache", {}).get("dir") or dvc_folder(root) / "cache")


def caches(root: Path) -> list[Path]:
    """The outputs in dvc.lock that are caches, as paths relative to `root`."""
    return [Path(o.path) for o in outs(root) if (root / o.path / RECORD).is_file()]

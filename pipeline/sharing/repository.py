"""The DVC repository around a place: git, DVC's configuration and remotes, the outputs that `dvc.lock` records."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError

Say = Callable[[str], None]


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


def dvc_cache(root: Path) -> Path:
    """The folder of DVC's cache, as its configuration of every level says."""
    return Path(config_of(root).get("cache", {}).get("dir") or root / ".dvc/cache")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def counted(number: int, what: str) -> str:
    """`number` of `what`, in the singular or the plural: 1 object, 2 objects."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def caches(root: Path) -> list[Path]:
    """Directories of caches among the outputs in dvc.lock, relative to `root`."""
    return [Path(o.path) for o in outs(root) if (root / o.path / RECORD).is_file()]

"""Checks of `h2t doctor` on the state of the project: numbers, code, running processes, paths for the queue."""

import getpass
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from h2t.cache.machine import alive
from h2t.pipeline.base import numbers
from h2t.pipeline.base.code import made_by_other_code
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import some
from h2t.pipeline.inspection.findings import Finding
from h2t.pipeline.sharing import garbage, repository

#: Stages that later ones need and the first version did not have.
NEEDED = ("inputs", "replicates")
START = {"root", "table", "lists"}  # options of datasets that other options start from


def stages_of(root: Path) -> set[str]:
    """The stages in dvc.yaml. Raises UserError if it is that of an older version: with `prepare`, but not all NEEDED.

    A project of stage II alone, on a cache, has no stage prepare. What is no dvc.yaml at all is left to DVC.
    """
    try:
        names = set(yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return set()
    lacking = [name for name in NEEDED if name not in names]
    if {"prepare", "train_classifier"} <= names and lacking:  # DVC's own tutorial has a stage prepare too
        raise UserError(
            f"dvc.yaml: is that of an older version, without {' and '.join(lacking)}; "
            "replace it by the dvc.yaml of this version first"
        )
    return names


def stage_numbers(root: Path) -> list[Finding]:
    """Compares stages.yaml with the numbers in the code and in this project's plug-ins, and looks at dvc.yaml."""
    stages_of(root)
    path = root / numbers.FILE
    if not path.is_file():
        return []
    numbers.check(path)
    missing = sorted(numbers.in_code().keys() - numbers.read(path).keys())
    if missing:
        detail = f"{numbers.FILE} has no line for {', '.join(missing)}, which DVC needs"
        return [Finding("numbers", "fault", detail, "h2t upgrade --apply")]
    return [Finding("numbers", "ok", f"{numbers.FILE} has the numbers of this version")]


def other_code(root: Path) -> list[Finding]:
    """Finds outputs made by different code with the same stage number, as far as run records show it."""
    try:
        lock = repository.locked_stages(root)
    except UserError:  # reported by `outputs.data`
        return []
    return [
        Finding(
            "code",
            "note",
            f"{stage} was run by other code of the same number ({some(files, 3)})",
            f"dvc repro --force --single-item {stage}, to see if its results change",
        )
        for stage, files in made_by_other_code(root, lock)
    ]


def locks(root: Path) -> list[Finding]:
    """Finds processes at work here, by DVC's locks and those of cache writers, and unfinished caches."""
    findings = []
    lock = repository.dvc_folder(root) / "tmp/lock"
    if lock.is_file() and garbage.locked(lock):
        findings.append(Finding("lock", "fault", "another dvc command holds .dvc/tmp/lock; wait for it or stop it"))
    for path, process in sorted(_rwlock(root)):
        if alive(process):
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


def owner(root: Path) -> list[Finding]:
    """Finds a user without a name, and a repository of another user, in which git reads nothing unless told to."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        return [Finding("owner", "fault", "the system has no name for this user, which DVC needs", "export USER=NAME")]
    try:
        repository.git("rev-parse", "--git-dir", where=root)
    except UserError as error:
        if "safe.directory" in str(error):
            return [Finding("owner", "fault", str(error))]
    return []


def _rwlock(root: Path) -> Iterator[tuple[str, int]]:
    """Yields (output, process id) of what running stages write. Their long lists of inputs are left out."""
    with suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        locks = json.loads((repository.dvc_folder(root) / "tmp/rwlock").read_text(encoding="utf-8") or "{}")
        for path, holder in locks.get("write", {}).items():
            name = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path(path).name
            yield str(name), int(holder["pid"])


def queue(root: Path, params_file: Path) -> list[Finding]:
    """Finds what `dvc exp run --queue` and `--temp` would miss: they run in a copy of what git holds, elsewhere."""
    from h2t.pipeline.base import params

    findings = []
    if not str(root).isascii():
        detail = f"dvc exp run --queue and --temp fail in {root}: DVC needs an ASCII path; move the project to one"
        findings.append(Finding("queue", "note", detail))
    try:
        named = list(_paths(params.load(params_file)))
    except UserError:  # reported by `setting_up.parameters`
        return findings
    for key, path in named:
        if os.path.isabs(path) or not os.path.exists(root / path) or _in_the_copy(root, path):  # noqa: PTH110, PTH117
            continue
        detail = f"{key}: {path} is relative and not in git, so dvc exp run --queue and --temp will not find it"
        findings.append(Finding("queue", "note", f"{detail}; write {root / path}"))
    return findings


def _paths(values: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of every parameter that may name a file or folder of data."""
    options = _mapping(_mapping(values, "prepare"), "options")
    if START & options.keys():  # then `train` is a folder inside `root`, and `label` a column
        options = {key: value for key, value in options.items() if key in START}
    sections = {
        "prepare.options": options,
        "extract": {"statistics_from": _mapping(values, "extract").get("statistics_from")},
    }
    for name in _mapping(values, "backbones"):
        entry = _mapping(_mapping(values, "backbones"), name)
        sections[f"backbones.{name}"] = {key: entry.get(key) for key in ("weights", "start")}
    for section, entries in sections.items():
        for key, value in entries.items():
            several = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for text in several:
                if isinstance(text, str) and text:
                    yield f"{section}.{key}", text


def _mapping(values: Any, key: str) -> dict[str, Any]:
    """The mapping `values[key]`; empty if it is anything else, which `setting_up.parameters` reports."""
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

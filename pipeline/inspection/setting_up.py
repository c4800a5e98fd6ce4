"""Checks of `h2t doctor` on this machine and the parameters: packages, parameters, inputs, device, disk."""

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted
from h2t.pipeline.inspection.findings import Finding

LOW_DISK = 2 * 10**9  # bytes
NAMED_BY_DVC = {"backbones": ("arch", "objective"), "hosts": ("host", "backbone")}  # keys read by dvc.yaml


def versions() -> list[Finding]:
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


def parameters(path: Path) -> list[Finding]:
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


def watched(path: Path, *, full: bool = False) -> list[Finding]:
    """Checks the files and folders of the section `inputs`: watched by DVC, present, and possible to watch.

    `full` reads every byte: DVC does not look again into a file whose size and time are those of before.
    """
    from h2t.pipeline.base import params
    from h2t.pipeline.inspection import settings
    from h2t.pipeline.stages import inputs, watch

    try:
        values = params.load(path)
        settings.check(values)
    except UserError:  # reported by `parameters`
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
            if full:
                findings += _compared(name, given, path.parent / f"inputs/{name}.json")
        except UserError as error:
            findings.append(Finding("inputs", "fault", str(error)))
        if not Path(place).is_absolute():
            detail = f"inputs.{name}: {place} is a relative path, and dvc exp run --queue needs an absolute one"
            findings.append(Finding("inputs", "note", f"{detail}; write {Path(place).absolute()}"))
    how = "; every byte compared" if full else ""
    return findings or [Finding("inputs", "ok", f"{counted(len(given), 'input')} watched by DVC{how}")]


def _compared(name: str, given: Mapping[str, str], record: Path) -> list[Finding]:
    """Every byte of input `name` against what the stage watch wrote to the JSON file `record`."""
    from h2t.pipeline.stages import watch

    if not record.exists():
        return [Finding("inputs", "note", f"inputs.{name}: not read yet, so there is nothing to compare with")]
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before == watch.facts(name, given):
        return []
    remedy = f"dvc repro --force --single-item watch@{name} && dvc repro"
    return [Finding("inputs", "fault", f"inputs.{name}: {given[name]} has changed since it was read", remedy)]


def compute(path: Path) -> list[Finding]:
    """Checks that the device of the parameters exists."""
    import torch

    from h2t.pipeline.base import device, params

    try:
        wanted = params.load(path).get("device", "auto")
    except UserError:  # reported by `parameters`
        wanted = "auto"
    try:
        chosen = device.choose(str(wanted))
    except UserError as error:
        return [Finding("device", "fault", str(error))]
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"cpu, {threads}"
    return [Finding("device", "ok", name)]


def disk(start: Path) -> list[Finding]:
    """Checks that the disk has room."""
    free = shutil.disk_usage(start).free
    detail = f"{sized(free)} free"
    if free < LOW_DISK:
        return [Finding("disk", "fault", f"{detail}; at least {sized(LOW_DISK)} are needed", "h2t cache gc")]
    return [Finding("disk", "ok", detail)]

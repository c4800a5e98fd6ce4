"""inputs: which digest concerns which stage.

Writes `prepare.json`, `extract.json` and `backbones/NAME.json`, the JSON objects {parameter: {input: sha256}} of what
that stage reads from outside. They stay the same where nothing changed for a stage, so that it does not run again.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import INPUTS, build

NUMBER = 2026112601  # other results, another number: docs/numbers.md

NO_FILES = ("torchvision", "pretrained", "none")  # what `weights` and `start` of a backbone may say instead of a file


def run(values: Mapping[str, Any], digests: Path, out: Path, say: Callable[[str], None]) -> None:
    """Sorts the digests in the folder `digests` into `out` by the stages that read the inputs. Raises UserError."""
    inputs = values.get("inputs") or {}
    found = {name: _read(digests / f"{name}.json") for name in inputs}
    used: set[str] = set()
    with fresh_directory(out) as into:
        for consumer, paths in named(values).items():
            facts = {}
            for key, path in paths.items():
                names = _with_links([n for n, place in inputs.items() if _lies_in(path, [place])], found)
                used |= set(names)
                facts[key] = {n: found[n]["sha256"] for n in sorted(names)}
            (into / consumer).parent.mkdir(exist_ok=True)
            write_json(into / f"{consumer}.json", facts)
    for name in sorted(set(inputs) - used):
        say(f"note: inputs.{name}: no parameter names it ({INPUTS}{name}), so no stage waits for it")


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"sha256": str(facts["sha256"]), "also": [str(name) for name in facts["also"]]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: no digest of input {path.stem}; type: dvc repro watch@{path.stem}, or, without the files "
            "themselves, dvc repro --pull"
        ) from None


def _with_links(names: list[str], found: Mapping[str, dict[str, Any]]) -> set[str]:
    """`names` and the inputs that their links lead to."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            raise UserError(f"inputs: a link leads to the input {name!r}, which is no longer named; name it again")
        if name not in seen:
            seen.add(name)
            todo += found[name]["also"]
    return seen


def named(values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Stage -> {parameter: file or folder that it reads}; the stages are prepare, extract and backbones/NAME.

    A cache at a URL is not among them: DVC cannot watch it, and its fingerprint stands in the cache made from it.
    """
    section = values["prepare"]
    dataset = plugins.load("datasets", section["dataset"])
    options = build(dataset.Options, "prepare.options", section.get("options", {}))
    watched = dataset.inputs(options) if hasattr(dataset, "inputs") else {}
    found = {"prepare": {f"prepare.options.{option}": path for option, path in watched.items()}}
    kept = values["extract"].get("statistics_from")
    found["extract"] = {} if kept is None or "://" in kept else {"extract.statistics_from": kept}
    for name, entry in values["backbones"].items():
        files = {key: entry.get(key) for key in ("weights", "start")}
        found[f"backbones/{name}"] = {
            f"backbones.{name}.{key}": path for key, path in files.items() if path is not None and path not in NO_FILES
        }
    return found


def check(values: Mapping[str, Any], project: Path) -> None:
    """Raises UserError if the parameters name a file that the dvc.yaml in the folder `project` does not watch.

    Without a dvc.yaml there is nothing to compare.
    """
    paths = {key: path for stage in named(values).values() for key, path in stage.items()}
    if not paths or not (project / "dvc.yaml").is_file():
        return
    watched = _watched(project, values.get("inputs") or {})
    for key, path in paths.items():
        if not _lies_in(path, watched):
            raise UserError(
                f"{key}: DVC does not watch {path}, so a change there would go unnoticed; name it, or a folder around "
                f"it, in the section `inputs` (inputs: {{data: {path}}}), and write {INPUTS}data here"
            )


def in_queue(values: Mapping[str, Any]) -> str:
    """What to add to an error in the temporary workspace of an experiment, if an input is not found there."""
    parts = Path.cwd().parts
    gone = [p for p in (values.get("inputs") or {}).values() if not Path(p).is_absolute() and not Path(p).exists()]
    if not gone or not any(parts[i : i + 3] == (".dvc", "tmp", "exps") for i in range(len(parts))):
        return ""
    return (
        f"; the relative path {gone[0]} leads nowhere in the temporary workspace of an experiment (--queue, --temp): "
        "write an absolute one under `inputs`"
    )


def _watched(project: Path, inputs: Mapping[str, str]) -> list[str]:
    """The paths that dvc.yaml depends on: the inputs, if a stage goes through them, and those written there in full."""
    try:
        stages = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
        found = list(inputs.values()) if any(stage.get("foreach") == "${inputs}" for stage in stages) else []
        return found + [str(dep) for stage in stages for dep in stage.get("do", stage).get("deps", [])]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []  # DVC says what is wrong with it


def _lies_in(path: str, places: Iterable[str]) -> bool:
    """Whether `path` is one of `places` or lies below one, by their names."""
    parts = Path(os.path.abspath(path)).parts  # noqa: PTH100 - keeps links
    outer = [Path(os.path.abspath(place)).parts for place in places]  # noqa: PTH100
    return any(parts[: len(place)] == place for place in outer)

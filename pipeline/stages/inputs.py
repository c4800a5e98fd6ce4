"""inputs: assigns the digests of the inputs to the stages that read them.

Writes `prepare.json`, `extract.json` and `backbones/NAME.json`. Each is a JSON object {parameter: {input: sha256}} of
the files that the stage reads from outside. If no input of a stage changed, its file does not change either, and the
stage does not run again.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import INPUTS, build
from h2t.pipeline.base.run import Say
from h2t.pipeline.networks.pretrained import is_folder

NUMBER = 2026112601  # other results, another number: docs/numbers.md

NO_FILES = ("torchvision", "pretrained", "none")  # values of a backbone's `weights` and `start` that do not name a file


def run(values: Mapping[str, Any], digests: Path, out: Path, say: Say) -> None:
    """Writes to the directory `out` which digests of the folder `digests` each stage depends on.

    Raises UserError if a digest is missing or a link leads to an input that is no longer named.
    """
    inputs = values.get("inputs") or {}
    facts_of = {name: _read(digests / f"{name}.json") for name in inputs}
    used: set[str] = set()
    with fresh_directory(out) as into:
        for consumer, paths in named(values).items():
            facts = {}
            for key, path in paths.items():
                names = _with_links([n for n, place in inputs.items() if _lies_in(path, [place])], facts_of)
                used |= set(names)
                facts[key] = {n: facts_of[n]["sha256"] for n in sorted(names)}
            (into / consumer).parent.mkdir(exist_ok=True)
            write_json(into / f"{consumer}.json", facts)
    for name in sorted(set(inputs) - used):
        say(f"note: inputs.{name}: no parameter refers to it ({INPUTS}{name}), so no stage depends on it")


def _read(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return {"sha256": str(facts["sha256"]), "also": [str(name) for name in facts["also"]]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: no digest of input {path.stem}; type: dvc repro watch@{path.stem}, or dvc repro --pull if you "
            "do not have the files"
        ) from None


def _with_links(names: list[str], facts_of: Mapping[str, dict[str, Any]]) -> set[str]:
    """`names` and the inputs that links in them lead to, directly or indirectly."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in facts_of:
            raise UserError(f"inputs: a link leads to the input {name!r}, which is missing; add it to `inputs` again")
        if name not in seen:
            seen.add(name)
            todo += facts_of[name]["also"]
    return seen


def named(values: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Stage -> {parameter: path of the file or folder that it names}, for prepare, extract and backbones/NAME.

    A cache at a URL is left out: DVC cannot watch it, and its fingerprint is recorded in the cache made from it.
    """
    section = values["prepare"]
    dataset = plugins.load("datasets", section["dataset"])
    options = build(dataset.Options, "prepare.options", section.get("options", {}))
    watched = dataset.inputs(options) if hasattr(dataset, "inputs") else {}
    paths = {"prepare": {f"prepare.options.{option}": path for option, path in watched.items()}}
    kept = values["extract"].get("statistics_from")
    paths["extract"] = {} if not isinstance(kept, str) or "://" in kept else {"extract.statistics_from": kept}
    for name, entry in values["backbones"].items():
        files = {key: entry.get(key) for key in ("weights", "start")}
        model = (entry.get("options") or {}).get("model")
        if isinstance(model, str) and is_folder(model):
            files["options.model"] = model
        paths[f"backbones/{name}"] = {
            f"backbones.{name}.{key}": path
            for key, path in files.items()
            if isinstance(path, str) and path not in NO_FILES
        }
    return paths


def check(values: Mapping[str, Any], project: Path) -> None:
    """Raises UserError if the parameters name a file that dvc.yaml in the folder `project` does not watch.

    Without a dvc.yaml nothing is checked.
    """
    paths = {key: path for stage in named(values).values() for key, path in stage.items()}
    if not paths or not (project / "dvc.yaml").is_file():
        return
    watched = _watched(project, values.get("inputs") or {})
    for key, path in paths.items():
        if not _lies_in(path, watched):
            raise UserError(
                f"{key}: DVC does not watch {path}, so it would miss a change there; add the path or a parent folder "
                f"to the section `inputs` (inputs: {{data: {path}}}), and write {INPUTS}data here"
            )


def in_queue(values: Mapping[str, Any]) -> str:
    """A hint for errors in the temporary workspace of an experiment where an input with a relative path is missing.

    Otherwise an empty string.
    """
    parts = Path.cwd().parts
    gone = [p for p in (values.get("inputs") or {}).values() if not Path(p).is_absolute() and not Path(p).exists()]
    if not gone or not any(parts[i : i + 3] == (".dvc", "tmp", "exps") for i in range(len(parts))):
        return ""
    return (
        f"; the relative path {gone[0]} does not exist in the temporary workspace of an experiment (--queue, --temp): "
        "use an absolute path in `inputs`"
    )


def _watched(project: Path, inputs: Mapping[str, str]) -> list[str]:
    """The paths that dvc.yaml depends on: those written there, and the inputs if it has a stage for each of them."""
    try:
        stages = yaml.safe_load((project / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
        watched = list(inputs.values()) if any(stage.get("foreach") == "${inputs}" for stage in stages) else []
        return watched + [str(dep) for stage in stages for dep in stage.get("do", stage).get("deps", [])]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return []  # DVC reports what is wrong with the file


def _lies_in(path: str, places: Iterable[str]) -> bool:
    """True if `path` is one of `places` or lies inside one. Compares names only and does not resolve links."""
    parts = Path(os.path.abspath(path)).parts  # noqa: PTH100 - keeps links
    outer = [Path(os.path.abspath(place)).parts for place in places]  # noqa: PTH100
    return any(parts[: len(place)] == place for place in outer)

"""Which source files of this package a stage used, and which of them have changed since it ran.

A run record (`data/runs`) holds a digest of every source file of the package that the run loaded. `h2t doctor` compares
the digests of the files that the stage imports, directly or indirectly.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

#: The folder that holds `cache/` and `pipeline/`.
ROOT = Path(__file__).parents[2]
PACKAGES = ("cache", "pipeline")
OURS = tuple(f"h2t.{package}." for package in PACKAGES)


def modules() -> dict[str, Path]:
    """All modules of the two packages: dotted name -> file."""
    files = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(("h2t", *path.relative_to(ROOT).with_suffix("").parts))
            files[name.removesuffix(".__init__")] = path
    return files


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def closure(start: Iterable[str]) -> set[str]:
    """`start` and the modules that it imports, directly or indirectly.

    `__init__` modules are left out: they hold docstrings only.
    """
    known = modules()
    done: set[str] = set()
    todo = [m for m in start if m in known]
    while todo:
        name = todo.pop()
        if name in done or known[name].name == "__init__.py":
            continue
        done.add(name)
        todo += [m for m in imports(known[name]) if m in known]
    return done


def digests(loaded: Mapping[str, Any]) -> dict[str, str]:
    """Path relative to ROOT -> first 16 hex digits of the file's sha256, for each of our modules in `loaded`."""
    digest_of = {}
    for name, module in list(loaded.items()):
        path = getattr(module, "__file__", None)
        if name.startswith(OURS) and path and path.endswith(".py"):
            digest_of[Path(path).relative_to(ROOT).as_posix()] = _digest(Path(path))
    return digest_of


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]


def made_by_other_code(root: Path, lock: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yields (stage in `lock`, source files that changed since it ran), by the run records of the project at `root`."""
    for address, entry in lock.items():
        stage, _, name = address.partition("@")
        try:
            record = json.loads((root / "data/runs" / stage / f"{name or stage}.json").read_text(encoding="utf-8"))
            before = dict(record["code"])
        except (OSError, ValueError, KeyError, TypeError):  # no run record, or one of a version without digests
            continue
        watched = [keys for file, keys in entry.get("params", {}).items() if Path(file).name == "stages.yaml"]
        named = [key for keys in watched for key in keys if "." in key]
        start = {f"h2t.pipeline.stages.{stage}", *(f"h2t.pipeline.{key}" for key in named)}
        files = sorted(modules()[m].relative_to(ROOT).as_posix() for m in closure(start))
        changed = [file for file in files if file in before and before[file] != _digest(ROOT / file)]
        if changed:
            yield address, changed

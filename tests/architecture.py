"""Imports as a graph, read from the source; and the code that each DVC stage depends on.

`python tests/architecture.py` rewrites the code dependencies in dvc.yaml; tests/test_architecture.py checks them.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLUGINS = ("datasets", "backbones", "objectives", "samplers", "pools", "hosts")

#: Stage -> plug-ins it loads by name: folder -> how dvc.yaml names the one in use.
LOADED = {
    "prepare": {"datasets": ["${prepare.dataset}"]},
    "train_backbone": {
        "datasets": ["${prepare.dataset}"],
        "backbones": ["${item.arch}"],
        "objectives": ["${item.objective}"],
    },
    "extract": {
        "datasets": ["${prepare.dataset}"],
        "backbones": ["${item.arch}"],
        "samplers": ["balanced", "instance", "reverse"],
    },
    "pool": {"pools": ["${pool.pool}"]},
    "train_classifier": {
        "hosts": ["${item.host}"],
        "pools": ["${item.pool}"],
        "samplers": ["balanced", "instance", "reverse"],
    },
    "evaluate": {"hosts": ["${item.host}"], "pools": ["${item.pool}"]},
    "report": {},
}


def modules() -> dict[str, Path]:
    """Every module of the two packages: dotted name -> file."""
    found = {}
    for package in ("cache", "pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Dotted names that the file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def closure(start: set[str]) -> set[str]:
    """The modules reachable from `start`, packages' own `__init__` left out: they hold docstrings only."""
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


def code_deps(stage: str) -> list[str]:
    """The code dependencies that dvc.yaml must list for `stage`."""
    reached = closure({f"pipeline.stages.{stage}"})
    deps = set()
    for kind, names in LOADED[stage].items():
        plugged = {m for m in modules() if re.fullmatch(rf"pipeline\.{kind}\.\w+", m)}
        reached |= closure(plugged) - plugged
        deps |= {f"pipeline/{kind}/{name}.py" for name in names}
    files = {modules()[m].relative_to(ROOT) for m in reached}
    compiled = {file.with_suffix(".c") for file in files if (ROOT / file).with_suffix(".c").exists()}
    return sorted({file.as_posix() for file in files | compiled} | deps)


def main() -> None:
    """Rewrites the code entries under `deps` of every stage, and nothing else."""
    path = ROOT / "dvc.yaml"
    lines, out, stage = path.read_text(encoding="utf-8").splitlines(), [], ""
    for line in lines:
        if match := re.fullmatch(r"  (\w+):", line):
            stage = match[1]
        if line.strip().startswith("- ") and line.rstrip().endswith((".py", ".c")):
            continue
        if line.strip() in ("deps:", "deps: []"):
            indent = line[: len(line) - len(line.lstrip())]
            out.append(f"{indent}deps:")
            out += [f"{indent}  - {dep}" for dep in code_deps(stage)]
            continue
        out.append(line)
    path.write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Plug-in name -> module. The value in params.yaml is the file name; there is no registry to keep up to date."""

import ast
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

from h2t.pipeline.base.errors import UserError, nearest

_FILE = re.compile(r"[^\W_][\w-]{0,99}")  # what a plug-in's file may be called, without its ending
KINDS = ("datasets", "backbones", "objectives", "samplers", "pools", "hosts")
#: Kinds whose file may leave out its parameters: (class with the default, name of the parameters).
DEFAULTS = {"pools": ("Pool", "Options"), "hosts": ("Host", "Loss")}


def folders(kind: str) -> list[Path]:
    """Where plug-ins of `kind` are looked up: this package, plugins/<kind> of the project, then $H2T_PLUGINS/<kind>.

    The project is the working directory: `h2t` and `dvc repro` run where params.yaml is.
    """
    found = [Path(__file__).parents[1] / kind, Path.cwd() / "plugins" / kind]
    if extra := os.environ.get("H2T_PLUGINS"):
        found.append(Path(extra) / kind)
    return found


def names(kind: str) -> list[str]:
    """The plug-ins of `kind`, by file listing."""
    return sorted(p.stem for folder in folders(kind) for p in folder.glob("*.py") if not p.name.startswith("_"))


def check(kind: str, name: str) -> None:
    """Raises UserError if there is no such plug-in."""
    if not _FILE.fullmatch(name) or not any((folder / f"{name}.py").is_file() for folder in folders(kind)):
        raise UserError(
            f"no {kind.removesuffix('s')} {name!r}{nearest(name, names(kind))} (there are: {', '.join(names(kind))})"
        )


def load(kind: str, name: str) -> ModuleType:
    """The module of plug-in `name`, and nothing else of its folder. Raises UserError for an unknown name."""
    check(kind, name)
    path = next(p for folder in folders(kind) if (p := folder / f"{name}.py").is_file())
    if path.parent == Path(__file__).parents[1] / kind:
        return _completed(kind, importlib.import_module(f"h2t.pipeline.{kind}.{name}"))
    qualified = f"h2t_plugins.{kind}.{name}"
    loaded = sys.modules.get(qualified)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    spec.loader.exec_module(module)
    return _completed(kind, module)


def _completed(kind: str, module: ModuleType) -> ModuleType:
    """`module`, with the parameters of its class's base where it defines none."""
    if kind in DEFAULTS:
        owner, parameters = DEFAULTS[kind]
        if not hasattr(module, parameters):
            setattr(module, parameters, getattr(getattr(module, owner), parameters))
    return module


def summary(kind: str, name: str) -> str:
    """The first line of the plug-in's docstring, without importing it."""
    path = next(p for folder in folders(kind) if (p := folder / f"{name}.py").is_file())
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n", 1)[0]

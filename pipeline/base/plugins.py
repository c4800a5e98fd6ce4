"""Finding plug-ins. The name in params.yaml is the name of the plug-in's file; there is no registry."""

import ast
import importlib
import importlib.util
import os
import re
import sys
import traceback
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from h2t.cache.errors import CacheError
from h2t.pipeline.base.errors import OF_PATHS, UserError, in_brief, nearest, of_the_machine

#: Environment variable: with 1, every command shows the traceback of its error in place of the line.
TRACEBACK = "H2T_TRACEBACK"

_LOADED = "h2t_plugins"  # package name of the user's plug-ins in sys.modules
_SOURCE = "__h2t_source__"  # in such a module, the bytes of its file when it was imported
_compared: set[str] = set()  # modules of `_LOADED` whose file was compared since `look_again`
_FILE = re.compile(r"[^\W_][\w-]{0,99}")  # valid file names, without the ending
KINDS = ("datasets", "backbones", "objectives", "samplers", "pools", "hosts")
#: Kinds whose file may leave out its parameters: (class with the default, name of the parameters).
DEFAULTS = {"objectives": ("Objective", "Loss"), "pools": ("Pool", "Options"), "hosts": ("Host", "Loss")}


def folders(kind: str) -> list[Path]:
    """Folders searched for plug-ins of `kind`, in order: this package, the project's plugins/, then $H2T_PLUGINS.

    The project is the working directory: `h2t` and `dvc repro` run in the folder of params.yaml.
    """
    paths = [Path(__file__).parents[1] / kind, Path.cwd() / "plugins" / kind]
    if extra := os.environ.get("H2T_PLUGINS"):
        paths.append(Path(extra) / kind)
    return paths


def names(kind: str) -> list[str]:
    """Sorted names of all plug-ins of `kind`."""
    return sorted(p.stem for folder in folders(kind) for p in folder.glob("*.py") if not p.name.startswith("_"))


def check(kind: str, name: str) -> None:
    """Raises UserError if there is no plug-in of `kind` called `name`, or if a user's file has a built-in's name."""
    if not _FILE.fullmatch(name) or not any((folder / f"{name}.py").is_file() for folder in folders(kind)):
        raise UserError(
            f"no {kind.removesuffix('s')} {name!r}{nearest(name, names(kind))} (there are: {', '.join(names(kind))})"
        )
    own, *others = (path.resolve() for folder in folders(kind) if (path := folder / f"{name}.py").is_file())
    if own.parent == Path(__file__).resolve().parents[1] / kind and any(other != own for other in others):
        other = next(other for other in others if other != own)
        raise UserError(f"{other}: h2t has a {kind.removesuffix('s')} {name!r} of its own; rename the file")


def look_again() -> None:
    """From now on, plug-ins whose files were edited are imported again.

    Every call of `h2t.api` that trains begins with it; in between, a file that is saved does not change a run.
    """
    _compared.clear()


def load(kind: str, name: str) -> ModuleType:
    """Imports the module of plug-in `name`, and no other plug-in; again if its file was edited before `look_again`.

    Raises UserError for an unknown name.
    """
    check(kind, name)
    path = next(p for folder in folders(kind) if (p := folder / f"{name}.py").is_file())
    if path.parent == Path(__file__).parents[1] / kind:
        return _completed(kind, importlib.import_module(f"h2t.pipeline.{kind}.{name}"))
    qualified = f"{_LOADED}.{kind}.{name}"
    loaded = sys.modules.get(qualified)
    if loaded is not None and loaded.__file__ != str(path):
        loaded = None
    if loaded is not None and qualified in _compared:
        return loaded
    source = path.read_bytes() if os.access(path, os.R_OK) else b""  # which the import says
    _compared.add(qualified)
    if loaded is not None and loaded.__dict__.get(_SOURCE) == source:
        return loaded
    spec = importlib.util.spec_from_file_location(qualified, path, loader=_FromSource(qualified, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _SOURCE, source)
    sys.modules[qualified] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[qualified]  # half of a module
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be imported ({_said(error, path)}); correct the plug-in") from error
    return _completed(kind, module)


class _FromSource(SourceFileLoader):
    """Compiles the file each time: Python takes its stored code for that of an edit in the same second."""

    def path_stats(self, path: Any) -> Any:
        """Says that the file has no time, so that no stored code is looked for or written."""
        raise OSError(path)


def _said(error: Exception, path: Path) -> str:
    """What went wrong while `path` was imported, and in which of its lines."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (lines or [None])[-1]
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{'' if line is None else f'line {line}: '}{type(error).__name__}: {' '.join(text.split())}"


def for_people(error: Exception) -> UserError | CacheError | None:
    """The error as one line: what it says already, what the machine lacks, or a fault of a plug-in. None for a bug."""
    if isinstance(error, UserError | CacheError):
        return error
    if isinstance(error, OSError) and error.errno in OF_PATHS:  # a plug-in may name a path of its own
        return _fault(error) or of_the_machine(error)
    return of_the_machine(error) or _fault(error)


def _fault(error: BaseException) -> UserError | None:
    """A UserError for an `error` raised by a function of a user's plug-in or for want of one, otherwise None.

    An error in a library is that of the function that called it. If h2t did, the error is a bug of ours, even below a
    plug-in.
    """
    if isinstance(error, AttributeError) and isinstance(module := error.obj, ModuleType):
        package, _, kind = module.__name__.rpartition(".")[0].partition(".")
        if package == _LOADED:
            return UserError(
                f"{module.__file__}: must define {error.name}, as every plug-in in {kind} does; correct the plug-in"
            )
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package == "h2t":
            break
        if package == _LOADED:
            code = frame.f_code
            return UserError(
                f"{code.co_filename}: line {line}, in {code.co_name}: {type(error).__name__}: {in_brief(error)}; "
                f"correct the plug-in, or type {TRACEBACK}=1 before the command to see the traceback"
            )
    return None


def _completed(kind: str, module: ModuleType) -> ModuleType:
    """`module`, with the parameters of its class's base where it defines none."""
    if kind in DEFAULTS:
        owner, parameters = DEFAULTS[kind]
        if not hasattr(module, parameters) and hasattr(module, owner):
            setattr(module, parameters, getattr(getattr(module, owner), parameters))
    return module


def summary(kind: str, name: str) -> str:
    """The first line of the plug-in's docstring, read without importing the plug-in."""
    path = next(p for folder in folders(kind) if (p := folder / f"{name}.py").is_file())
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, ValueError) as error:  # shown in its line, beside the other plug-ins
        return f"cannot be read ({' '.join(str(error).split())}); correct {path}"
    return text.split("\n", 1)[0]

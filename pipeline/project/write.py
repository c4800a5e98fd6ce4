"""Writes the files of a project: params.yaml, dvc.yaml, stages.yaml, plugins/, inputs/, ignore files, git and DVC.

`files/` holds those that every project has in common; in the repository they are links to its own.
"""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from h2t.pipeline.base import numbers, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import creating, rewrite, text_of
from h2t.pipeline.base.params import check_path
from h2t.pipeline.project.choose import Settings
from h2t.pipeline.project.detect import Found

FILES = Path(__file__).parent / "files"
PLOTS = ("ratio.json", "per_class.json")  # templates of `dvc plots`
IGNORED = ("/data/", "/dvc_plots/", "__pycache__/")
WRITTEN = ("model", "comparison")  # folders that the documented h2t export and h2t report --compare write
DVC_IGNORED = ("__pycache__", ".*.staging", ".DS_Store")  # the last: what the Finder of macOS leaves in a folder
AS_THEY_ARE = ("/inputs/** -text", "/plugins/** -text")  # stages depend on their bytes, so no core.autocrlf there
NO_GIT = "[core]\n    no_scm = True"  # what `dvc init --no-scm` writes
RESULTS = "data"  # the folder of all outputs
#: Keys of params.yaml whose mappings are written in braces; so are `options` of more than LONG keys.
IN_BRACES = (
    *("inputs", "table", "transform", "test", "validation", "min_per_class", "extract", "optimiser", "grid"),
    *("logit_adjustment", "logistic_regression", "evaluate", "report"),
)
LONG = 5


class Exists(UserError):
    """A file of another content stands where one is to be written."""


def for_any_images(folder: Path) -> dict[str, str]:
    """The files of a project in `folder` that do not depend on its images: path relative to it -> text."""
    with contextlib.chdir(folder) if folder.is_dir() else contextlib.nullcontext():
        own = numbers.text(numbers.in_code())  # those of plug-ins in the folder too
    return {
        "dvc.yaml": (FILES / "dvc.yaml").read_text(encoding="utf-8"),
        "stages.yaml": own,
        "inputs/.gitignore": "/*.json\n",
        **{f"plugins/{kind}/.gitkeep": "" for kind in plugins.KINDS},
        **{f".dvc/plots/{name}": (FILES / name).read_text(encoding="utf-8") for name in PLOTS},
    }


def project(folder: Path, found: Found, settings: Settings, title: str) -> dict[str, str]:
    """The files of the project in `folder`: path relative to it -> text."""
    return {**for_any_images(folder), "params.yaml": parameters(folder, found, settings, title)}


def _places(found: Found, weights: Path | None) -> dict[str, Path]:
    """Name -> path of each input: the images, and the backbone's weights if they are the user's own."""
    return {**found.inputs, **({} if weights is None else {"weights": _absolute(weights)})}


def check_places(folder: Path, found: Found, data: Path, weights: Path | None) -> None:
    """Raises UserError for a path that DVC cannot work in; `data` and `weights` are what was given by these options.

    Also if the project would lie among the images, or an input among the results.
    """
    here = _absolute(folder)
    places = _places(found, weights)
    for path in (here, *places.values()):
        check_path("h2t init", path)
    for name, place in places.items():
        if place.is_relative_to(here / RESULTS):
            what = "the weights" if name == "weights" else "images"
            raise UserError(
                f"{place}: results will be written to {here / RESULTS}, so {what} cannot lie there; move them, for "
                f"example to {here / name}"
            )
    for place in found.inputs.values():
        if here == place or here.is_relative_to(place):
            beside = place.parent / (f"{place.name}-project" if here == place else here.name)
            raise UserError(
                f"{folder}: the project must not lie in the folder of the images, {place}, which DVC watches; type: "
                f"h2t init {shlex.quote(str(beside))} --data {shlex.quote(str(_absolute(data)))}"
            )


def parameters(folder: Path, found: Found, settings: Settings, title: str) -> str:
    """The text of params.yaml."""
    here = _absolute(folder)
    inputs = {
        name: os.path.relpath(place, here) if place.is_relative_to(here) else str(place)
        for name, place in _places(found, settings.weights).items()
    }
    recipes = ["stage1"] if settings.pretrained else ["stage1", "branchwise"]
    own = {
        "inputs": inputs,
        "prepare": settings.prepare,
        "backbone_defaults": {},
        "backbones": {settings.name: settings.backbone},
        "extract": {"batchnorm": recipes, "batchnorm_passes": settings.batchnorm_passes},
        "pool": {},
        "host_defaults": {},
        "hosts": {
            "dr": {
                "host": "dr",
                "backbone": settings.name,
                "batchnorm": recipes[-1],
                "optimiser": {"epochs": settings.classifier_epochs, "lr": 0.02},
                "grid": {"ratio": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], "seed": [0, 1, 2]},
            },
            "logit_adjustment": {"host": "logit_adjustment", "backbone": settings.name, "batchnorm": "stage1"},
            "logistic_regression": {"host": "logistic_regression", "backbone": settings.name, "batchnorm": "stage1"},
        },
        "evaluate": {"groups": [1, 1]} if settings.classes == 2 else {},  # the rarer one is the tail
        "report": {"title": title},
    }
    parts = ["# Written by h2t init. All keys and their defaults: docs/parameters.md of h2t.\nseed: 0\nreplicates: [0]"]
    parts += [line for name, value in own.items() for line in _section(name, value)]
    return "\n".join(parts) + "\n"


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - keeps links


def _section(name: str, value: object, indent: str = "") -> list[str]:
    """The lines of `name: value`; mappings have a line for each key, unless they stand in braces."""
    short = name in IN_BRACES or (name == "options" and isinstance(value, dict) and len(value) > LONG)
    if not isinstance(value, dict) or not value or short:
        return [f"{indent}{name}: {_flow(value)}"]
    inside = (line for key, part in value.items() for line in _section(key, part, indent + "  "))
    return [f"{indent}{name}:", *inside]


def _flow(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def check_free(folder: Path, files: dict[str, str]) -> None:
    """Raises Exists for the first file that is there already with other content."""
    for name, text in files.items():
        path = folder / name
        if path.exists() and (not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text):
            raise Exists(f"{path}: exists already; remove it, or name another folder: h2t init FOLDER --data ...")


def write(folder: Path, files: dict[str, str], found: Found, weights: Path | None) -> Iterator[str]:
    """Writes the files, git's and DVC's folders where there are none; yields a line for each thing that was done.

    Raises Exists before anything is written if a file is there already with other content.
    """
    check_free(folder, files)
    with creating(folder):
        folder.mkdir(parents=True, exist_ok=True)
    here = _absolute(folder)
    places = _places(found, weights).values()
    inside = [_pattern(place.relative_to(here)) for place in places if place.is_relative_to(here)]
    free = [f"/{name}/" for name in WRITTEN if not (folder / name).exists()]  # what is there may be the user's code
    _append(folder / ".gitignore", [*IGNORED, *free, *inside])
    _append(folder / ".gitattributes", AS_THEY_ARE)
    _append(folder / ".dvcignore", DVC_IGNORED)
    yield from _versioned(folder)
    for name, text in files.items():  # params.yaml last: without it the command is not done, and goes on
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():  # else it has the same text
            rewrite(folder / name, text)
    if not str(here).isascii():
        yield f"note: {here}: DVC's experiment queue needs a path of ASCII letters; dvc repro works"
    shown = sorted({name.split("/")[0] + ("/" if "/" in name else "") for name in files} - {".dvc/"})
    yield f"wrote {', '.join(shown)}, .gitignore, .gitattributes and .dvcignore"


def _pattern(place: Path) -> str:
    """The line of .gitignore for `place` alone. No line can hold a line break, so there `?` stands for it."""
    return "/" + re.sub(r"[\r\n]", "?", re.sub(r"([\\*?[ ])", r"\\\1", place.as_posix()))


def _append(path: Path, wanted: list[str] | tuple[str, ...]) -> None:
    """Adds the lines that the file lacks; what is there stays as it is."""
    there, end = text_of(path)
    lacking = [line for line in wanted if line not in there.splitlines()]
    if lacking:
        between = end if there and not there.endswith("\n") else ""
        rewrite(path, there + between + "".join(f"{line}{end}" for line in lacking))


def _versioned(folder: Path) -> Iterator[str]:
    """Initialises git and DVC in `folder` where they are not; yields what was done."""
    top = _git_top(folder)
    if top is None:
        yield "git: not installed, so DVC works without it; install git to keep versions"
    elif top == "":
        subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, capture_output=True)
        yield "git: initialised"
    config = folder / ".dvc/config"
    if not config.is_file():
        _init_dvc(folder, top)
    made = config.read_text(encoding="utf-8")
    if made.strip() in ("", NO_GIT):  # as `dvc init` leaves it, also if this command was killed then
        own = (FILES / "dvc-config").read_text(encoding="utf-8")
        rewrite(config, own.replace("[core]", NO_GIT) if top is None else own)
        yield "DVC: initialised"


def _init_dvc(folder: Path, top: str | None) -> None:
    """Runs `dvc init` in `folder`; `top` is the root of the git repository around it, as `_git_top` says."""
    if os.path.lexists(folder / ".dvc"):  # `dvc init --force` would delete it with its cache
        raise UserError(f"{folder / '.dvc'}: must have a file config; got none; make an empty one, or move .dvc away")
    options = ["--no-scm"] if top is None else ["--subdir"] if top and Path(top).resolve() != folder.resolve() else []
    command = [sys.executable, "-m", "dvc", "init", "--quiet", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = next(iter(done.stderr.strip().splitlines()), "no reason given")
        raise UserError(f"dvc init: {reason.removeprefix('ERROR: ')}")


def _git_top(folder: Path) -> str | None:
    """The root of the git repository around `folder`; "" if there is none, None if git is not installed."""
    try:
        done = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else ""

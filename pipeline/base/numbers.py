"""Numbers of stages and built-in plug-ins. DVC watches these numbers instead of the code.

Each stage and plug-in file states its `NUMBER`, a date and a counter (2026112601). `stages.yaml` repeats the numbers,
and DVC reruns a stage when its number changes. docs/numbers.md says when to raise a number.
"""

import hashlib
import re
from pathlib import Path
from types import ModuleType

import yaml

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError, in_brief

FILE = Path("stages.yaml")
FIRST = 2026112601  # results of version 0.1.0, which had no numbers yet
OWN = 0  # for plug-ins outside the package: DVC watches their files

_NUMBER = re.compile(r"^NUMBER = (\d+)", re.MULTILINE)

Numbers = dict[str, int]


def built_in() -> Numbers:
    """The numbers stated in the code: `extract` or `hosts.dr` -> number. Raises UserError if a file states none."""
    package = Path(__file__).parents[1]
    numbers = {}
    for kind in ("stages", *plugins.KINDS):
        for path in sorted((package / kind).glob("[!_]*.py")):
            stated = _NUMBER.search(path.read_text(encoding="utf-8"))
            if stated is None:
                raise UserError(f"{path}: must state a NUMBER; got none; add one (docs/numbers.md)")
            numbers[path.stem if kind == "stages" else f"{kind}.{path.stem}"] = int(stated[1])
    return numbers


def of_plugin(kind: str, module: ModuleType) -> int | str:
    """The number of a built-in plug-in; for one of the project, a digest of all its Python files of this kind."""
    built_in_folder, *own = plugins.folders(kind)
    if Path(str(module.__file__)).parent == built_in_folder:
        return int(module.NUMBER)
    digest = hashlib.sha256()
    for folder in own:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def in_code() -> Numbers:
    """The numbers that `stages.yaml` must hold: the built-in ones, and OWN for plug-ins in the project's `plugins/`."""
    numbers = built_in()
    for kind in plugins.KINDS:
        names = [path.stem for path in plugins.folders(kind)[1].glob("[!_]*.py")]
        numbers |= {key: OWN for name in sorted(names) if (key := f"{kind}.{name}") not in numbers}
    return numbers


def read(path: Path) -> Numbers:
    """The numbers in the file `path`. Raises UserError if it cannot be read or holds anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        numbers: Numbers = {}
        for name, value in values.items():
            entries = {f"{name}.{key}": n for key, n in value.items()} if isinstance(value, dict) else {name: value}
            numbers |= {str(key): int(number) for key, number in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: must hold a whole number for each stage and plug-in ({in_brief(error)}); restore the file from "
            "git"
        ) from None
    return numbers


def text(numbers: Numbers) -> str:
    """`numbers` as the text of `stages.yaml`: first the stages, then the plug-ins by kind."""
    lines = ["# The numbers of stages and plug-ins, which DVC watches in place of code: docs/numbers.md.", ""]
    lines += [f"{key}: {number}" for key, number in sorted(numbers.items()) if "." not in key]
    for kind in plugins.KINDS:
        lines += ["", f"{kind}:"]
        entries = [(key.partition(".")[2], n) for key, n in sorted(numbers.items()) if key.startswith(f"{kind}.")]
        lines += [f"  {name}: {number}" for name, number in entries]
    return "\n".join(lines) + "\n"


def check(path: Path = FILE) -> None:
    """Raises UserError if `path` exists and its numbers differ from those in the code.

    Without the file nothing is checked: the commands also work on plain paths, outside a project.
    """
    if not path.is_file():
        return
    code, file = built_in(), read(path)
    for key in sorted(code.keys() | file.keys()):
        expected, stated = code.get(key, OWN), file.get(key, OWN)
        if expected != stated:
            raise UserError(
                f"{path}: {key} must be {expected or 'absent'}, as in the installed h2t; got {stated or 'none'}; "
                "type: h2t upgrade, which says what has to run again"
            )

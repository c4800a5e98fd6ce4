"""Numbers of stages and built-in plug-ins: what DVC watches in place of code.

Each stage and plug-in file states `NUMBER`, a date and a counter (2026112601). `stages.yaml` repeats the numbers, and
DVC reruns a stage whose number changed. docs/numbers.md says when to raise a number.
"""

import re
from pathlib import Path

import yaml

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError

FILE = Path("stages.yaml")
FIRST = 2026112601  # what version 0.1.0 computed, before there were numbers
OWN = 0  # of plug-ins outside the package: DVC watches their files

_NUMBER = re.compile(r"^NUMBER = (\d+)", re.MULTILINE)

Numbers = dict[str, int]


def built_in() -> Numbers:
    """The numbers in the code: `extract` or `hosts.dr` -> number."""
    package = Path(__file__).parents[1]
    found = {}
    for kind in ("stages", *plugins.KINDS):
        for path in sorted((package / kind).glob("[!_]*.py")):
            stated = _NUMBER.search(path.read_text(encoding="utf-8"))
            if stated is None:
                raise UserError(f"{path}: states no NUMBER; add one (docs/numbers.md)")
            found[path.stem if kind == "stages" else f"{kind}.{path.stem}"] = int(stated[1])
    return found


def in_code() -> Numbers:
    """The numbers that `stages.yaml` must hold: those built in, and OWN for plug-ins in the project's `plugins/`."""
    found = built_in()
    for kind in plugins.KINDS:
        names = [path.stem for path in plugins.folders(kind)[1].glob("[!_]*.py")]
        found |= {key: OWN for name in sorted(names) if (key := f"{kind}.{name}") not in found}
    return found


def read(path: Path) -> Numbers:
    """The numbers in the file `path`. Raises UserError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        found: Numbers = {}
        for name, value in values.items():
            entries = {f"{name}.{key}": n for key, n in value.items()} if isinstance(value, dict) else {name: value}
            found |= {str(key): int(number) for key, number in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: must hold a whole number for each stage and plug-in ({why}); restore it") from None
    return found


def text(found: Numbers) -> str:
    """`found` as the text of `stages.yaml`: stages, then plug-ins by kind."""
    lines = ["# The numbers of stages and plug-ins, which DVC watches in place of code: docs/numbers.md.", ""]
    lines += [f"{key}: {number}" for key, number in sorted(found.items()) if "." not in key]
    for kind in plugins.KINDS:
        lines += ["", f"{kind}:"]
        entries = [(key.partition(".")[2], n) for key, n in sorted(found.items()) if key.startswith(f"{kind}.")]
        lines += [f"  {name}: {number}" for name, number in entries]
    return "\n".join(lines) + "\n"


def check(path: Path = FILE) -> None:
    """Raises UserError unless `path`, where it exists, has the numbers of the code.

    Without the file nothing is checked: the commands work on plain paths, outside of any project.
    """
    if not path.is_file():
        return
    code, file = built_in(), read(path)
    for key in sorted(code.keys() | file.keys()):
        has, says = code.get(key, OWN), file.get(key, OWN)
        if has != says:
            raise UserError(
                f"{path}: {key} must have the number {has or 'none'} of the installed h2t; got {says or 'none'}; "
                "type: h2t upgrade, which says what has to run again"
            )

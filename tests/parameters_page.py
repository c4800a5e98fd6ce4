"""docs/parameters.md from the parameter models: `python tests/parameters_page.py` writes it.

A field's meaning is the string literal below it, which is read from the source and costs nothing at run time.
"""

# ruff: noqa: E501 - a row of a Markdown table is one line

import ast
import inspect
import math
import re
import sys
import types
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
import yaml

from h2t.pipeline.base import plugins
from h2t.pipeline.base.params import DISTINCT, Bounds, Section
from h2t.pipeline.data.images import Transform
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.inspection.settings import RunSection
from h2t.pipeline.stages import evaluate, extract, pool, prepare, report, train_backbone, train_classifier

PAGE = Path(__file__).parents[1] / "docs" / "parameters.md"
SHOWN = 10**9  # larger bounds only keep numbers representable

START = """\
# Parameters

<!-- Written by python tests/parameters_page.py from the models that check params.yaml. Edit the text below their fields. -->

All sections and keys of `params.yaml`. A key that is left out has its default. An unknown key, a wrong type or a number out
of range is an error that names the key. Bounds above 10^9 are not listed here. `h2t list` names the plug-ins, yours
included; `h2t presets` shows complete files.

| section | type | default | meaning |
| --- | --- | --- | --- |
| `seed` | whole number, 0 or more | `0` | Seed of the split, of stage I and of the batch-norm statistics; classifiers have their own. |
| `replicates` | list of whole numbers, first 0 | `[0]` | Trainings of stage I: each further number divides the data, trains the backbones and estimates statistics again, and intervals cover that ([intervals](intervals.md#replicates)). |
| `device` | `auto`, `cpu`, `cuda`, `cuda:N` | `auto` | Where to compute; `auto` takes a GPU if there is one, and [figures differ](data-flow.md#stages). |
| `inputs` | mapping of names to paths | `{}` | Your own files and folders. Other parameters refer to them as `inputs/NAME` ([sharing](sharing.md)). |
| `prepare` | [keys](#prepare) | required | Images, labels, the long tail. |
| `backbone_defaults` | [keys](#backbonesname) | `{}` | What every backbone has unless its entry says otherwise. |
| `backbones` | mapping of names to [entries](#backbonesname) | required | Backbones, with one cache each. |
| `extract` | [keys](#extract) | `{}` | What the caches store. |
| `pool` | [keys](#pool) | `{}` | The pooled copies of the caches. |
| `host_defaults` | [keys](#hostsname) | `{}` | What every host has unless its entry says otherwise. |
| `hosts` | mapping of names to [entries](#hostsname) | required | The methods of stage II that are compared. |
| `train_classifier` | [keys](#train_classifier) | `{}` | Where features live, and how many processes train. It changes no result. |
| `evaluate` | [keys](#evaluate) | `{}` | Class groups, the reported ratio. |
| `report` | [keys](#report) | `{}` | The page. |
| `run` | [keys](#run) | `{}` | How stages run. It changes no result. |

Defaults and entries merge key by key; a list is replaced whole. A list of distinct values is not empty. The name
of an entry consists of letters, digits, `_` and `-`.
"""

#: What follows START: (heading, model), or (heading, kind of plug-in, its model's name, the key that holds its options).
PARTS: list[tuple[Any, ...]] = [
    ("prepare", prepare.Params),
    ("prepare.options", "datasets", "Options", "prepare.options"),
    ("transform", Transform),
    ("backbones.NAME", train_backbone.Params),
    ("backbones.NAME.options", "backbones", "Options", "backbones.NAME.options"),
    ("backbones.NAME.loss", "objectives", "Loss", "backbones.NAME.loss"),
    ("extract", extract.Params),
    ("pool", pool.Params),
    ("pool_options", "pools", "Options", "pool.pool_options` and `hosts.NAME.pool_options"),
    ("hosts.NAME", train_classifier.Params),
    ("hosts.NAME.loss", "hosts", "Loss", "hosts.NAME.loss"),
    ("train_classifier", Residency),
    ("evaluate", evaluate.Params),
    ("report", report.Params),
    ("run", RunSection),
]


@cache
def _literals(model: type) -> dict[str, str]:
    """The string literal below each field that the class itself declares."""
    tree = ast.parse(Path(inspect.getfile(model)).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == model.__name__)
    return {
        field.target.id: below.value.value
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def meaning(model: type[Section], field: str) -> str:
    """What `field` means. Raises KeyError where no class that `model` derives from says it."""
    for owner in model.__mro__:
        if issubclass(owner, Section) and field in (texts := _literals(owner)):
            return " ".join(texts[field].split())
    raise KeyError(f"{model.__module__}.{model.__name__}.{field}: write a string literal below the field")


def _range(checks: list[Any]) -> str:
    """The bounds that the validators of `params` (within, above, at_least, at_most) set together, in words."""
    bounds = [b for check in checks if isinstance(b := getattr(check, "func", None), Bounds)]
    low = max((b.low for b in bounds), default=-math.inf)
    high = min((b.high for b in bounds), default=math.inf)
    beyond = any(b.exclusive for b in bounds)
    most = "" if high > SHOWN else f"{high:,.10g}"
    if beyond:
        return ", above 0" + (f", at most {most}" if most else "")
    if low < -SHOWN:
        return f", at most {most}" if most else ""
    return f", {low:g} to {most}" if most else f", {low:g} or more"


def described(hint: Any, checks: tuple[Any, ...] = ()) -> str:
    """A type in words, for a cell of a table."""
    if get_origin(hint) is Annotated:
        inner, *more = get_args(hint)
        return described(inner, (*more, *checks))
    if get_origin(hint) in (Union, types.UnionType):
        return ", or ".join(described(part, checks) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        (of,) = get_args(hint)
        constraints = [m for c in checks if isinstance(c, pydantic.fields.FieldInfo) for m in c.metadata]
        length = next((f"{c.min_length} " for c in constraints if hasattr(c, "min_length")), "")
        each = re.sub(r"\b(number|text|name)\b", r"\1s", described(of))
        return f"list of {'distinct ' if DISTINCT in checks else length}{each}"
    kind = next((k for c in checks if (k := _plugin_kind(c))), None)
    if kind:
        return f"name of {'an' if kind[0] in 'aeiou' else 'a'} {kind.removesuffix('s')}"
    if hint is types.NoneType:
        return "`null`"
    if isinstance(hint, type) and issubclass(hint, Transform):
        return "[transform](#transform)"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return words.get(hint, "mapping") + (_range(list(checks)) if hint in (int, float) else "")


def _plugin_kind(check: Any) -> str | None:
    function = getattr(check, "func", None)
    if inspect.isfunction(function) and function.__qualname__.startswith("plugin."):
        return str(inspect.getclosurevars(function).nonlocals["kind"])
    return None


def written(value: Any) -> str:
    """A default as it would stand in params.yaml."""
    if isinstance(value, Section):
        value = value.model_dump(exclude_defaults=True)
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return f"`{text.removesuffix(chr(10)).removesuffix(chr(10) + '...')}`"


def rows(model: type[Section], above: str = "") -> list[str]:
    """The lines of a table: every key of `model`, those of nested models as `nested.key`."""
    lines = []
    hints = get_type_hints(model, include_extras=True)
    for name, field in model.model_fields.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, Section) and hint is not Transform:
            lines += rows(hint, f"{above}{name}.")
            continue
        default = "required" if field.is_required() else written(field.get_default(call_default_factory=True))
        lines.append(f"| `{above}{name}` | {described(hint)} | {default} | {meaning(model, name)} |")
        kinds = set(get_args(hint)) - {types.NoneType}
        if len(kinds) == 1 and isinstance(inner := kinds.pop(), type) and issubclass(inner, Section):  # Section | None
            lines += rows(inner, f"{above}{name}.")
    return lines


def table(model: type[Section]) -> str:
    """A Markdown table of every key of `model`."""
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows(model)])


def built_in(kind: str) -> list[str]:
    """Names of the plug-ins of this package, without those of a project."""
    return sorted(p.stem for p in plugins.folders(kind)[0].glob("*.py") if not p.name.startswith("_"))


def plugin_tables(kind: str, model: str, key: str) -> str:
    """A table for each set of options, under the names of the plug-ins that have it."""
    tables: dict[str, list[str]] = {}
    without = []
    for name in built_in(kind):
        options = getattr(plugins.load(kind, name), model)
        if options.model_fields:
            tables.setdefault(table(options), []).append(name)
        else:
            without.append(name)
    parts = [f"Keys of `{key}`, by {kind.removesuffix('s')}."]
    if without:
        parts.append(f"Without options: {', '.join(f'`{name}`' for name in without)}.")
    for text, names in tables.items():
        parts.append(f"{', '.join(f'`{name}`' for name in names)}:\n\n{text}")
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    parts = [START.rstrip()]
    for heading, *about in PARTS:
        parts.append(f"## {heading}")
        parts.append(plugin_tables(*about) if len(about) > 1 else table(about[0]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")

"""params.yaml -> one frozen, strict model per section. Wrong keys, types and ranges are refused by name, in one line.

Each stage and each plug-in declares its own `Section`, so a new option of one stage re-runs no other.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml

from pipeline import plugins
from pipeline.errors import UserError, nearest


class Section(pydantic.BaseModel):
    """Base of all parameter models: frozen, no unknown keys, no silent conversion."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def within(low: float, high: float) -> pydantic.AfterValidator:
    """A validator: the number must lie in [low, high]."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"must lie in [{low:g}, {high:g}]")
        return value

    return pydantic.AfterValidator(check)


def above(low: float) -> pydantic.AfterValidator:
    """A validator: the number must be greater than `low`."""

    def check(value: float) -> float:
        if not value > low:
            raise ValueError(f"must be greater than {low:g}")
        return value

    return pydantic.AfterValidator(check)


def at_least(low: int) -> pydantic.AfterValidator:
    """A validator: the number must be at least `low`."""

    def check(value: float) -> float:
        if not value >= low:
            raise ValueError(f"must be at least {low}")
        return value

    return pydantic.AfterValidator(check)


def plugin(kind: str) -> pydantic.AfterValidator:
    """A validator: the string must name a plug-in of `kind`."""

    def check(value: str) -> str:
        try:
            plugins.check(kind, value)
        except UserError as error:
            raise ValueError(str(error)) from None
        return value

    return pydantic.AfterValidator(check)


def _distinct(values: list[Any]) -> list[Any]:
    if not values or len(set(values)) != len(values):
        raise ValueError("must be a list of one or more different values")
    return values


DISTINCT = pydantic.AfterValidator(_distinct)

Ratio = Annotated[float, within(0, 1)]
Positive = Annotated[float, above(0)]
Count = Annotated[int, at_least(1)]
NonNegative = Annotated[float, at_least(0)]
Seed = Annotated[int, within(0, 2**32 - 1)]

S = TypeVar("S", bound=Section)

MAX_NODES = 100_000  # of a parameter file
MAX_DIGITS = 300  # of a whole number; more is no number of ours, and Python neither prints nor converts the longest
TEXT_LIMIT = 400


def build(model: type[S], where: str, values: Any) -> S:
    """`values` (the section called `where`) as a `model`. Raises UserError naming the first wrong key."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a mapping of keys; got {values!r}")
    try:
        return model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        # An unknown key is reported first: it is usually the misspelt name of one that is then missing.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise UserError(_line(model, where, errors[0])) from None


def _line(model: type[pydantic.BaseModel], where: str, error: Any) -> str:
    path = where
    for part in error["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    got = error["input"]
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        hint = nearest(str(error["loc"][-1]), known) or f" (known: {', '.join(known)})"
        return f"{path}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{path}: missing; add it (h2t presets shows complete files)"
    if error["type"] == "value_error":
        return f"{path}: {error['ctx']['error']}; got {_short(got)}"
    text = error["msg"][0].lower() + error["msg"][1:]
    return f"{path}: {text.replace('input should be', 'must be')}; got {_short(got)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(model: type[pydantic.BaseModel], loc: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(part, str) and isinstance(current, type) and issubclass(current, pydantic.BaseModel):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
    if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
        return list(current.model_fields)
    return []


class _Loader(yaml.SafeLoader):
    """YAML as DVC reads it: `1e-3` is a number, and a key that stands twice is an error.

    An alias counts as all that it stands for, so that a few lines cannot mean billions.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node: yaml.Node | None = super().compose_node(parent, index)
        if isinstance(node, yaml.CollectionNode) and id(node) not in self._sizes:
            if alias:
                raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", node.start_mark)
            inside = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
            size = 1 + sum(self._sizes.get(id(part), 1) for part in inside)
            if size > MAX_NODES:
                raise yaml.composer.ComposerError(
                    None, None, f"more than {MAX_NODES} values, aliases counted as what they stand for", node.start_mark
                )
            self._sizes[id(node)] = size
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As written, before `<<` merges: a merged key may be overridden."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", node.start_mark)
            seen.add(name)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Numbers that can also be printed, and computed with as fractions."""
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number of too many digits", node.start_mark)
        number: int = super().construct_yaml_int(node)
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parsed(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with the reason in one line."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:  # in words only: its own text quotes a piece, which may be that of a URL
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{error.problem or error.context}{where}"[:TEXT_LIMIT]) from None
    # For tags and dates that do not fit, PyYAML's constructors fail in whatever way they fail.
    except (
        yaml.YAMLError,
        ValueError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        RecursionError,
    ) as error:
        raise ValueError(" ".join(str(error).split())[:TEXT_LIMIT]) from None


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters in `path` with `key.sub=value` overrides (YAML values) applied. Raises UserError."""
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such parameter file; pass --params FILE") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of sections; got {_short(values)}")
    for override in overrides:
        apply(values, override)
    return values


def assignment(option: str, text: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML. Raises UserError in the name of the command line's `option`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {text}: must read key=value")
    try:
        return key, _parsed(value)
    except ValueError as error:
        raise UserError(f"{option} {text}: the value is not YAML ({error})") from None


def apply(values: dict[str, Any], override: str) -> None:
    """Sets `key.sub=value`, the value read as YAML. Raises UserError, also for a section that is not there."""
    key, value = assignment("--set", override)
    *parents, last = key.split(".")
    at: Any = values
    for i, part in enumerate(parents):
        if not isinstance(at, dict) or not isinstance(at.get(part), dict):
            known = list(at) if isinstance(at, dict) else []
            raise UserError(f"--set {override}: no section {'.'.join(parents[: i + 1])!r}{nearest(part, known)}")
        at = at[part]
    at[last] = value


def section(values: Mapping[str, Any], name: str) -> Any:
    """The raw section `name`, dotted for an entry of a mapping. Raises UserError if it is not there."""
    at: Any = values
    for part in name.split("."):
        if not isinstance(at, Mapping) or part not in at:
            known = list(map(str, at)) if isinstance(at, Mapping) else []
            raise UserError(f"params: no section {name!r}{nearest(part, known)} (there are: {', '.join(known)})")
        at = at[part]
    return at

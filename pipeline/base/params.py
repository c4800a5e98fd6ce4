"""Parsing params.yaml into one frozen, strict model per section. Errors name the wrong key, type or range in one line.

Each stage and each plug-in declares its own `Section`, so a new option of one stage reruns no other stage.
"""

import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import pydantic

from h2t.pipeline.base import plugins, strict_yaml
from h2t.pipeline.base.errors import UserError, nearest

FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_SMALLEST = 1.1754943508222875e-38  # the smallest normal number above 0
INT64_MAX = 2**63 - 1
MOST = 1e18  # largest constant; the product of two still fits float32


def _representable(value: Any) -> Any:
    """Returns `value` unchanged. Raises ValueError if a number in it does not fit float32 or int64, or a text UTF-8."""
    if isinstance(value, list | tuple):
        for part in value:
            _representable(part)
    elif isinstance(value, int) and not -INT64_MAX - 1 <= value <= INT64_MAX:
        raise ValueError("must be a whole number of at most 64 bits")
    elif isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
        raise ValueError(f"must fit float32, at most {FLOAT32_MAX:.3g}")
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("must be text without halves of characters (\\ud800 to \\udfff), which no file can hold")
    return value


class Section(pydantic.BaseModel):
    """Base of all parameter models: frozen, no unknown keys, no type conversion, no number beyond float32 or int64.

    Fields state their valid range by the types below.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        return _representable(value)


@dataclass(frozen=True)
class Bounds:
    """A check that a number lies between `low` and `high`, and is not `low` itself if `exclusive`; else ValueError."""

    said: str
    low: float = -math.inf
    high: float = math.inf
    exclusive: bool = False

    def __call__(self, value: float) -> float:
        if not self.low <= value <= self.high or (self.exclusive and value == self.low):
            raise ValueError(f"must {self.said}")
        return value


def within(low: float, high: float) -> pydantic.AfterValidator:
    """A validator: the number must lie in [low, high]."""
    return pydantic.AfterValidator(Bounds(f"lie in [{low:g}, {high:g}]", low, high))


def above(low: float) -> pydantic.AfterValidator:
    """A validator: the number must be greater than `low`."""
    return pydantic.AfterValidator(Bounds(f"be greater than {low:g}", low, exclusive=True))


def at_least(low: int) -> pydantic.AfterValidator:
    """A validator: the number must be at least `low`."""
    return pydantic.AfterValidator(Bounds(f"be at least {low}", low))


def at_most(high: float) -> pydantic.AfterValidator:
    """A validator: the number must be at most `high`."""
    most = str(high) if isinstance(high, int) else f"{high:g}"
    return pydantic.AfterValidator(Bounds(f"be at most {most}", high=high))


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
Positive = Annotated[float, above(0), within(FLOAT32_SMALLEST, MOST)]
NonNegative = Annotated[float, at_least(0), at_most(MOST)]
Beta = Annotated[float, within(0, 0.999999)]  # of weights by the effective number of samples, which are 0 / 0 at 1
Real = Annotated[float, within(-MOST, MOST)]
Rate = Annotated[Positive, at_most(1e6)]  # a learning rate
Index = Annotated[int, at_least(0), at_most(INT64_MAX)]
Count = Annotated[int, at_least(1), at_most(2**31 - 1)]
Bytes = Annotated[int, at_least(1), at_most(INT64_MAX)]
Epochs = Annotated[Count, at_most(1_000_000)]
Experts = Annotated[Count, at_most(1000)]
Side = Annotated[Count, at_most(16_384)]  # of an image, in pixels
Seed = Annotated[int, within(0, 2**32 - 1)]

S = TypeVar("S", bound=Section)

INPUTS = "inputs/"  # prefix of a path that refers to an entry of the section `inputs`
NAME_FILES = ("prepare", "backbones", "extract", "hosts")  # sections whose parameters may name files

#: Sections that a parameter file may leave out.
OPTIONAL = (
    "inputs",
    "backbone_defaults",
    "extract",
    "pool",
    "host_defaults",
    "train_classifier",
    "evaluate",
    "report",
    "run",
)


def build(model: type[S], where: str, values: Any) -> S:
    """`values`, the section called `where`, as an instance of `model`. Raises UserError for the first wrong key."""
    if errors := _errors(model, where, values):
        raise UserError(_line(model, where, values, errors[0]))
    return model.model_validate(dict(values))


def check_partial(model: type[Section], where: str, values: Any) -> None:
    """Raises UserError for the first wrong key in `values`. Required keys of `model` may be missing."""
    for error in _errors(model, where, values):
        if error["type"] != "missing" or len(error["loc"]) > 1:
            raise UserError(_line(model, where, values, error))


def _errors(model: type[Section], where: str, values: Any) -> list[Any]:
    """The validation errors of `values`, unknown keys first: one is often the misspelt name of a missing key."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a mapping of keys; got {values!r}")
    try:
        model.model_validate(dict(values))
    except pydantic.ValidationError as error:
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        paths = [_keys(values, e) for e in found]
        # Where a key has several forms, each form has its own error; one that lies deeper is about the form in use.
        return [e for e, path in zip(found, paths, strict=True) if not any(_inside(p, path) for p in paths)]
    return []


def _keys(values: Any, error: Any) -> list[int | str]:
    """The keys and positions that lead to `error` in `values`: its `loc` without the names of the forms of a key."""
    found: list[int | str] = []
    at = values
    for part in error["loc"]:
        here = range(len(at)) if isinstance(at, list) else at if isinstance(at, Mapping) else ()
        if part in here:
            found.append(part)
            at = at[part]
    return [*found, error["loc"][-1]] if error["type"] == "missing" else found


def _inside(path: Sequence[int | str], other: Sequence[int | str]) -> bool:
    """Whether `path` leads to something inside what `other` leads to."""
    return len(path) > len(other) and list(path[: len(other)]) == list(other)


def merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` overridden by `own`. Mappings are merged key by key; lists are replaced as a whole."""
    result = dict(defaults)
    for key, value in own.items():
        default = result.get(key)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            value = merged(default, value)
        result[key] = value
    return result


def _line(model: type[pydantic.BaseModel], where: str, values: Any, error: Any) -> str:
    path = where
    for part in _keys(values, error):
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    got = error["input"]
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        hint = nearest(str(error["loc"][-1]), known) or f" (known: {', '.join(known) or 'none'})"
        return f"{path}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{path}: missing; add it (h2t presets lists complete files)"
    if error["type"] == "value_error":
        text = str(error["ctx"]["error"])
        named = isinstance(got, str) and repr(got) in text  # an unknown plug-in is named already
        return f"{path}: {text}" if named else f"{path}: {text}; got {_short(got)}"
    rule = re.sub(r"^\w+ should ", "must ", error["msg"]).partition(" after validation")[0]
    return f"{path}: {rule[0].lower()}{rule[1:]}; got {_short(got)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys_at(model: type[pydantic.BaseModel], loc: Sequence[int | str]) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(part, str) and isinstance(current, type) and issubclass(current, pydantic.BaseModel):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        elif get_origin(current) in (Union, types.UnionType):
            current = next((form for form in get_args(current) if getattr(form, "__name__", None) == part), None)
    if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
        return list(current.model_fields)
    return []


def load(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The parameters in `path`, with the overrides `key.sub=value` applied; values are YAML.

    Raises UserError if the file is missing or is not a YAML mapping, or if an override is not valid.
    """
    try:
        values = strict_yaml.parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such parameter file; change to the folder of the project, or pass --params FILE"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: must be a readable YAML file ({error}); fix it, or pass --params FILE") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of sections; got {_short(values)}")
    for override in overrides:
        apply(values, override)
    known = values.get("inputs") or {}
    if not isinstance(known, Mapping) or not all(isinstance(p, str) and p.strip() for p in known.values()):
        raise UserError("inputs: must map names to files or folders, such as inputs: {images: photos}")
    for name, place in known.items():
        if place.startswith("~"):
            raise UserError(f"inputs.{name}: DVC does not know ~; write {Path(place).expanduser()} in its place")
        check_path(f"inputs.{name}", place)
    return {k: _located(v, k, known) if k in NAME_FILES else v for k, v in values.items()}


def check_path(where: str, path: str | Path) -> None:
    """Raises UserError for a path that DVC takes for a pattern to fill in. Names below it may have braces."""
    if set("{}") & set(str(path)):
        raise UserError(f"{where}: DVC cannot work where a path has {{ or }}; got {path}; rename the folder")


def _located(value: Any, where: str, known: Mapping[str, str]) -> Any:
    """`value` with absolute paths for each `inputs/NAME/...` and `~/...`. Raises UserError for an unknown NAME."""
    if isinstance(value, Mapping):
        return {k: _located(v, f"{where}.{k}", known) for k, v in value.items()}
    if isinstance(value, list):
        return [_located(v, f"{where}[{i}]", known) for i, v in enumerate(value)]
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    if not isinstance(value, str) or not value.startswith(INPUTS):
        return value
    name, _, inside = value.removeprefix(INPUTS).partition("/")
    if name not in known:
        raise UserError(
            f"{where}: no input {name!r}{nearest(name, known)}; add its path to the section `inputs`: "
            f"inputs: {{{name or 'images'}: PATH}}"
        )
    return os.path.abspath(os.path.join(known[name], inside))  # noqa: PTH100, PTH118 - keeps links


def assignment(option: str, text: str) -> tuple[str, Any]:
    """Splits `key=value`; the value is YAML. Raises UserError that names the command-line `option`."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{option} {text}: must have the form key=value")
    try:
        return key, strict_yaml.parsed(value)
    except ValueError as error:
        raise UserError(f"{option} {text}: the value must be YAML ({error})") from None


def apply(values: dict[str, Any], override: str) -> None:
    """Sets `key.sub=value`, the value read as YAML. A section that may be left out need not be there.

    Raises UserError for any other section that is not there.
    """
    key, value = assignment("--set", override)
    *parents, last = key.split(".")
    at: Any = values
    for i, part in enumerate(parents):
        if isinstance(at, dict) and part not in at and _may_be_left_out(parents[: i + 1]):
            at[part] = {}
        if not isinstance(at, dict) or not isinstance(at.get(part), dict):
            known = list(at) if isinstance(at, dict) else []
            raise UserError(f"--set {override}: no section {'.'.join(parents[: i + 1])!r}{nearest(part, known)}")
        at = at[part]
    at[last] = value


def _may_be_left_out(path: Sequence[str]) -> bool:
    """Whether a parameter file need not hold the section at `path`.

    Sections inside a backbone or host have defaults, and a wrong name there is found when it is checked. The names of
    backbones and hosts are the user's, so an unknown one is a slip.
    """
    if len(path) == 1:
        return path[0] in OPTIONAL
    return (path[0] in ("backbones", "hosts") and len(path) > 2) or path[0] in ("backbone_defaults", "host_defaults")


def section(values: Mapping[str, Any], name: str) -> Any:
    """The unchecked section `name`; `a.b` is entry b of section a. Raises UserError if it does not exist."""
    at: Any = values
    for part in name.split("."):
        if not isinstance(at, Mapping) or part not in at:
            known = list(map(str, at)) if isinstance(at, Mapping) else []
            raise UserError(f"params: no section {name!r}{nearest(part, known)} (there are: {', '.join(known)})")
        at = at[part]
    return at

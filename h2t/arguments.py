"""What is given from Python, as the plain values that everything else takes; or one line that says what is wrong."""

import errno
import os
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.text import counted

TIMES = ("m", "M")  # kinds of NumPy's times, which `tolist` makes whole numbers


def plain(given: Any) -> Any:
    """`given` with the numbers and columns of NumPy, pandas, PyArrow and torch as Python's, inside mappings too."""
    if isinstance(given, Mapping):
        return {key: plain(value) for key, value in given.items()}
    if isinstance(given, list | tuple | range):
        return [plain(value) for value in given]
    if getattr(getattr(given, "dtype", None), "kind", None) in TIMES:
        return list(given) if np.ndim(given) else given
    values = getattr(given, "to_pylist", None) or getattr(given, "tolist", None)
    return values() if callable(values) and not isinstance(given, type) else given


def column(name: str, given: Any, rows: int) -> list[Any] | None:
    """`given` as a list of one value for each row; None if it is None. Raises UserError for anything else.

    Lists, iterators, and columns of NumPy, pandas, PyArrow and torch are taken.
    """
    if given is None:
        return None
    if isinstance(given, str | bytes | Mapping | Set) or not isinstance(given, Iterable):
        raise UserError(f"{name}: must be a list of one value for each row; got {type(given).__name__}")
    shape = getattr(given, "shape", (0,))
    if len(shape) != 1:
        raise UserError(f"{name}: must be one column; got shape {tuple(shape)}; give one value for each row")
    known = plain(given)
    values = [plain(value) for value in (known if isinstance(known, Iterable) else given)]
    if len(values) != rows:
        raise UserError(f"{name}: must have one value for each of {counted(rows, 'row')}; got {len(values)}")
    for row, value in enumerate(values):
        if isinstance(value, bytes) or (isinstance(value, Iterable) and not isinstance(value, str)):
            raise UserError(f"{name}: must be one text or number for each row; row {row} has {value!r:.60}")
        if isinstance(value, str) and not _storable(value):
            raise UserError(f"{name}: row {row} has {value!r:.60}, which no file can hold as text; correct it")
    return values


def _storable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def sources(given: Any, rows: int) -> list[str] | None:
    """The name of each row as text; None if there are none. Raises UserError where they are not distinct."""
    values = column("source", given, rows)
    if values is None:
        return None
    if unnamed := [row for row, value in enumerate(values) if pd.isna(value) or value == ""]:
        raise UserError(f"source: must name each row; row {unnamed[0]} has no name; number the rows")
    names = [str(value) for value in values]
    if len(set(names)) != len(names):
        raise UserError(
            f"source: must be a distinct name for each of {counted(rows, 'row')}; got {len(set(names))}; number them"
        )
    return names


def place(name: str, given: Any) -> Path:
    """`given` as a path. Raises UserError for what no file can be called."""
    try:
        path = Path(given)
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{name}: must be a path; got a name of {len(str(given))} characters") from None
    except (TypeError, ValueError):
        raise UserError(f"{name}: must be a path; got {given!r:.60}") from None
    if not os.fspath(given):
        raise UserError(f"{name}: must be a path; got an empty text; . is the folder that you are in")
    return path


def whole(name: str, given: Any) -> int:
    """`given` as a whole number, at least 1. Raises UserError."""
    value = plain(given)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: must be a whole number, at least 1; got {value!r:.60}")
    return value


def text(name: str, given: Any) -> str | None:
    """`given`, a text or None. Raises UserError for anything else."""
    if given is not None and not isinstance(given, str):
        raise UserError(f"{name}: must be a text; got {given!r:.60}")
    return given


def keys(name: str, given: Any) -> dict[str, Any]:
    """`given`, a mapping or None, as a dictionary. Raises UserError for anything else."""
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{name}: must be a mapping of keys; got {given!r:.60}")
    return dict(given or {})


def share(given: Any) -> Any:
    """What is held out, without what asks for none: None, False and 0."""
    value = plain(given)
    return None if isinstance(value, int | float | Decimal) and not value else value

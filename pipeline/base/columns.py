"""Arrow columns from numbers and texts. Arrow's own `array` imports pandas where it is installed, which takes 0.3 s."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def column(values: Sequence[Any]) -> pa.Array:
    """As `pa.array(values)`: int64, float64 or string; `pa.array` itself makes all other columns."""
    kinds = set(map(type, values))
    if kinds == {str}:
        texts = [text.encode() for text in values]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
    if kinds in ({int}, {float}, {int, float}):
        kind, of_numpy = (pa.int64(), np.int64) if kinds == {int} else (pa.float64(), np.float64)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.array(values, of_numpy))])
    return pa.array(values)

"""The row table: which image, view and batch-norm statistics each cache row holds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CacheError

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        pa.field("statistics", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
    ]
)
ORDER = [(name, "ascending") for name in ("split", "statistics", "label", "source", "view")]
SPLITS = ("train", "val", "test")


def make_rows(columns: Mapping[str, Sequence[Any] | pa.Array]) -> pa.Table:
    """The row table of `columns` (all of the schema's but `row`), in cache order, so each class is one run of rows.

    Raises CacheError `spec` for an unknown split, a negative label or two rows of the same identity.
    """
    fields = [f for f in SCHEMA if f.name != "row"]
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in fields}, pa.schema(fields)).sort_by(ORDER)
    table = table.add_column(0, SCHEMA.field("row"), pa.array(range(len(table)), pa.int64()))
    _check(table)
    return table


def _check(table: pa.Table) -> None:
    splits = set(table["split"].unique().to_pylist())
    if not splits <= set(SPLITS):
        raise CacheError("spec", f"row table: split must be one of {', '.join(SPLITS)}; got {sorted(splits)}")
    if len(table) and table["label"].to_numpy().min() < 0:
        raise CacheError("spec", "row table: labels must be at least 0")
    identity = ["split", "statistics", "source", "view"]
    if len(table.group_by(identity).aggregate([])) != len(table):
        raise CacheError("spec", "row table: two rows have the same split, statistics, source and view")


def to_bytes(table: pa.Table) -> bytes:
    """`rows.parquet`; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd", write_statistics=True)
    return sink.getvalue()


def from_bytes(data: bytes, expected_rows: int) -> pa.Table:
    """The row table in `data`; CacheError `damaged` if it is no row table of `expected_rows` rows."""
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()  # `read_table` imports Arrow datasets, 0.2 s
    except (pa.ArrowException, OSError) as error:
        raise CacheError("damaged", f"rows.parquet: unreadable ({' '.join(str(error).split())})") from None
    if table.schema.remove_metadata() != SCHEMA:
        raise CacheError("damaged", "rows.parquet: columns differ from format 1")
    numbers = table["row"].combine_chunks()
    # `to_numpy` imports pandas where it is installed, 0.2 s.
    if numbers.null_count or not np.array_equal(np.from_dlpack(numbers), np.arange(expected_rows)):
        raise CacheError("damaged", f"rows.parquet: must number rows 0 to {expected_rows - 1}; it does not")
    return table

"""The row table: which image, view and batch-norm statistics each row of a cache holds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.cache.errors import CacheError
from h2t.cache.memory import available_memory

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
TEXTS = [field.name for field in SCHEMA if field.type == pa.string()]
ROW_BYTES = sum(4 if field.type == pa.string() else field.type.bit_width // 8 for field in SCHEMA)  # without its texts
FEW_ROWS = 10_000  # one thread reads these faster than a second one starts
SPLITS = ("train", "val", "test")


def make_rows(columns: Mapping[str, Sequence[Any] | pa.Array]) -> pa.Table:
    """The row table of `columns` (all columns of `SCHEMA` except `row`), sorted into cache order and numbered.

    In cache order the rows of a class are consecutive (format rule 3.2). Raises CacheError `spec` for an unknown
    split, a negative label, or two rows with the same split, statistics, source and view.
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
        raise CacheError("spec", f"row table: labels must be at least 0; got {table['label'].to_numpy().min()}")
    identity = ["split", "statistics", "source", "view"]
    if len(table.group_by(identity).aggregate([])) != len(table):
        raise CacheError("spec", "row table: two rows have the same split, statistics, source and view")


def to_bytes(table: pa.Table) -> bytes:
    """The table as `rows.parquet`; the same table gives the same bytes."""
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(None), sink, compression="zstd", write_statistics=True)
    return sink.getvalue()


def from_bytes(data: bytes, expected_rows: int) -> pa.Table:
    """The row table in `data`, the bytes of `rows.parquet`.

    Raises CacheError `damaged` unless it is a valid row table of `expected_rows` rows, and `full` if it would not fit
    into memory: a file of a few kilobytes can expand to billions of equal rows.
    """
    try:
        source = pa.BufferReader(data)
        file = pq.ParquetFile(source)  # `read_table` imports Arrow datasets, 0.2 s
        if file.schema_arrow.remove_metadata() != SCHEMA:
            raise CacheError("damaged", "rows.parquet: columns differ from format 1")
        misnumbered = CacheError("damaged", f"rows.parquet: must number rows 0 to {expected_rows - 1}; it does not")
        if file.metadata.num_rows != expected_rows:
            raise misnumbered
        _check_memory(expected_rows * ROW_BYTES)
        # Dictionaries hold each distinct text once, however often it occurs.
        table = pq.ParquetFile(source, metadata=file.metadata, read_dictionary=TEXTS).read(
            use_threads=expected_rows > FEW_ROWS
        )
        if len(table) != expected_rows or any(column.null_count for column in table.columns):
            raise misnumbered
        _check_memory(expected_rows * ROW_BYTES + sum(_text_bytes(table[name]) for name in TEXTS))
        table = table.cast(SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheError("damaged", f"rows.parquet: cannot be read ({' '.join(str(error).split())})") from None
    # `to_numpy` imports pandas where it is installed, 0.2 s.
    row, *others = (np.from_dlpack(table[name].combine_chunks()) for name in ("row", "sample", "view", "label"))
    if not np.array_equal(row, np.arange(expected_rows)):
        raise misnumbered
    if any(numbers.min() < 0 for numbers in others):
        raise CacheError("damaged", "rows.parquet: samples, views and labels must be at least 0")
    return table


def _check_memory(need: int) -> None:
    if need > available_memory():
        raise CacheError("full", f"rows.parquet: would take {need / 1e9:.1f} GB of memory, more than there is free")


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a dictionary-encoded column once it is decoded."""
    import pyarrow.compute as pc  # takes longer to import than this package

    lengths = (pc.take(pc.binary_length(chunk.dictionary), chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(each).as_py() or 0 for each in lengths)

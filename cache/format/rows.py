"""The row table: which image, view and batch-norm statistics each row of a cache holds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.cache.errors import CacheError
from h2t.cache.memory import available_memory
from h2t.cache.sizes import sized

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
NUMBERS = ("row", "sample", "view", "label")
BATCH_ROWS = 2**16  # of a table that is read piece by piece
BUFFER_BYTES = 2**20  # of a column read at a time
GROUP_ROWS = 2**20  # rows of a row group in the file
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
    check_values(table)
    identity = ["split", "statistics", "source", "view"]
    if len(table.group_by(identity).aggregate([])) != len(table):
        raise _ambiguous()
    return table


def check_values(table: pa.Table) -> None:
    """Raises CacheError `spec` for an unknown split or a negative label in the columns `split` and `label`."""
    splits = set(table["split"].unique().to_pylist())
    if not splits <= set(SPLITS):
        raise CacheError("spec", f"row table: split must be one of {', '.join(SPLITS)}; got {sorted(splits)}")
    least = min((np.from_dlpack(chunk).min(initial=0) for chunk in table["label"].iterchunks()), default=0)
    if least < 0:
        raise CacheError("spec", f"row table: labels must be at least 0; got {least}")


def check_sources(table: pa.Table) -> None:
    """Raises CacheError `spec` if two lines of a table of samples have the same split and source.

    In 8 bytes of memory a line: equal texts have equal hashes, and only where hashes are equal texts are compared.
    """
    hashes, at = np.empty(len(table), np.int64), 0
    for pairs in _pairs(table):
        hashes[at : at + len(pairs)] = [hash(pair) for pair in pairs]
        at += len(pairs)
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: set[tuple[str, str]] = set()
    for pair in (pair for pairs in _pairs(table) for pair in pairs if twice and hash(pair) in twice):
        if pair in seen:
            raise _ambiguous()
        seen.add(pair)


def _pairs(table: pa.Table) -> Iterator[list[tuple[str, str]]]:
    """Split and source of the lines of a table, batch by batch."""
    for batch in table.select(["split", "source"]).to_batches(max_chunksize=BATCH_ROWS):
        yield list(zip(batch["split"].to_pylist(), batch["source"].to_pylist(), strict=True))


def _ambiguous() -> CacheError:
    return CacheError("spec", "row table: two rows have the same split, statistics, source and view")


def write_table(groups: Iterable[pa.Table], sink: BinaryIO) -> None:
    """Writes a row table, given in pieces of `GROUP_ROWS` rows, as `rows.parquet`; equal tables give equal bytes."""
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_statistics=True) as file:
        for group in groups:
            file.write_table(group.replace_schema_metadata(None).combine_chunks(), row_group_size=GROUP_ROWS)


def groups_of(table: pa.Table) -> Iterator[pa.Table]:
    """The table in pieces of `GROUP_ROWS` rows."""
    return (table.slice(start, GROUP_ROWS) for start in range(0, len(table), GROUP_ROWS))


def read_table(source: BinaryIO | pa.NativeFile, expected_rows: int) -> pa.Table:
    """The whole row table in `source`, the file `rows.parquet`; about 130 bytes of memory a row.

    Raises CacheError `damaged` unless it is a valid row table of `expected_rows` rows, and `full` if it would not fit
    into memory: a file of a few kilobytes can expand to billions of equal rows.
    """
    with _readable():
        file = _opened(source, expected_rows)
        check_memory(expected_rows * ROW_BYTES)
        # Dictionaries hold each distinct text once, however often it occurs. A thread of Arrow that holds a Python
        # object when a short command ends may abort it (apache/arrow, issue 34314), so few rows are read without any.
        many = expected_rows > FEW_ROWS
        table = pq.ParquetFile(source, metadata=file.metadata, read_dictionary=TEXTS, pre_buffer=many).read(
            use_threads=many
        )
        if len(table) != expected_rows or any(column.null_count for column in table.columns):
            raise _misnumbered(expected_rows)
        check_memory(expected_rows * ROW_BYTES + sum(_text_bytes(table[name]) for name in TEXTS))
        table = table.cast(SCHEMA)
        table.validate(full=True)
    _check_numbers((table[name].combine_chunks() for name in NUMBERS), 0, expected_rows)
    return table


def read_batches(
    source: BinaryIO | pa.NativeFile,
    expected_rows: int,
    columns: Sequence[str] = SCHEMA.names,
    *,
    short: bool = False,
    rows: np.ndarray | None = None,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """`columns` of the row table in `source`, as (first row, batch of at most `BATCH_ROWS` rows).

    One batch at a time is in memory. `short` reads texts as dictionaries, which is best for columns with few distinct
    ones. With `rows`, int64 ascending, row groups without any of these rows are left out. Raises CacheError `damaged`
    as `read_table`.
    """
    wanted = [*dict.fromkeys([*NUMBERS, *columns])]
    with _readable():
        metadata = _opened(source, expected_rows).metadata
        file = pq.ParquetFile(
            source, metadata=metadata, read_dictionary=TEXTS if short else None, buffer_size=BUFFER_BYTES
        )
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        ends = np.cumsum([0, *sizes])
        if ends[-1] != expected_rows:
            raise _misnumbered(expected_rows)
        for group, (at, end) in enumerate(pairwise(ends.tolist())):
            if rows is not None and np.searchsorted(rows, at) == np.searchsorted(rows, end):
                continue
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                if any(column.null_count for column in batch.columns):
                    raise _misnumbered(expected_rows)
                batch.validate(full=True)
                _check_numbers((batch[name] for name in NUMBERS), at, expected_rows)
                yield at, batch.select(columns)
                at += len(batch)
            if at != end:
                raise _misnumbered(expected_rows)


def read_rows(
    source: BinaryIO | pa.NativeFile, expected_rows: int, rows: np.ndarray, columns: Sequence[str] = SCHEMA.names
) -> pa.Table:
    """The lines of `rows`, int64 (n,), in this order, from the table in `source`. Raises as `read_batches`."""
    wanted, places = np.unique(rows, return_inverse=True)
    parts = []
    for at, batch in read_batches(source, expected_rows, columns, rows=wanted):
        first, last = np.searchsorted(wanted, [at, at + len(batch)])
        parts.append(batch.take(_as_arrow(wanted[first:last] - at)))
    return pa.Table.from_batches(parts, pa.schema([SCHEMA.field(name) for name in columns])).take(_as_arrow(places))


def _as_arrow(numbers: np.ndarray) -> pa.Array:
    """int64 `numbers` (n,) as an Arrow array; `pa.array` imports pandas where it is installed, 0.2 s."""
    return pa.Int64Array.from_buffers(
        pa.int64(), len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers, np.int64))]
    )


@contextmanager
def _readable() -> Iterator[None]:
    """Turns the errors of reading into CacheError `damaged`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CacheError("damaged", f"rows.parquet: cannot be read ({' '.join(str(error).split())})") from None


def _opened(source: BinaryIO | pa.NativeFile, expected_rows: int) -> pq.ParquetFile:
    """`source` as Parquet, with the columns of format 1 and the expected number of rows."""
    file = pq.ParquetFile(source)  # `read_table` imports Arrow datasets, 0.2 s
    if file.schema_arrow.remove_metadata() != SCHEMA:
        raise CacheError("damaged", "rows.parquet: columns differ from format 1")
    if file.metadata.num_rows != expected_rows:
        raise _misnumbered(expected_rows)
    return file


def _check_numbers(numbers: Iterable[pa.Array], start: int, expected_rows: int) -> None:
    """Raises CacheError `damaged` unless the first of the columns counts on from `start` and none is below 0."""
    # `to_numpy` imports pandas where it is installed, 0.2 s.
    row, *others = (np.from_dlpack(column) for column in numbers)
    if not np.array_equal(row, np.arange(start, start + len(row))):
        raise _misnumbered(expected_rows)
    if any(column.min(initial=0) < 0 for column in others):
        raise CacheError("damaged", "rows.parquet: samples, views and labels must be at least 0")


def _misnumbered(expected_rows: int) -> CacheError:
    return CacheError("damaged", f"rows.parquet: must number rows 0 to {expected_rows - 1}; it does not")


def check_memory(need: int) -> None:
    """Raises CacheError `full` unless `need` bytes of memory are free."""
    if need > available_memory():
        raise CacheError(
            "full", f"rows.parquet: would take {sized(need)} of memory, more than there is free; close other programs"
        )


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Bytes of the texts of a dictionary-encoded column once it is decoded."""
    import pyarrow.compute as pc  # takes longer to import than this package

    lengths = (pc.take(pc.binary_length(chunk.dictionary), chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(each).as_py() or 0 for each in lengths)

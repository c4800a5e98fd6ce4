"""Tables of images in CSV, TSV, JSON Lines and Parquet files: columns as text, with errors that name file and row."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.text import counted
from h2t.pipeline.data.labels import check_text
from h2t.pipeline.data.parquet_files import class_names
from h2t.pipeline.data.texts import PIECE_ROWS
from h2t.pipeline.data.url_files import UrlFile

DELIMITED = (".csv", ".tsv", ".tab")
LINES = (".jsonl", ".ndjson")
ENDINGS = (*DELIMITED, *LINES, ".parquet")
#: Usual names of a column of image paths, most usual first.
PATHS = ("file_name", "filename", "path", "filepath", "file_path", "image_path", "img_path", "file", "image", "img")
Table = Path | UrlFile
BOM = b"\xef\xbb\xbf"
LAST = "\x1e"  # fills a row after the last one, to see whether a quotation mark was left open


def column_names(path: Table) -> list[str]:
    """The columns of the table in `path`. Raises UserError if the file cannot be read."""
    try:
        if path.suffix.lower() == ".parquet":
            return list(_parquet_schema(path).names)
        if path.suffix.lower() in LINES:
            return list(dict.fromkeys(name for row in _objects(path) for name in row))
        return _header(path)
    except (OSError, pa.ArrowException, ValueError, csv.Error) as error:
        raise _unreadable(path, error) from None


class Values(Sequence[Any]):
    """A column of a table. Its values become Python objects only as they are asked for."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        return self._column[row].as_py() if isinstance(row, int) else self._column[row].to_pylist()

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), PIECE_ROWS):
            yield from self[start : start + PIECE_ROWS]


def columns(path: Table, wanted: Sequence[str], label: str | None = None) -> dict[str, Sequence[Any]]:
    """The columns `wanted` of the table in `path`: text from CSV and TSV, the stored values from the other formats.

    Whole numbers with class names in a Parquet file's metadata become these names; names of no column in particular
    are those of the column `label`. Raises UserError for a file that cannot be read, or lacks a column.
    """
    known = column_names(path)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"{path}: no column {name!r}{nearest(name, known)} (there are: {', '.join(known)}); "
                "correct prepare.options"
            )
        if known.count(name) > 1:
            raise UserError(
                f"{path}: column {name!r}: must be there once; got {known.count(name)} columns of this name; rename "
                "or remove the others"
            )
    wanted = list(dict.fromkeys(wanted))
    try:
        if path.suffix.lower() in LINES:
            return _from_lines(path, wanted)
        if path.suffix.lower() in DELIMITED:
            return {name: Values(column) for name, column in _delimited(path, wanted, len(known)).items()}
        table = pq.read_table(_parquet(path), columns=wanted)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, error) from None
    found: dict[str, Sequence[Any]] = {}
    for name in table.column_names:
        values = Values(table[name])
        names = class_names(table.schema, name, labels=label in (None, name))
        found[name] = _named(values, names, f"{path}: column {name!r}") if names else values
    return found


def usual_column(known: Sequence[str], usual: Iterable[str]) -> str | None:
    """The column of `known` whose name is the most usual one, whatever its case and spaces, or None."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in reversed(known)}
    return next((plain[name] for name in usual if name in plain), None)


def bytes_column(path: Table) -> str | None:
    """The column of encoded images in a Parquet file, of several the one of a usual name; None if there is none.

    Raises UserError if the file cannot be read.
    """
    if path.suffix.lower() != ".parquet":
        return None
    stored = [field.name for field in _parquet_schema(path) if _holds_bytes(field.type)]
    return usual_column(stored, PATHS) or (stored[0] if stored else None)


def _holds_bytes(kind: pa.DataType) -> bool:
    """True for a column of bytes, or of structs with a field `bytes`."""
    if pa.types.is_struct(kind):
        return any(part.name == "bytes" and _holds_bytes(part.type) for part in kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def texts(path: Table, name: str, values: Iterable[Any]) -> Iterator[str]:
    """Yields the values of the column `name` as labels.

    Raises UserError with the row, counted from 1, of one that is none.
    """
    return (check_text(value, f"{path}: row {row}, column {name!r}") for row, value in enumerate(values, 1))


def _named(values: Sequence[Any], names: list[str], where: str) -> list[Any]:
    for row, value in enumerate(values, 1):
        if isinstance(value, int) and not 0 <= value < len(names):
            raise UserError(
                f"{where}: row {row}: label {value} has no name: the metadata names {len(names)} classes; "
                "correct the metadata or the labels"
            )
    return [names[value] if isinstance(value, int) else value for value in values]


def _parquet(path: Table) -> Any:
    return path.parquet() if isinstance(path, UrlFile) else path


def _parquet_schema(path: Table) -> Any:
    try:
        return pq.read_schema(_parquet(path))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, error) from None


def _objects(path: Table) -> Iterator[dict[str, Any]]:
    """Yields the objects of JSON Lines. Raises ValueError for a line that holds none.

    pyarrow would make times of texts such as 2026-11-28, and refuse a table for a column that nobody reads.
    """
    for number, line in enumerate(io.BytesIO(_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error.msg}") from None
        except RecursionError:
            raise ValueError(f"line {number} is nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} must be an object in braces")
        yield row


def _from_lines(path: Table, wanted: list[str]) -> dict[str, Sequence[Any]]:
    """The columns `wanted` of JSON Lines, as they are written; None where an object lacks the name."""
    found: dict[str, list[Any]] = {name: [] for name in wanted}
    for row in _objects(path):
        for name, values in found.items():
            values.append(row.get(name))
    return {name: _short(values) for name, values in found.items()}


def _short(values: list[Any]) -> Sequence[Any]:
    """The values in Arrow's memory if all are texts, else as they are. Raises ValueError for half a UTF-16 sign."""
    if all(isinstance(value, str) for value in values):
        return Values(pa.chunked_array([pa.array(values, pa.string())]))
    for value in values:
        if isinstance(value, str):
            value.encode()
    return values


def _header(path: Table) -> list[str]:
    """The first line of a CSV or TSV file that is not empty."""
    with io.TextIOWrapper(io.BytesIO(_text(path)), "utf-8", newline="") as lines:
        names = next((row for row in csv.reader(lines, delimiter=_delimiter(path)) if row), [])
    if any("\n" in name or "\r" in name for name in names):
        raise ValueError("the header opens a quotation mark that its line does not close")
    return names


def _delimited(path: Table, wanted: list[str], width: int) -> dict[str, pa.ChunkedArray]:
    """The columns `wanted` of a CSV or TSV file of `width` columns, as text.

    Raises ValueError if a quotation mark is left open: all lines after it would be one value.
    """
    data, delimiter = _text(path), _delimiter(path)
    odd = data.count(b'"') % 2 == 1
    if odd:
        data += f"\n{delimiter.join([LAST] * width)}\n".encode()
    as_text = dict.fromkeys(wanted, pa.string())
    options = {
        "parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        "convert_options": pa.csv.ConvertOptions(
            include_columns=wanted, column_types=as_text, strings_can_be_null=False
        ),
    }
    try:
        table = pa.csv.read_csv(_native(data), **options)
    except pa.ArrowInvalid:  # one thread and one block know the number of the row, and where a value ends
        whole = pa.csv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, 2**31 - 1))
        table = pa.csv.read_csv(_native(data), whole, **options)
    if odd:
        if table[wanted[0]][-1].as_py() != LAST:
            raise ValueError(f"row {table.num_rows} opens a quotation mark that nothing closes")
        table = table.slice(0, table.num_rows - 1)
    return {name: table[name] for name in wanted}


def joined_lines(path: Table, rows: int) -> list[str]:
    """A note if values of a CSV or TSV file of `rows` rows span lines: stray quotation marks hide rows in them."""
    if path.suffix.lower() not in DELIMITED or b'"' not in (data := _text(path)):
        return []
    lines = sum(bool(line.strip()) for line in data.splitlines()) - 1
    if lines == rows:
        return []
    return [
        f"note: {path}: {counted(lines, 'line')} below the header, but {counted(rows, 'row')}, as values in quotation "
        "marks span lines; if none should, remove a stray quotation mark"
    ]


def _native(data: bytes) -> pa.NativeFile:
    """A file of a copy of `data` that is no Python object.

    Arrow's threads may let go of an object after Python has ended, which ends the process with SIGABRT.
    """
    buffer = pa.allocate_buffer(len(data))
    pa.FixedSizeBufferWriter(buffer).write(data)
    return pa.BufferReader(buffer)


def _delimiter(path: Table) -> str:
    """The sign that the first line of a CSV file has most of; a tab in other files."""
    if path.suffix.lower() != ".csv":
        return "\t"
    first = _text(path).split(b"\n", 1)[0].decode("utf-8", "replace")
    return max((",", ";", "\t"), key=first.count)


def _text(path: Table) -> bytes:
    """The bytes of a text file without a byte order mark. Raises ValueError for another encoding than UTF-8."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError("its encoding is UTF-16; save it as UTF-8")
    data = data.removeprefix(BOM)
    if not data.strip():
        raise ValueError("it is empty")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not UTF-8; save the table as UTF-8") from None
    return data


def _unreadable(path: Table, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such table; correct the path")
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path}: must be a readable table ({reason}); correct the file")

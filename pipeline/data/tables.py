"""Tables of images in CSV, TSV, JSON Lines and Parquet files: columns as text, with errors that name file and row."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from h2t.pipeline.base.errors import UserError, nearest
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


def column_names(path: Table) -> list[str]:
    """The columns of the table in `path`. Raises UserError if the file cannot be read."""
    return _schema(path).names


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


def columns(path: Table, wanted: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The columns `wanted` of the table in `path`: text from CSV and TSV, the stored values from the other formats.

    Whole numbers with class names in a Parquet file's metadata become these names. Raises UserError for a file that
    cannot be read, or lacks a column.
    """
    known = column_names(path)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"{path}: no column {name!r}{nearest(name, known)} (there are: {', '.join(known)}); "
                "correct prepare.options"
            )
    table = _table(path, list(dict.fromkeys(wanted)))
    found: dict[str, Sequence[Any]] = {}
    for name in table.column_names:
        values = Values(table[name])
        names = class_names(table.schema, name) if path.suffix.lower() == ".parquet" else None
        found[name] = _named(values, names, f"{path}: column {name!r}") if names else values
    return found


def usual_column(known: Sequence[str], usual: Iterable[str]) -> str | None:
    """The column of `known` whose name is the most usual one, whatever its case and spaces, or None."""
    plain = {name.strip().lower().replace(" ", "_"): name for name in reversed(known)}
    return next((plain[name] for name in usual if name in plain), None)


def bytes_column(path: Table) -> str | None:
    """The column of encoded images in a Parquet file, or None. Raises UserError if the file cannot be read."""
    if path.suffix.lower() != ".parquet":
        return None
    for field in _schema(path):
        kinds = [field.type]
        if pa.types.is_struct(field.type):
            kinds = [part.type for part in field.type if part.name == "bytes"]
        if any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in kinds):
            return str(field.name)
    return None


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


def _schema(path: Table) -> Any:
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_schema(_parquet(path))
        if path.suffix.lower() in LINES:
            return _lines(path).schema
        with pa.csv.open_csv(io.BytesIO(_text(path)), **_csv(path)) as reader:
            return reader.schema
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, error) from None


def _table(path: Table, wanted: list[str]) -> Any:
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(_parquet(path), columns=wanted)
        if path.suffix.lower() in LINES:
            return _lines(path).select(wanted)
        as_text = {name: pa.string() for name in wanted}
        convert = pa.csv.ConvertOptions(include_columns=wanted, column_types=as_text, strings_can_be_null=False)
        return pa.csv.read_csv(io.BytesIO(_text(path)), **_csv(path), convert_options=convert)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _unreadable(path, error) from None


def _parquet(path: Table) -> Any:
    return path.parquet() if isinstance(path, UrlFile) else path


def _lines(path: Table) -> Any:
    return pa.json.read_json(io.BytesIO(_text(path)))


def _csv(path: Table) -> dict[str, Any]:
    """Options of pyarrow's reader. The delimiter of a CSV file is the sign that its first line has most of."""
    delimiter = "\t"
    if path.suffix.lower() == ".csv":
        first = _text(path).split(b"\n", 1)[0].decode("utf-8", "replace")
        delimiter = max((",", ";", "\t"), key=first.count)
    return {"parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)}


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

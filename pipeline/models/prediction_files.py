"""Writes predictions as they come: CSV, JSON, JSON Lines or Parquet."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import creating, fresh_file

COLUMNS = pa.schema({"image": pa.string(), "rank": pa.int64(), "class": pa.string(), "confidence": pa.float64()})
TEXT = ("csv", "json", "jsonl")
ENDINGS = (*TEXT, "parquet")

Lines = Sequence[dict[str, Any]]
Write = Callable[[Lines], None]


@contextmanager
def as_text(out: TextIO, kind: str) -> Iterator[Write]:
    """A function that writes lines to `out`; `kind` is csv, json (one list) or jsonl (an object a line)."""
    if kind == "csv":
        table = csv.DictWriter(out, COLUMNS.names, lineterminator="\n")
        table.writeheader()
        yield table.writerows
        return
    between = "\n" if kind == "jsonl" else ",\n"
    written = False

    def write(lines: Lines) -> None:
        nonlocal written
        for line in lines:
            out.write((between if written else "") + json.dumps(line, ensure_ascii=False))
            written = True

    out.write("" if kind == "jsonl" else "[\n")
    yield write
    out.write("\n" if kind == "jsonl" else "\n]\n")


def check(path: Path) -> None:
    """Raises UserError unless the ending of `path` is one that is written, and its folder is there."""
    if path.suffix.removeprefix(".") not in ENDINGS:
        raise UserError(
            f"{path}: must end in {', '.join(f'.{kind}' for kind in ENDINGS)}; got {path.suffix or 'no suffix'!r}"
        )
    if path.is_dir() or not path.parent.is_dir():
        what = "a file; got a folder" if path.is_dir() else "in a folder that exists"
        raise UserError(f"{path}: must be {what}; give another path")
    trial = path.with_name(f".{path.name}.trial-{os.getpid()}")  # another process may be writing this path's own
    with creating(path):
        trial.touch()
        trial.unlink()


@contextmanager
def as_file(path: Path) -> Iterator[Write]:
    """A function that writes lines to the file `path`, which appears when the block has succeeded."""
    with fresh_file(path) as partial:
        if path.suffix == ".parquet":
            with pq.ParquetWriter(partial, COLUMNS, compression="zstd") as table:
                yield lambda lines: table.write_table(pa.Table.from_pylist(list(lines), COLUMNS))
        else:
            with partial.open("w", encoding="utf-8", newline="") as out, as_text(out, path.suffix[1:]) as write:
                yield write

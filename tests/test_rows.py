import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_cache, make_rows, raises, table_bytes, table_in
from hypothesis import given
from hypothesis import strategies as st

from h2t.cache.format.rows import SCHEMA

KEYS = ["split", "statistics", "label", "source", "view"]

identities = st.lists(
    st.tuples(
        st.sampled_from(["train", "val", "test"]),
        st.sampled_from(["stage1", "balanced"]),
        st.integers(0, 3),
        st.text(max_size=3),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda t: (t[0], t[1], t[3], t[4]),
)


@given(identities, st.randoms(use_true_random=False))
def test_rows_are_ordered_and_classes_are_runs(wanted, random):
    random.shuffle(wanted)
    table = make_rows(len(wanted), **dict(zip(KEYS, map(list, zip(*wanted, strict=True)), strict=True)))
    found = list(zip(*(table[key].to_pylist() for key in KEYS), strict=True))
    # Arrow orders text by its UTF-8 bytes.
    assert found == sorted(wanted, key=lambda t: (t[0], t[1], t[2], t[3].encode(), t[4]))
    assert table["row"].to_pylist() == list(range(len(wanted)))
    runs = [key for i, key in enumerate(found) if i == 0 or key[:3] != found[i - 1][:3]]
    assert len(runs) == len({key[:3] for key in found})


@pytest.mark.parametrize("count", [1, 2, 11, 5000])
def test_round_trip_and_same_bytes(count):
    table = make_rows(count)
    data = table_bytes(table)
    assert table_in(data, count) == table
    assert table_bytes(make_rows(count)) == data


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"split": ["train", "trian"]}, id="split"),
        pytest.param({"label": [0, -1]}, id="label"),
        pytest.param({"source": ["a", "a"], "view": [0, 0]}, id="same identity"),
        pytest.param({"source": ["a", "a"], "view": [0, 0], "label": [0, 1]}, id="same identity, two labels"),
    ],
)
def test_bad_rows_are_refused(overrides):
    with raises("spec"):
        make_rows(2, **{"split": ["train", "train"], **overrides})


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def renumbered(numbers) -> bytes:
    table = make_rows(3)
    return parquet(table.set_column(0, SCHEMA.field("row"), pa.array(numbers, pa.int64())))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"PAR1" * 9, id="garbage"),
        pytest.param(table_bytes(make_rows(3))[:-9], id="cut"),
        pytest.param(parquet(make_rows(3).drop_columns("digest")), id="column missing"),
        pytest.param(parquet(make_rows(3).append_column("extra", pa.array([1, 2, 3]))), id="column added"),
        pytest.param(table_bytes(make_rows(2)), id="too few"),
        pytest.param(table_bytes(make_rows(4)), id="too many"),
        pytest.param(renumbered([0, 2, 1]), id="order"),
        pytest.param(renumbered([1, 2, 3]), id="from one"),
    ],
)
def test_another_table_is_refused(data):
    with raises("damaged"):
        table_in(data, 3)


def test_types_are_those_of_the_format():
    assert [str(f.type) for f in SCHEMA] == ["int64", "int64", "int16", "string", "string", "int32", "string", "string"]
    assert not any(f.nullable for f in SCHEMA)
    assert np.asarray(make_rows(1)["label"]).dtype == np.int32


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_few_rows_are_read_without_another_thread(cache_dir):
    """A thread of Arrow that held a Python object when `h2t cache info` ended aborted it, with exit code 134."""
    make_cache(cache_dir)
    code = f"""
import os
from h2t.cache.reader import open_cache
before = len(os.listdir("/proc/self/task"))
assert len(open_cache({str(cache_dir)!r}).rows)
assert len(os.listdir("/proc/self/task")) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Row tables read in batches: the index, single lines, order and identities, and draws that stay what they were."""

import io
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import flip, make_cache, make_rows, raises, table_bytes
from pipeline_builders import make_stage2_rows

from h2t.cache import reader
from h2t.cache.format import row_index, rows
from h2t.cache.format.row_index import index_of, read_index
from h2t.cache.reader import open_cache
from h2t.cache.tools.row_order import KEYS, row_fault
from h2t.cache.tools.verify import verify
from h2t.pipeline.base.seeds import permutation, stream
from h2t.pipeline.heads.batches import Streams, sample_rows


def parquet(table, row_group_size=7):
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=row_group_size)
    return pa.BufferReader(sink.getvalue())


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches and row groups that end inside of classes and samples."""
    monkeypatch.setattr(rows, "BATCH_ROWS", 5)


TABLES = {
    "two views": make_rows(53),
    "one view": make_stage2_rows(counts=(9, 4, 1), views=1, test=3),
    "several statistics": make_stage2_rows(counts=(11, 5, 2), views=3, val=2, test=1),
    "one row": make_rows(1),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("of_table", [False, True])
def test_the_index_says_what_the_table_says(table, of_table):
    index = index_of(table) if of_table else read_index(parquet(table), len(table))
    assert index.samples.tolist() == table["sample"].to_pylist()
    assert list(index.views) == sorted(set(table["view"].to_pylist()))
    assert np.repeat(index.labels, np.diff(index.starts)).tolist() == table["label"].to_pylist()
    found = [(p.split, p.statistics) for p in index.parts for _ in range(p.stop - p.start)]
    assert found == list(zip(table["split"].to_pylist(), table["statistics"].to_pylist(), strict=True))
    assert index.splits == sorted(set(table["split"].to_pylist()))
    for part in index.parts:
        labels, starts = index.runs(part)
        own = table.slice(part.start, part.stop - part.start)
        assert np.repeat(labels, np.diff(starts)).tolist() == own["label"].to_pylist()


def test_large_sample_numbers_are_kept():
    table = make_rows(11)
    large = pa.array(np.array(table["sample"]) + 2**40, pa.int64())
    table = table.set_column(1, rows.SCHEMA.field("sample"), large)
    assert read_index(parquet(table), 11).samples.tolist() == large.to_pylist()


@pytest.mark.parametrize("swap", [(0, 52), (3, 4), (4, 5), (20, 45)])
def test_rows_out_of_order_have_no_index(swap):
    """Each row is a class of its own, so that every exchange is one of classes or splits."""
    table = make_rows(53, label=range(53))
    order = np.arange(53)
    order[list(swap)] = order[list(swap)][::-1]
    table = renumbered(table, order)
    with raises("damaged", "not in the order of format 1"):
        read_index(parquet(table), 53)


def test_an_index_that_does_not_fit_is_refused(monkeypatch):
    source = parquet(make_rows(53))
    monkeypatch.setattr(rows, "available_memory", lambda: 4 * 53 - 1)
    with raises("full"):
        read_index(source, 53)
    assert row_index.check_memory is rows.check_memory


@pytest.mark.parametrize("kept", [2**20, 0], ids=["in memory", "in the store"])
def test_a_cache_answers_alike_wherever_its_row_table_lies(cache_dir, monkeypatch, kept):
    monkeypatch.setattr(reader, "KEPT_BYTES", kept)
    table = make_rows(53)
    make_cache(cache_dir, rows=table)
    wanted = [40, 3, 52, 3]
    with open_cache(cache_dir) as cache:
        assert cache.lines(wanted, ["source", "view"]).equals(table.select(["source", "view"]).take(wanted))
        assert cache.index.samples.tolist() == table["sample"].to_pylist()
        assert cache.rows == table
        with raises("out-of-range"):
            cache.lines([53])
    flip(cache_dir / "rows.parquet", 300)
    with open_cache(cache_dir) as cache:
        for question in (lambda: cache.index, lambda: cache.lines([0]), lambda: cache.rows):
            with raises("damaged", r"rows.parquet: sha256 differs from cache.json"):
                question()


def test_a_row_table_replaced_while_it_lies_in_the_store(cache_dir, monkeypatch):
    monkeypatch.setattr(reader, "KEPT_BYTES", 0)
    make_cache(cache_dir, rows=make_rows(53))
    with open_cache(cache_dir) as cache:
        before = cache.lines([0, 1])
        (cache_dir / "rows.parquet").unlink()
        (cache_dir / "rows.parquet").write_bytes(table_bytes(make_rows(54)))
        assert cache.lines([0, 1]) == before  # the file that was opened
        again = pickle.loads(pickle.dumps(cache))
        with again, raises("replaced"):
            again.lines([0])


def fault(table):
    return row_fault(lambda: rows.read_batches(parquet(table), len(table), KEYS), len(table))


def renumbered(table, order):
    numbers = pa.array(range(len(order)), pa.int64())
    return table.take(pa.array(order)).set_column(0, rows.SCHEMA.field("row"), numbers)


def test_a_sound_table_has_no_fault():
    assert [fault(table) for table in TABLES.values()] == [None] * len(TABLES)


@pytest.mark.parametrize("place", [3, 4, 5, 6, 7, 40])
def test_two_rows_exchanged(place):
    order = list(range(53))
    order[place : place + 2] = [place + 1, place]
    assert fault(renumbered(make_rows(53), order)) == "rows are not in the order of format 1"


@pytest.mark.parametrize("of_another_class", [False, True])
def test_a_row_that_is_there_twice(of_another_class):
    """Also under another label, where the two rows are far apart."""
    table = make_rows(53, view=np.zeros(53, np.int16), split=["train"] * 53, source=[f"{i:02}" for i in range(53)])
    where = 45 if of_another_class else 1
    sources = table["source"].to_pylist()
    sources[where] = sources[0]
    at = table.schema.get_field_index("source")
    table = table.set_column(at, rows.SCHEMA.field("source"), pa.array(sources)).sort_by(rows.ORDER)
    table = renumbered(table, range(53))
    assert table["label"][0] != table["label"][52]
    assert fault(table) == "two rows have the same split, statistics, source and view"


def test_an_unknown_split_is_named():
    table = make_rows(3)
    at = table.schema.get_field_index("split")
    table = table.set_column(at, rows.SCHEMA.field("split"), pa.array(["trian"] * 3))
    assert "split must be one of train, val, test; got ['trian']" in fault(table)


def test_verify_says_so(cache_dir):
    make_cache(cache_dir, rows=make_rows(53))
    assert verify(cache_dir) == []


def by_masks(table, split, statistics):
    """First row, views, label and number of each sample, as the table's columns say it."""
    ours = table.filter(pa.array((np.array(table["split"]) == split) & (np.array(table["statistics"]) == statistics)))
    sample, row, label = (np.array(ours[name]) for name in ("sample", "row", "label"))
    starts = np.flatnonzero(np.append(True, sample[1:] != sample[:-1]))
    return row[starts], np.diff(np.append(starts, len(sample))), label[starts], sample[starts]


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some rows"])
def test_samples_are_those_of_the_table(table, some):
    if some:  # as cross-validation takes them
        table = table.filter(pa.array(np.array(table["sample"]) % 3 != 1))
    index = index_of(table)
    for part in index.parts:
        found = sample_rows(table, part.split, part.statistics)
        first, views, labels, samples = by_masks(table, part.split, part.statistics)
        assert found.first.tolist() == first.tolist()
        assert found.views.tolist() == views.tolist()
        assert found.labels.tolist() == labels.tolist()
        assert found.samples.tolist() == samples.tolist()
        assert found.labels_of(np.arange(len(labels))).tolist() == labels.tolist()


@pytest.mark.parametrize("views", [1, 3])
def test_a_batch_is_the_same_from_the_index_and_from_the_table(views):
    table = make_stage2_rows(counts=(40, 11, 3), views=views)
    about = (["a", "b", "c"], "balanced", {"instance": "instance", "balanced": "balanced"}, [0, 1], 8)
    index = read_index(parquet(table), len(table))
    ours, theirs = Streams(index, *about), Streams(table, *about)
    assert np.array_equal(ours.rows, theirs.rows)
    assert ours.count == len(ours.rows)
    assert ours.rows.dtype == np.int64
    for epoch, step in [(0, 0), (0, 3), (2, 1), (0, 0)]:
        mine, other = ours.batch(epoch, step), theirs.batch(epoch, step)
        for name in ("receivers", "labels", "donors", "samples"):
            assert np.array_equal(getattr(mine, name), getattr(other, name))
            assert getattr(mine, name).dtype == np.int64


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 2**17 + 1])
def test_a_small_permutation_is_numpys(size):
    """So an epoch visits the samples in the order it always did."""
    ours, numpys = permutation(stream(3, "donor"), size), stream(3, "donor").permutation(size)
    assert ours.dtype == np.int32
    assert np.array_equal(ours, numpys)

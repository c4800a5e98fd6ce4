"""Rows planned by arithmetic: the table that `make_rows` sorts, piece by piece, in memory that does not grow."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import raises, table_bytes, tree
from pipeline_builders import extracted, make_samples, python

from h2t.cache.format.rows import make_rows, write_table
from h2t.cache.format.spec import canonical_json, sha256
from h2t.pipeline.data import samples as samples_module
from h2t.pipeline.data.samples import SCHEMA, Samples, Texts, load_samples
from h2t.pipeline.extraction.recipes import stored
from h2t.pipeline.extraction.row_plan import planned

RECIPES = ["stage1", "branchwise"]
VIEWS = [1, 2, 5]


def make_table(*, classes=3, of=40, seed=0, **changes):
    """A sample table in the order of `prepare`: random classes, sources with letters outside ASCII."""
    draws = np.random.default_rng(seed)
    lines = sorted(
        (["test", "train", "val"][draws.integers(3)], int(draws.integers(classes)), f"ü/{i:03}.png") for i in range(of)
    )
    columns = {
        name: list(values) for name, values in zip(("split", "label", "source"), zip(*lines, strict=True), strict=True)
    }
    columns |= {"sample": list(range(of)), "digest": [sha256(line[2].encode()) for line in lines], **changes}
    return pa.table([columns[name] for name in SCHEMA.names], SCHEMA)


def expected(table, recipes=RECIPES, views=VIEWS):
    """The rows as one loop over samples, statistics and views makes them."""
    lines = [
        {**sample, "statistics": statistics, "view": view}
        for sample in table.to_pylist()
        for statistics in stored(recipes, sample["split"])
        for view in range(views[sample["label"]] if sample["split"] == "train" else 1)
    ]
    return make_rows({name: [line[name] for line in lines] for name in lines[0]})


@pytest.mark.parametrize("group", [2**20, 7, 1])
@pytest.mark.parametrize("recipes", [["stage1"], ["calibrated"], ["branchwise", "reverse", "stage1"]], ids=str)
def test_the_table_is_the_sorted_one(monkeypatch, recipes, group):
    monkeypatch.setattr("h2t.pipeline.extraction.row_plan.GROUP_ROWS", group)
    table = make_table()
    rows = planned(table, recipes, VIEWS)
    assert rows.table().equals(expected(table, recipes))
    assert [len(piece) for piece in rows.groups()][:-1] == [group] * ((len(rows) - 1) // group)


def test_a_row_number_gives_sample_view_and_statistics():
    table = make_table()
    plan = planned(table, RECIPES, VIEWS).plan
    found = expected(table)
    samples, views = plan.lines(np.arange(len(plan)))
    assert (samples.tolist(), views.tolist()) == (found["sample"].to_pylist(), found["view"].to_pylist())
    names = [part.statistics for part in plan.parts for _ in range(part.start, part.stop)]
    assert names == found["statistics"].to_pylist()
    some = np.array([5, 3, 3, len(plan) - 1])
    assert plan.lines(some)[0].tolist() == samples[some].tolist()
    assert sum(plan.counts.values()) == len(plan) == len(found)


def test_samples_in_another_order_or_of_other_numbers_are_the_same_rows():
    table = make_table()
    mixed = table.take(np.random.default_rng(1).permutation(len(table)))
    later = make_table(sample=list(range(100, 140)))
    for given in (mixed, later, mixed.slice(3, 20)):
        rows = planned(given, RECIPES, VIEWS)
        assert rows.table().equals(expected(given))
        assert rows.plan.lines(np.arange(len(rows)))[0].tolist() == expected(given)["sample"].to_pylist()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"label": [-1] + [0] * 39}, "labels must be at least 0; got -1"),
        ({"split": ["trian"] * 40}, r"split must be one of .*; got \['trian'\]"),
        (
            {"split": ["train"] * 40, "label": [0] * 20 + [1] * 20, "source": ["a", *map(str, range(38)), "a"]},
            "same split",
        ),
    ],
)
def test_what_make_rows_refuses_is_refused(changes, says):
    table = make_table(**changes)
    for make in (expected, lambda given: planned(given, RECIPES, VIEWS)):
        with raises("spec", says):
            make(table)


def test_pieces_give_the_bytes_of_the_whole_table():
    """Row groups have a fixed size, so a file does not tell how its table was made."""
    table = make_table(of=3000)
    rows = planned(table, RECIPES, VIEWS)
    whole = io.BytesIO()
    pq.write_table(rows.table(), whole, compression="zstd", write_statistics=True)
    pieces = io.BytesIO()
    write_table(rows.groups(), pieces)
    assert pieces.getvalue() == whole.getvalue() == table_bytes(rows.table())


@pytest.mark.parametrize("piece", [2**16, 7])
def test_the_digest_of_a_dataset_is_that_of_its_json(monkeypatch, piece):
    monkeypatch.setattr(samples_module, "PIECE_ROWS", piece)
    table = make_table()
    columns = table.select(["split", "label", "source", "digest"]).to_pydict()
    assert Samples(table, {}).digest == sha256(canonical_json(columns))


def test_a_long_sample_table_stays_on_disk_and_gives_the_same_cache(backbone_dir, tmp_path, monkeypatch):
    samples, images = make_samples(tmp_path / "samples", test_per_class=10, validation_per_class=2)
    extracted(tmp_path / "memory", samples, images, backbone_dir, batchnorm=["branchwise"])
    monkeypatch.setattr(samples_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(samples_module, "PIECE_ROWS", 100)
    monkeypatch.setattr("h2t.pipeline.extraction.row_plan.GROUP_ROWS", 64)
    before = pa.total_allocated_bytes()
    long = load_samples(tmp_path / "samples")
    assert pa.total_allocated_bytes() - before < 10_000
    assert long.table.equals(samples.table)
    images = long.images({"dataset": "digits"})
    assert isinstance(images.sources, Texts)
    assert list(images.sources) == samples.table["source"].to_pylist()
    extracted(tmp_path / "disk", long, images, backbone_dir, batchnorm=["branchwise"])
    groups = pq.ParquetFile(tmp_path / "disk/rows.parquet").metadata
    assert groups.num_rows == pq.ParquetFile(tmp_path / "memory/rows.parquet").metadata.num_rows
    for name, data in tree(tmp_path / "memory").items():
        if name not in ("rows.parquet", "cache.json"):  # its row groups were made smaller here
            assert (tmp_path / "disk" / name).read_bytes() == data


MEASURE = """
import json, sys
from pathlib import Path
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.extraction.row_plan import planned

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def rows(folder):
    samples = load_samples(Path(folder))
    found = planned(samples.table, ["stage1"], [1] * 10)
    samples.digest
    return samples, found

kept = rows(sys.argv[1])  # imports, and what a small table takes
before = anonymous()
kept = rows(sys.argv[2])
print(json.dumps([len(kept[1]), anonymous() - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_planning_a_million_rows_takes_few_bytes_of_memory_a_row(tmp_path):
    for name, count in (("small", 1000), ("large", 1_000_000)):
        folder = tmp_path / name
        folder.mkdir()
        number = np.arange(count)
        sources = [f"train/n01440764/n01440764_{i:07}.JPEG" for i in number]
        columns = [
            number,
            ["train"] * count,
            np.sort(number % 10).astype(np.int32),
            sources,
            [sha256(s.encode()) for s in sources],
        ]
        pq.write_table(pa.table(columns, SCHEMA), folder / "samples.parquet", compression="zstd")
        facts = {"classes": list("abcdefghij"), "counts": [count // 10] * 10}
        (folder / "classes.json").write_text(json.dumps(facts))
    program = MEASURE.replace(
        "def anonymous", "import h2t.pipeline.data.samples as s; s.KEPT_BYTES = 2**20\ndef anonymous"
    )
    rows, held = json.loads(python("-c", program, tmp_path / "small", tmp_path / "large"))
    assert rows == 1_000_000
    assert held < 100 * rows  # 40, of which 22 MB are buffers

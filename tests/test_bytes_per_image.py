"""Memory for each image or row, of stages that see all of them at once: it limits how many one machine can take.

The peak of Python's and NumPy's memory and the peak of Arrow's are added up, so the sum is at least what is held at
once. What a stage takes in any case is left out by measuring two sizes; what it takes for a piece of the images, by
pieces that are smaller than both.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import make_cache
from pipeline_builders import ROOT

from h2t.pipeline.data.samples import SCHEMA
from h2t.pipeline.data.splits import Labelled
from h2t.pipeline.data.texts import Digests, Texts
from h2t.pipeline.extraction.row_plan import planned
from h2t.pipeline.stages import prepare

SIZES = (4_000, 10_000)

PLUG_IN = """
from h2t.pipeline.base.params import Section
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.texts import Texts
import numpy as np

class Options(Section):
    images: int
    size_of_group: int | None = None

def transform(options):
    return Transform(size=2, mean=[0.5] * 3, std=[0.5] * 3)

def load(options):
    label = [i % 100 for i in range(options.images)]
    source = Texts.of(f"train/class_{j:03d}/{i:09d}.jpg" for i, j in enumerate(label))
    size = options.size_of_group
    group = size and Texts.of(f"patient {i // (100 * size) * 100 + i % 100:09d}" for i in range(options.images))
    return Collection([f"class {j}" for j in range(100)], source, label, ["train"] * len(label), group)

def reader(options):
    return str.encode

def decode(data):
    return np.zeros((2, 2, 3), np.uint8)
"""

MEASURE = """
import json, os, sys, tracemalloc
from pathlib import Path
import pyarrow as pa

def prepared(images, size_of_group=None):
    from h2t.pipeline.base.run import Run
    from h2t.pipeline.stages import prepare
    options = {"images": images, "size_of_group": size_of_group}
    section = prepare.Params(dataset="many", options=options, test=0.1, validation=0.1)
    return lambda: prepare.run(section, Run("prepare", Path(f"prepared_{images}")))

def loaded(dataset, options):
    from h2t.pipeline.base import plugins
    module = plugins.load("datasets", dataset)
    return lambda: module.load(module.Options(**options))

def found(folder, images):
    import pyarrow.parquet as pq
    from h2t.cache.reader import open_cache
    from h2t.pipeline.data.samples import Samples
    from h2t.pipeline.extraction.reuse import Wanted, origins
    from h2t.pipeline.extraction.row_plan import planned
    cache = open_cache(folder)
    with pa.memory_map(f"{folder}.arrow") as file:
        samples = pa.ipc.open_file(file).read_all()
    wanted = Wanted(planned(samples, ["stage1"], [1] * 100), {"views": {"seed": 0}}, "float16", "many", {})
    def run():
        origin, reasons = origins(cache, wanted, {"stage1"})
        assert (origin[1:] == range(1, images)).all() and origin[0] == -1, origin
        assert reasons == ["1 image is new or changed"], reasons
    return run

import pandas, sklearn  # which steps import: seconds in each fork
from h2t.cache import reader
from h2t.cache.format import rows
from h2t.pipeline.data import texts
from h2t.pipeline.extraction import reuse, row_plan
from h2t.pipeline.stages import prepare
reader.KEPT_BYTES = 0  # so that tables are read as those of many rows are
texts.PIECE_ROWS = reuse.PIECE_ROWS = rows.BATCH_ROWS = 500
reuse.GROUP_ROWS = prepare.GROUP_ROWS = prepare.PIECE_ROWS = row_plan.GROUP_ROWS = 500
for line in sys.stdin:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    folder, what, *given = json.loads(line)
    os.chdir(folder)
    step = globals()[what](*given)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    step()
    print(tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory() - before, flush=True)
    break
"""


@pytest.fixture(scope="module")
def bytes_of_one():
    """Bytes of memory that one more image takes, of the same step with each of `SIZES` in a folder.

    Each is measured in a fork of one process, which has imported everything and measured nothing.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", MEASURE], env={"PYTHONPATH": str(ROOT)}, **pipes) as process:

        def measured(steps: list[list], folder: Path) -> float:
            peaks = []
            for step in steps:
                process.stdin.write(json.dumps([str(folder), *step]) + "\n")
                peaks.append(int(process.stdout.readline()))
            return (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])

        yield measured
        process.stdin.close()


@pytest.mark.parametrize(("size_of_group", "most"), [(None, 130), (4, 220), (1, 450)])
def test_prepare_takes_little_memory_for_an_image(bytes_of_one, tmp_path, size_of_group, most):
    (tmp_path / "plugins/datasets").mkdir(parents=True)
    (tmp_path / "plugins/datasets/many.py").write_text(PLUG_IN)
    assert bytes_of_one([["prepared", images, size_of_group] for images in SIZES], tmp_path) < most


def sources(images: int) -> list[str]:
    return [f"train/class_{i % 100:03d}/{i:09d}.jpg" for i in range(images)]


def write_list(folder: Path, images: int) -> dict[str, str]:
    (folder / "list.txt").write_text("".join(f"{source} {i % 100}\n" for i, source in enumerate(sources(images))))
    return {"root": str(folder), "train": "list.txt"}


def write_csv(folder: Path, images: int) -> dict[str, str]:
    lines = [f"{source},kind {i % 100}\n" for i, source in enumerate(sources(images))]
    (folder / "list.csv").write_text("path,label\n" + "".join(lines))
    first = folder / sources(1)[0]
    first.parent.mkdir(parents=True)
    first.touch()
    return {"table": str(folder / "list.csv"), "path": "path"}


@pytest.mark.parametrize(
    ("dataset", "write", "most"),
    [
        ("list_file", write_list, 200),
        ("imagenet_lt", write_list, 200),
        ("table", write_csv, 450),  # the file of 43 bytes a row is in memory several times while it is read
    ],
)
def test_reading_a_list_takes_little_memory_for_an_image(bytes_of_one, tmp_path, dataset, write, most):
    cases = []
    for images in SIZES:
        (tmp_path / str(images)).mkdir()
        options = write(tmp_path / str(images), images)
        cases.append(["loaded", dataset, options if dataset != "imagenet_lt" else {**options, "test": None}])
    assert bytes_of_one(cases, tmp_path) < most


def test_finding_rows_of_a_previous_cache_takes_little_memory_for_a_row(bytes_of_one, tmp_path, monkeypatch):
    monkeypatch.setattr("h2t.cache.format.rows.GROUP_ROWS", 500)  # of the file too: a group is read whole
    for images in SIZES:
        label = [i % 100 for i in range(images)]
        columns = {
            "sample": range(images),
            "split": ["train"] * images,
            "label": sorted(label),
            "source": [f"{i:09d}.jpg" for i in range(images)],
            "digest": [f"{i:064x}" for i in range(images)],
        }
        samples = pa.table({name: pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names})
        rows = planned(samples, ["stage1"], [1] * 100).table()
        fingerprint = {"views": {"seed": 0}}
        shape = {"maps": ((1, 1, 1),), "dtype": "float16", "chunk_rows": 1000, "shard_rows": 50_000}
        about = {"fingerprint_inputs": fingerprint, "provenance": {"dataset": "many"}}
        make_cache(tmp_path / str(images), rows=rows, **shape, **about)
        changed = samples.set_column(4, "digest", pa.array(["f" * 64, *columns["digest"][1:]]))
        with pa.ipc.new_file(str(tmp_path / f"{images}.arrow"), changed.schema) as file:
            file.write_table(changed, max_chunksize=2**16)
    assert bytes_of_one([["found", str(tmp_path / str(images)), images] for images in SIZES], tmp_path) < 60


def test_samples_written_in_pieces_have_the_bytes_of_one_table(tmp_path, monkeypatch):
    """Other bytes would train every backbone of a large dataset again."""
    monkeypatch.setattr(prepare, "PIECE_ROWS", 300)
    assert prepare.GROUP_ROWS == 2**20  # pyarrow's own, for larger tables
    label = np.arange(5000, dtype=np.int32) // 50
    source = Texts.of(f"{j}/{i:05d}.jpg" for i, j in enumerate(label))
    digests = Digests(5000)
    for i in range(5000):
        digests[i] = f"{i:064x}"
    found = Labelled([], source, label, np.array(["train"] * 5000), None)
    prepare._write_samples(tmp_path / "pieces.parquet", np.arange(5000), found, label, digests)
    whole = pq.read_table(tmp_path / "pieces.parquet")
    pq.write_table(whole.combine_chunks(), tmp_path / "whole.parquet", compression="zstd")
    assert (tmp_path / "pieces.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()

import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from builders import make_cache, make_rows, make_spec, make_statistics, raises, reseal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from h2t.cache.format.codecs import CODECS, PYTHON_ONLY
from h2t.cache.read.gather import Gather
from h2t.cache.reader import open_cache

pytestmark = pytest.mark.usefixtures("way")

LAYOUTS = [
    pytest.param({}, id="one row per chunk"),
    pytest.param({"chunk_rows": 2}, id="small rows"),
    pytest.param({"chunk_rows": 3, "shard_rows": 9, "maps": ((3, 2, 2), (5, 1, 1), (1, 3, 2))}, id="experts"),
    pytest.param({"maps": ((2, 1, 1), (4, 40, 40)), "shard_rows": 64}, id="one shard, larger than the rows"),
    pytest.param({"maps": ((1, 1, 1),), "dtype": "float32"}, id="1x1"),
    pytest.param({"dtype": "bfloat16", "chunk_rows": 4}, id="bfloat16"),
]


def refused(location, reason, says=None, rows=None) -> None:
    with raises(reason, says), open_cache(location) as cache:
        cache.read(range(cache.spec.rows) if rows is None else rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CODECS)
def test_every_row_comes_back(cache_dir, name, layout):
    maps = make_cache(cache_dir, codec=name, **layout)
    with open_cache(cache_dir) as cache:
        assert cache.experts == len(maps)
        for expert, expected in enumerate(maps):
            found = cache.read(range(11), expert=expert)
            assert found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [n for n in CODECS if n not in PYTHON_ONLY])
def test_other_tools_read_the_same_bits(cache_dir, name, layout):
    import tensorstore
    import xarray
    import zarr

    make_cache(cache_dir, codec=name, **layout)
    group = zarr.open_group(str(cache_dir / "maps.zarr"), mode="r")
    data = xarray.open_zarr(str(cache_dir / "maps.zarr"), mask_and_scale=False)
    with open_cache(cache_dir) as cache:
        for expert in range(cache.experts):
            array = f"expert_{expert}"
            kvstore = {"driver": "file", "path": str(cache_dir / "maps.zarr" / array)}
            store = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()
            expected = cache.read(range(11), expert=expert)
            assert group[array][:].tobytes() == expected.tobytes()
            assert data[array].values.tobytes() == expected.tobytes()
            assert [dim.split("_")[0] for dim in data[array].dims] == ["row", "channel", "y", "x"]
            assert store.read().result().tobytes() == expected.tobytes()


def test_dimensions_carry_the_names_of_the_format(cache_dir):
    import zarr

    make_cache(cache_dir, maps=((3, 2, 2), (3, 1, 2)))
    group = zarr.open_group(str(cache_dir / "maps.zarr"), mode="r")
    assert group["expert_0"].metadata.dimension_names == ("row", "channel", "y_0", "x")
    assert group["expert_1"].metadata.dimension_names == ("row", "channel", "y_1", "x")


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("name", sorted(PYTHON_ONLY))
def test_zarr_python_reads_the_other_codecs_too(cache_dir, name):
    import zarr

    maps = make_cache(cache_dir, codec=name, chunk_rows=2)
    assert zarr.open_group(str(cache_dir / "maps.zarr"), mode="r")["expert_0"][:].tobytes() == maps[0].tobytes()


@given(
    rows=st.integers(1, 20),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    chunk_rows=st.integers(1, 4),
    chunks_per_shard=st.integers(1, 4),
    name=st.sampled_from(list(CODECS)),
    dtype=st.sampled_from(["float16", "float32", "bfloat16"]),
    data=st.data(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_and_any_rows(tmp_path, rows, shape, chunk_rows, chunks_per_shard, name, dtype, data):
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    layout = {"chunk_rows": chunk_rows, "shard_rows": chunk_rows * chunks_per_shard}
    (maps,) = make_cache(tmp_path / "cache", rows=make_rows(rows), maps=(shape,), codec=name, dtype=dtype, **layout)
    with open_cache(tmp_path / "cache") as cache:
        for _ in range(3):
            wanted = data.draw(st.lists(st.integers(0, rows - 1), max_size=40))
            assert cache.read(wanted).tobytes() == maps[wanted].tobytes()


@pytest.mark.parametrize("layout", [{}, {"codec": "zstd", "chunk_rows": 4, "shard_rows": 64}])
def test_gathers_large_enough_for_threads(cache_dir, layout):
    (maps,) = make_cache(cache_dir, rows=make_rows(900), maps=((16, 16, 16),), **{"shard_rows": 64, **layout})
    rng = np.random.default_rng(0)
    with open_cache(cache_dir) as cache:
        for wanted in (
            rng.integers(0, 900, 1500),
            np.arange(899, -1, -1),
            np.zeros(700, np.int64),
            np.arange(0, 900, 3),
        ):
            assert cache.read(wanted).tobytes() == maps[wanted].tobytes()


def test_many_threads_read_at_once(cache_dir):
    (maps,) = make_cache(cache_dir, rows=make_rows(300), shard_rows=7)
    with open_cache(cache_dir) as cache, ThreadPoolExecutor(8) as pool:

        def same(seed: int) -> bool:
            wanted = np.random.default_rng(seed).integers(0, 300, 50)
            return cache.read(wanted).tobytes() == maps[wanted].tobytes()

        assert all(pool.map(same, range(200)))


def _read_and_hash(cache, wanted, answers) -> None:
    answers.put(sha256(cache.read(wanted)).hexdigest())


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.parametrize("layout", [{}, {"codec": "zstd"}])
def test_another_process_reads_the_open_cache(cache_dir, layout, start):
    """A forked child has none of its parent's threads; a spawned one gets the cache pickled."""
    (maps,) = make_cache(cache_dir, rows=make_rows(600), maps=((64, 8, 8),), **{"shard_rows": 64, **layout})
    wanted = np.random.default_rng(0).permutation(600)
    context = multiprocessing.get_context(start)
    with open_cache(cache_dir) as cache, ThreadPoolExecutor(1) as pool:
        cache.read(wanted)
        busy = pool.submit(lambda: [cache.read(wanted) for _ in range(20)])  # may hold a lock when the child is forked
        answers = context.SimpleQueue()
        count = 3 if start == "fork" else 1  # a spawned child imports everything again
        children = [context.Process(target=_read_and_hash, args=(cache, wanted, answers)) for _ in range(count)]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
            assert child.exitcode == 0
        assert {answers.get() for _ in children} == {sha256(maps[wanted].tobytes()).hexdigest()}
        assert len(busy.result()) == 20


def test_no_rows(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        assert cache.read([]).shape == (0, 3, 2, 2)
        assert cache.read(np.zeros(0, np.int64)).shape == (0, 3, 2, 2)


def test_the_callers_buffer_is_filled(cache_dir):
    (maps,) = make_cache(cache_dir)
    out = np.zeros((3, 3, 2, 2), "<f2")
    with open_cache(cache_dir) as cache:
        assert cache.read([3, 1, 3], out=out) is out
    assert out.tobytes() == maps[[3, 1, 3]].tobytes()


def test_a_row_number_beyond_64_bits_is_refused(cache_dir):
    make_cache(cache_dir)
    refused(cache_dir, "out-of-range", rows=[2**63])


def test_a_printed_cache_says_where_it_is_and_what_it_holds(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        spec = cache.spec
    maps = ", ".join(f"{c} x {h} x {w}" for c, h, w in spec.maps)
    said = f"{spec.rows} rows of {maps} {spec.dtype}, {spec.codec}, {spec.fingerprint[:12]}"
    assert repr(cache) == f"<Cache {cache_dir}: {said}>"


def test_rows_and_statistics(cache_dir):
    make_cache(cache_dir)
    with open_cache(cache_dir) as cache:
        assert cache.rows == make_rows()
        assert cache.statistics == make_statistics()
        assert cache.spec == make_spec()


def spy_on_reads(monkeypatch) -> list[tuple[str, int, int]]:
    """File name, start and stop of every positioned read from now on."""
    reads = []
    pread = os.pread

    def note(handle: int, start: int, got: int) -> None:
        reads.append((Path(f"/proc/self/fd/{handle}").readlink().name, start, start + got))

    def spied_pread(handle, size, start):
        data = pread(handle, size, start)
        note(handle, start, len(data))
        return data

    def spied_gather(self, files, offsets, slots, out, row_bytes, opened):
        for handle, start in zip(files.tolist(), offsets.tolist(), strict=True):
            note(handle, start, row_bytes + 4)
        return gather(self, files, offsets, slots, out, row_bytes, opened)

    gather = Gather.__call__
    monkeypatch.setattr(os, "pread", spied_pread)
    monkeypatch.setattr(Gather, "__call__", spied_gather)
    return reads


@pytest.mark.parametrize("layout", [{}, {"codec": "zstd"}, {"chunk_rows": 4}, {"codec": "blosc-lz4", "chunk_rows": 4}])
def test_each_chunk_is_read_once_and_each_index_once(cache_dir, monkeypatch, layout):
    make_cache(cache_dir, rows=make_rows(200), maps=((64, 4, 4),), **{"shard_rows": 32, **layout})
    spec = make_spec(rows=200, shard_rows=32, **layout)
    reads = spy_on_reads(monkeypatch)
    wanted = np.random.default_rng(0).integers(0, 200, 120)
    with open_cache(cache_dir) as cache:
        cache.read(wanted)
        chunks = np.unique(wanted // spec.chunk_rows)
        shards, offsets, sizes = cache.chunk_ranges(chunks, 0)
        index = 16 * spec.chunks_per_shard + 4
        assert sorted(name for name, start, stop in reads if stop <= index) == [f"c.{s}.0.0.0" for s in range(7)]
        for shard, offset, size in zip(shards, offsets, sizes, strict=True):
            over = [(a, b) for name, a, b in reads if name == f"c.{shard}.0.0.0" and a < offset + size and b > offset]
            assert sum(min(b, offset + size) - max(a, offset) for a, b in over) == size
        reads.clear()
        cache.read(wanted)
        assert not [name for name, start, stop in reads if start < index]


class TestDamage:
    """Whatever is missing or changed: an error that names it, never a value."""

    def shard(self, cache_dir, number=1):
        return cache_dir / make_spec().shard_file(0, number)

    @pytest.mark.parametrize("place", ["nothing", "file"])
    def test_no_cache_at_all(self, tmp_path, place):
        (tmp_path / "file").write_bytes(b"")
        refused(tmp_path / place, "uncommitted")

    def test_a_newer_format(self, cache_dir):
        make_cache(cache_dir)
        reseal(cache_dir, lambda body: body.update(format=2))
        refused(cache_dir, "newer-format", "format 2")

    def test_a_missing_shard_is_never_zeros(self, cache_dir):
        make_cache(cache_dir)
        with open_cache(cache_dir) as cache:
            self.shard(cache_dir).unlink()
            assert cache.read([0, 10]).shape == (2, 3, 2, 2)
            with raises("replaced", r"c\.1\.0\.0\.0"):
                cache.read([0, 5])
        refused(cache_dir, "missing")

    @pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors", "README.md", "maps.zarr/zarr.json"])
    def test_a_missing_file_is_noticed_at_opening(self, cache_dir, name):
        make_cache(cache_dir)
        (cache_dir / name).unlink()
        refused(cache_dir, "missing", name)

    @pytest.mark.parametrize("layout", [{}, {"codec": "zstd"}, {"chunk_rows": 2}])
    def test_a_truncated_shard(self, cache_dir, layout):
        make_cache(cache_dir, **layout)
        with open_cache(cache_dir) as cache:
            cache.read([4])  # the index is known, so only the chunk itself can tell
            os.truncate(self.shard(cache_dir), self.shard(cache_dir).stat().st_size - 1)
            with raises("replaced", r"c\.1\.0\.0\.0"):
                cache.read([7])
        refused(cache_dir, "damaged")

    @pytest.mark.parametrize("name", CODECS)
    @pytest.mark.parametrize("chunk_rows", [1, 2])
    def test_every_byte_of_a_shard_counts(self, cache_dir, name, chunk_rows):
        (maps,) = make_cache(cache_dir, codec=name, chunk_rows=chunk_rows)
        whole = self.shard(cache_dir).read_bytes()
        index = 16 * (4 // chunk_rows) + 4
        for at in range(0, len(whole), 3):
            self.shard(cache_dir).write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            what = "rows 4 to 7" if at < index else "chunk "
            refused(cache_dir, "damaged", rf"c\.1\.0\.0\.0.*{what}", rows=[4, 5, 6, 7])
            with open_cache(cache_dir) as cache:
                assert cache.read([3, 8]).tobytes() == maps[[3, 8]].tobytes()

    def test_a_chunk_that_decodes_to_less_leaves_no_old_values(self, cache_dir):
        """A cache.json that claims larger maps, with all checksums true."""
        make_cache(cache_dir, codec="zstd")
        reseal(cache_dir, lambda body: body.update(experts=[{"shape": [11, 3, 2, 3]}]))
        refused(cache_dir, "damaged")

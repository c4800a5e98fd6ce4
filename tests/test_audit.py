import contextlib
import os
import random
import shutil
import subprocess
from collections import Counter

import fsspec
import numpy as np
import pytest
from builders import (
    flip,
    make_cache,
    make_maps,
    make_rows,
    make_spec,
    raises,
    reseal,
    reseal_file,
    table_bytes,
    tree,
    write_cache,
)

from h2t.cache.errors import CacheError
from h2t.cache.format.codecs import CODECS
from h2t.cache.format.spec import to_float32
from h2t.cache.reader import open_cache
from h2t.cache.tools.audit import describe, stats
from h2t.cache.tools.pooled import pooled
from h2t.cache.tools.verify import verify
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import committed

FLIPS = 1000 if os.environ.get("H2T_FULL") else 120


def faults(location, **how) -> list[str]:
    return [str(fault) for fault in verify(location, **how)]


class TestVerify:
    @pytest.mark.parametrize("quick", [False, True])
    @pytest.mark.parametrize("layout", [{}, {"chunk_rows": 2, "maps": ((3, 2, 2), (5, 1, 1))}, {"dtype": "bfloat16"}])
    @pytest.mark.parametrize("name", CODECS)
    def test_a_sound_cache_has_no_faults(self, cache_dir, name, layout, quick):
        make_cache(cache_dir, codec=name, **layout)
        assert faults(cache_dir, quick=quick) == []

    def test_one_row(self, cache_dir):
        make_cache(cache_dir, rows=make_rows(1), maps=((1, 1, 1),))
        assert faults(cache_dir) == []

    def test_files_that_are_links_are_sound(self, cache_dir, tmp_path):
        """As in a DVC workspace with symlinks."""
        make_cache(tmp_path / "real")
        for name in tree(tmp_path / "real"):
            (cache_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (cache_dir / name).symlink_to(tmp_path / "real" / name)
        assert faults(cache_dir) == []

    def test_a_flipped_value(self, cache_dir):
        make_cache(cache_dir, chunk_rows=2)
        flip(cache_dir / "maps.zarr/expert_0/c.1.0.0.0")
        assert faults(cache_dir) == ["maps.zarr/expert_0/c.1.0.0.0: chunk 1 (rows 6 to 7): crc32c mismatch"]

    def test_a_flipped_index(self, cache_dir):
        make_cache(cache_dir)
        flip(cache_dir / "maps.zarr/expert_0/c.2.0.0.0", 3)
        expected = ["maps.zarr/expert_0/c.2.0.0.0: chunks 0 to 2 (rows 8 to 10): shard index: crc32c mismatch"]
        assert faults(cache_dir) == expected
        assert faults(cache_dir, quick=True) == expected

    def test_a_truncated_shard(self, cache_dir):
        make_cache(cache_dir)
        path = cache_dir / "maps.zarr/expert_0/c.0.0.0.0"
        size = path.stat().st_size
        os.truncate(path, size - 29)  # a chunk is 28 bytes
        what = f"the file ends before it ({size - 29} bytes, cache.json says {size})"
        assert faults(cache_dir) == [f"maps.zarr/expert_0/c.0.0.0.0: chunks 2 to 3 (rows 2 to 3): {what}"]
        assert [line.split(": ")[1] for line in faults(cache_dir, quick=True)] == ["chunks 0 to 3 (rows 0 to 3)"]

    @pytest.mark.parametrize("keep", [0, 1, 67])
    def test_a_shard_without_its_index(self, cache_dir, keep):
        make_cache(cache_dir)
        os.truncate(cache_dir / "maps.zarr/expert_0/c.0.0.0.0", keep)
        assert faults(cache_dir) == [
            f"maps.zarr/expert_0/c.0.0.0.0: chunks 0 to 3 (rows 0 to 3): shard index: 68 bytes expected; got {keep}"
        ]

    @pytest.mark.parametrize("quick", [False, True])
    def test_a_deleted_shard(self, cache_dir, quick):
        make_cache(cache_dir)
        (cache_dir / "maps.zarr/expert_0/c.2.0.0.0").unlink()
        expected = "maps.zarr/expert_0/c.2.0.0.0: chunks 0 to 2 (rows 8 to 10): file is missing"
        assert faults(cache_dir, quick=quick) == [expected]

    def test_swapped_shards_of_the_same_size(self, cache_dir):
        """Every checksum inside them holds; only the sha256 of the files can tell."""
        make_cache(cache_dir)
        a, b = (cache_dir / f"maps.zarr/expert_0/c.{s}.0.0.0" for s in (0, 1))
        data = a.read_bytes(), b.read_bytes()
        a.write_bytes(data[1])
        b.write_bytes(data[0])
        start, what = "maps.zarr/expert_0/c.", "sha256 differs from cache.json"
        assert faults(cache_dir) == [
            f"{start}0.0.0.0: chunks 0 to 3 (rows 0 to 3): {what}",
            f"{start}1.0.0.0: chunks 0 to 3 (rows 4 to 7): {what}",
        ]

    @pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors", "README.md", "maps.zarr/zarr.json"])
    def test_missing_and_changed_files(self, cache_dir, name):
        make_cache(cache_dir)
        data = (cache_dir / name).read_bytes()
        (cache_dir / name).unlink()
        assert f"{name}: file is missing" in faults(cache_dir)
        assert f"{name}: file is missing" in faults(cache_dir, quick=True)
        (cache_dir / name).write_bytes(data + b" ")
        assert f"{name}: {len(data) + 1} bytes, cache.json says {len(data)}" in faults(cache_dir)
        (cache_dir / name).write_bytes(data)
        flip(cache_dir / name, len(data) // 2)
        assert f"{name}: sha256 differs from cache.json" in faults(cache_dir)

    def test_files_that_nobody_named(self, cache_dir):
        make_cache(cache_dir)
        (cache_dir / "notes\n.txt").write_bytes(b"")
        (cache_dir / "maps.zarr/expert_0/c.3.0.0.0").write_bytes(b"")
        (cache_dir / "link").symlink_to(cache_dir.parent, target_is_directory=True)
        assert faults(cache_dir) == [
            "link: not named in cache.json",
            "maps.zarr/expert_0/c.3.0.0.0: not named in cache.json",
            "notes\\n.txt: not named in cache.json",
        ]
        assert faults(cache_dir, quick=True) == []

    @pytest.mark.parametrize("place", ["nothing", "a file", "empty directory", "zz://nowhere", "memory://nowhere"])
    def test_no_cache(self, tmp_path, place):
        (tmp_path / "a file").write_bytes(b"")
        (tmp_path / "empty directory").mkdir()
        (line,) = faults(place if "://" in place else tmp_path / place)
        assert line.startswith("cache.json: ")

    def test_a_newer_format(self, cache_dir):
        make_cache(cache_dir)
        reseal(cache_dir, lambda body: body.update(format=9))
        assert len(faults(cache_dir)) == 1
        assert "format 9" in faults(cache_dir)[0]

    def test_a_remote_cache(self, cache_dir):
        make_cache(cache_dir, codec="zstd")
        fs = fsspec.filesystem("memory")
        fs.put(str(cache_dir), "/verified", recursive=True)
        assert faults("memory://verified") == []
        fs.pipe_file("/verified/extra", b"")
        fs.rm("/verified/maps.zarr/expert_0/c.1.0.0.0")
        assert faults("memory://verified") == [
            "extra: not named in cache.json",
            "maps.zarr/expert_0/c.1.0.0.0: chunks 0 to 3 (rows 4 to 7): file is missing",
        ]
        fs.rm("/verified", recursive=True)

    def test_more_than_one_fault(self, cache_dir):
        make_cache(cache_dir, maps=((3, 2, 2), (1, 1, 1)))
        flip(cache_dir / "maps.zarr/expert_0/c.1.0.0.0")
        flip(cache_dir / "maps.zarr/expert_1/c.0.0.0.0")
        flip(cache_dir / "README.md")
        assert [line.split(":")[0] for line in faults(cache_dir)] == [
            "README.md",
            "maps.zarr/expert_0/c.1.0.0.0",
            "maps.zarr/expert_1/c.0.0.0.0",
        ]


class TestHostile:
    """Caches whose checksums are all true and whose content is not: faults, never a traceback."""

    def reasons(self, cache_dir) -> str:
        full, quick = faults(cache_dir), faults(cache_dir, quick=True)
        assert full
        return "\n".join([*full, *quick])

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            pytest.param(lambda b: b["layout"].update(codec="gzip"), "codec", id="codec"),
            pytest.param(lambda b: b["layout"].update(codec="zstd"), "cannot be decoded", id="other codec"),
            pytest.param(lambda b: b["layout"].update(dtype=["float16"]), "dtype", id="dtype is a list"),
            pytest.param(lambda b: b["layout"].update(chunk_rows=2**40, shard_rows=2**40), "2 GiB", id="huge chunk"),
            pytest.param(lambda b: b["layout"].update(chunk_rows=2**70, shard_rows=2**70), "2**63", id="no int64"),
            pytest.param(lambda b: b.update(rows=2**62, experts=[{"shape": [2**62, 3, 2, 2]}]), "named", id="huge"),
            pytest.param(lambda b: b.update(experts=[{"shape": [11, 2**40, 2**10, 2]}]), "2 GiB", id="huge map"),
            pytest.param(lambda b: b.update(experts=[{"shape": [11, 3, 2, 1]}]), "must have 16 bytes", id="small map"),
            pytest.param(
                lambda b: b["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}}), "not the name", id="outside"
            ),
            pytest.param(lambda b: b["files"].pop("README.md"), "README.md: not named", id="unnamed"),
            pytest.param(
                lambda b: b["files"].update({"maps.zarr": {"bytes": 1, "sha256": "0" * 64}}),
                "not a file of format 1",
                id="folder",
            ),
            pytest.param(lambda b: b["files"]["README.md"].update(sha256="x" * 99), "sha256 expected", id="no digest"),
            pytest.param(lambda b: b["files"]["README.md"].update(sha256="0" * 64), "sha256 differs", id="other"),
        ],
    )
    def test_commit_record(self, cache_dir, change, says):
        make_cache(cache_dir)
        reseal(cache_dir, change)
        assert says in self.reasons(cache_dir)
        with contextlib.suppress(CacheError), open_cache(cache_dir) as cache:
            cache.read([0])  # refuses, or does not look at what is wrong

    @pytest.mark.parametrize("name", ["rows.parquet", "batchnorm.safetensors", "maps.zarr/zarr.json"])
    @pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff" * 50, b"PAR1PAR1PAR1"])
    def test_content_of_files(self, cache_dir, name, data):
        make_cache(cache_dir)
        (cache_dir / name).write_bytes(data)
        reseal_file(cache_dir, name)
        assert name in self.reasons(cache_dir)

    @pytest.mark.parametrize(
        ("key", "old", "new"),
        [
            ("shape", b"\n    11,", b"\n    12,"),
            ("data_type", b'"float16"', b'"float32"'),
            ("dimension_names", b'"row"', b'"sample"'),
            ("codecs", b'"start"', b'"end"'),
            ("fill_value", b'"fill_value": 0.0', b'"fill_value": 1.0'),
            ("chunk_key_encoding", b'"separator": "."', b'"separator": "/"'),
        ],
    )
    def test_zarr_metadata_that_disagrees(self, cache_dir, key, old, new):
        make_cache(cache_dir)
        name = "maps.zarr/expert_0/zarr.json"
        path = cache_dir / name
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))
        reseal_file(cache_dir, name)
        assert any(line.startswith(f"{name}: {key} is ") for line in faults(cache_dir))
        assert any(line.startswith(f"{name}: {key} is ") for line in faults(cache_dir, quick=True))

    def test_consolidated_metadata_that_disagrees(self, cache_dir):
        make_cache(cache_dir)
        path = cache_dir / "maps.zarr/zarr.json"
        path.write_bytes(path.read_bytes().replace(b'"float16"', b'"int16"'))
        reseal_file(cache_dir, "maps.zarr/zarr.json")
        assert "maps.zarr/zarr.json: data_type is 'int16'; cache.json asks for 'float16'" in faults(cache_dir)

    def test_rows_in_another_order(self, cache_dir):
        import pyarrow as pa

        from h2t.cache.format.rows import SCHEMA

        make_cache(cache_dir)
        table = make_rows().take(list(range(10, -1, -1)))
        table = table.set_column(0, SCHEMA.field("row"), pa.array(range(11), pa.int64()))
        (cache_dir / "rows.parquet").write_bytes(table_bytes(table))
        reseal_file(cache_dir, "rows.parquet")
        assert "rows.parquet: rows are not in the order of format 1" in self.reasons(cache_dir)

    def test_a_named_pipe_is_not_waited_for(self, cache_dir):
        make_cache(cache_dir)
        (cache_dir / "README.md").unlink()
        os.mkfifo(cache_dir / "README.md")
        reseal(cache_dir, lambda body: body["files"]["README.md"].update(bytes=0))
        assert "README.md: file is missing" in faults(cache_dir)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", [{"codec": "none"}, {"codec": "zstd", "chunk_rows": 3, "shard_rows": 6}])
def test_every_flipped_byte_is_found_and_never_read_as_a_value(cache_dir, layout):
    """One random byte of one random file, again and again: verify finds each, and read is right or refuses."""
    maps = make_cache(cache_dir, maps=((3, 2, 2), (2, 1, 1)), **layout)
    with open_cache(cache_dir) as cache:
        rows, statistics = cache.rows, cache.statistics
    whole = tree(cache_dir)
    rng = random.Random(11)
    found, refused, names = 0, 0, Counter()
    for _ in range(FLIPS // 2):
        name = rng.choice(sorted(whole))
        data = bytearray(whole[name])
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        (cache_dir / name).write_bytes(data)
        names[name] += 1
        lines = faults(cache_dir)
        found += bool(lines)
        assert any(line.startswith(f"{name}: ") for line in lines), name
        try:
            with open_cache(cache_dir) as cache:
                assert cache.rows == rows
                assert cache.statistics == statistics
                for expert, expected in enumerate(maps):
                    assert cache.read(range(11), expert=expert).tobytes() == expected.tobytes()
        except CacheError:
            refused += 1
        (cache_dir / name).write_bytes(whole[name])
    assert found == FLIPS // 2
    assert refused >= sum(count for name, count in names.items() if "/c." in name or name == "cache.json")
    assert set(names) == set(whole)
    assert faults(cache_dir) == []


class TestStats:
    @pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
    @pytest.mark.parametrize("count", [1, 11, 700])
    def test_against_numpy(self, cache_dir, dtype, count, monkeypatch):
        monkeypatch.setattr("h2t.cache.tools.audit.BLOCK_BYTES", 5000)  # several blocks
        rows = make_rows(count)
        spec = make_spec(rows=count, dtype=dtype, chunk_rows=2, shard_rows=64, maps=((3, 2, 2), (2, 1, 1)))
        write_cache(cache_dir, spec, rows, make_maps(spec))
        with open_cache(cache_dir) as cache:
            table = stats(cache)
        for line, stored in zip(table, make_maps(spec), strict=True):
            values = to_float32(stored, dtype).astype(np.float64)
            assert line["values"] == values.size
            assert line["sparsity"] == (values == 0).mean()
            assert (line["min"], line["max"]) == (values.min(), values.max())
            assert line["mean"] == pytest.approx(values.mean())
            norms = np.sqrt((values**2).sum((1, 2, 3)))
            labels = rows["label"].to_numpy()
            assert [c["label"] for c in line["classes"]] == sorted(set(labels))
            for of_class in line["classes"]:
                assert of_class["rows"] == (labels == of_class["label"]).sum()
                assert of_class["mean_l2"] == pytest.approx(norms[labels == of_class["label"]].mean())

    def test_values_that_are_not_finite_are_counted_and_left_out(self, cache_dir):
        spec = make_spec(rows=2, maps=((1, 1, 3),))
        maps = np.array([[np.nan, np.inf, 2], [-np.inf, 0, -1]], "<f2").reshape(2, 1, 1, 3)
        write_cache(cache_dir, spec, make_rows(2), [maps])
        with open_cache(cache_dir) as cache:
            (line,) = stats(cache)
        assert (line["nan"], line["inf"], line["min"], line["max"]) == (1, 2, -1, 2)
        assert line["mean"] == pytest.approx(1 / 3)
        assert line["sparsity"] == 1 / 6

    def test_no_finite_value_at_all(self, cache_dir):
        spec = make_spec(rows=1, maps=((1, 1, 1),))
        write_cache(cache_dir, spec, make_rows(1), [np.full((1, 1, 1, 1), np.nan, "<f2")])
        with open_cache(cache_dir) as cache:
            (line,) = stats(cache)
        assert (line["min"], line["max"], line["mean"], line["nan"]) == (None, None, None, 1)


def mean(maps):
    return maps.mean((2, 3))


class TestPooled:
    def test_values_rows_and_origin(self, tmp_path):
        maps = make_cache(tmp_path / "a", maps=((3, 2, 2), (5, 4, 1)), codec="zstd")
        with open_cache(tmp_path / "a") as parent:
            spec = pooled(parent, tmp_path / "b", mean, "gap")
            with open_cache(tmp_path / "b") as cache:
                assert cache.spec == spec
                assert cache.rows == parent.rows
                assert cache.statistics == parent.statistics
                for expert, values in enumerate(maps):
                    expected = values.astype(np.float32).mean((2, 3))[:, :, None, None]
                    assert cache.read(range(11), expert=expert).tobytes() == expected.tobytes()
        assert spec.dtype == "float32"
        assert spec.maps == ((3, 1, 1), (5, 1, 1))
        backbone = parent.spec.fingerprint_inputs["backbone"]
        assert spec.fingerprint_inputs == {"backbone": backbone, "pool": "gap", "parent": parent.spec.fingerprint}
        assert {**spec.provenance, **parent.spec.provenance} == spec.provenance
        assert faults(tmp_path / "b") == []

    def test_again_is_nothing_and_another_is_refused(self, tmp_path):
        make_cache(tmp_path / "a")
        with open_cache(tmp_path / "a") as parent:
            pooled(parent, tmp_path / "b", mean, "gap")
            before = {p: p.stat().st_ino for p in (tmp_path / "b").rglob("*")}
            pooled(parent, tmp_path / "b", mean, "gap")
            assert {p: p.stat().st_ino for p in (tmp_path / "b").rglob("*")} == before
            for other in ({"pool_name": "max"}, {"pool_name": "gap", "codec": "zstd"}):
                with raises("exists"):
                    pooled(parent, tmp_path / "b", mean, **other)
            pooled(parent, tmp_path / "b", lambda m: m.max((2, 3)), "max", replace=True)
        assert committed(tmp_path / "b").fingerprint_inputs["pool"] == "max"

    def test_an_interrupted_copy_goes_on_where_it_stopped(self, tmp_path, monkeypatch):
        monkeypatch.setattr("h2t.cache.tools.pooled.WORKERS", 1)
        monkeypatch.setattr("h2t.cache.tools.pooled.BLOCK_BYTES", 24 * 3)
        make_cache(tmp_path / "a", rows=make_rows(500), maps=((700, 2, 2),), shard_rows=64)
        calls = []

        def failing(values):
            calls.append(len(values))
            if len(calls) == 200:
                raise RuntimeError("the power went")
            return mean(values)

        with open_cache(tmp_path / "a") as parent:
            whole = pooled(parent, tmp_path / "whole", mean, "gap", shard_bytes=100_000)
            assert whole.shards > 10
            with pytest.raises(RuntimeError):
                pooled(parent, tmp_path / "b", failing, "gap", shard_bytes=100_000)
            assert not (tmp_path / "b").exists()
            done = []
            pooled(parent, tmp_path / "b", mean, "gap", shard_bytes=100_000, progress=done.append)
        assert 0 < sum(done) < 500
        assert tree(tmp_path / "b") == tree(tmp_path / "whole")

    @pytest.mark.parametrize(
        "pool",
        [
            pytest.param(lambda m: m, id="not pooled"),
            pytest.param(lambda m: m.mean((0, 2, 3)), id="one row"),
            pytest.param(lambda m: m.mean((2, 3))[:1], id="a row less"),
            pytest.param(lambda m: m.mean((2, 3))[:, : len(m) + 1], id="channels vary"),
        ],
    )
    def test_pools_of_another_shape_are_refused(self, tmp_path, pool):
        make_cache(tmp_path / "a")
        with open_cache(tmp_path / "a") as parent, raises("mismatch"):
            pooled(parent, tmp_path / "b", pool, "odd")
        assert not (tmp_path / "b").exists()

    def test_a_copy_under_way_is_busy(self, tmp_path):
        make_cache(tmp_path / "a")
        with open_cache(tmp_path / "a") as parent, Staging(tmp_path / "b"), raises("busy"):
            pooled(parent, tmp_path / "b", mean, "gap")


def test_describe(cache_dir):
    make_cache(cache_dir, maps=((3, 2, 2), (1, 1, 1)), codec="zstd")
    with open_cache(cache_dir) as cache:
        about = describe(cache)
    assert about["rows"] == 11
    assert about["splits"] == [
        {"split": "test", "statistics": "stage1", "rows": 2},
        {"split": "train", "statistics": "stage1", "rows": 9},
    ]
    assert (about["samples"], about["classes"], about["views"]) == (6, 3, 2)
    assert about["experts"] == [{"shape": [3, 2, 2]}, {"shape": [1, 1, 1]}]
    assert about["shards"] == 6
    assert about["bytes"] == sum(map(len, tree(cache_dir).values()))
    assert about["files"] == len(tree(cache_dir))
    used = subprocess.run(["du", "-bs", "--apparent-size", cache_dir], capture_output=True, text=True, check=False)
    assert shutil.which("du") is None or int(used.stdout.split()[0]) >= about["bytes"]

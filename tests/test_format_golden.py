import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import make_rows, make_spec, make_statistics, raises, tree, write_cache

from h2t.cache.format.spec import FORMAT
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify

GOLDEN = Path(__file__).parent / "golden"
_found = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(_found)
_found.loader.exec_module(make)

FINGERPRINT = "b6721030d10d1f2b0188259831f0a16037e49bd67f39008599fd98cac505537e"


def test_the_corpus_is_present():
    others = {"first", "results", "__pycache__"}  # of tests/golden_cases.py
    assert sorted({p.name for p in GOLDEN.iterdir() if p.is_dir()} - others) == ["none", "zstd"]
    assert (GOLDEN / "PROVENANCE.md").is_file()
    shards = [f"maps.zarr/expert_{e}/{name}" for e in (0, 1) for name in ("c.0.0.0.0", "c.1.0.0.0", "zarr.json")]
    others = ["README.md", "batchnorm.safetensors", "cache.json", "maps.zarr/zarr.json", "rows.parquet"]
    for codec in make.CODECS:
        assert sorted(tree(GOLDEN / codec)) == sorted(shards + others)


@pytest.mark.parametrize("codec", make.CODECS)
class TestGolden:
    def test_values_are_the_literal_ones(self, codec):
        with open_cache(GOLDEN / codec) as cache:
            assert cache.read([0, 4]).tolist() == [
                [[[0, 0.0625, 0.125], [0, 0.25, 0.3125]], [[0, 0.4375, 0.5], [0, 0.625, 0.6875]]],
                [[[4, 4.0625, 0], [4.1875, 4.25, 0]], [[4.375, 4.4375, 0], [4.5625, 4.625, 0]]],
            ]
            assert cache.read(range(5), expert=1)[:, :, 0, 0].tolist() == [
                [0, 0.0625, 0.125],
                [1, 1.0625, 0],
                [2, 0, 2.125],
                [0, 3.0625, 3.125],
                [4, 4.0625, 0],
            ]
            for expert, expected in enumerate(make.maps()):
                assert cache.read(range(5), expert=expert).tobytes() == expected.tobytes()

    def test_row_table_record_and_statistics(self, codec):
        with open_cache(GOLDEN / codec) as cache:
            assert cache.rows["source"].to_pylist() == [
                "images/0002.png",
                "images/0000.png",
                "images/0000.png",
                "images/0001.png",
                "images/0001.png",
            ]
            assert cache.rows["split"].to_pylist() == ["test", *["train"] * 4]
            assert cache.rows == make_rows(5)
            assert cache.statistics == make_statistics()
            assert cache.spec == make_spec(**make.SPEC, codec=codec)
            assert cache.spec.fingerprint == FINGERPRINT
        record = json.loads((GOLDEN / codec / "cache.json").read_bytes())
        assert record["format"] == FORMAT == 1
        assert record["layout"] == {
            "chunk_rows": 2,
            "codec": codec,
            "dtype": "float16",
            "index": "start",
            "shard_rows": 4,
        }

    def test_it_is_sound(self, codec):
        assert [str(fault) for fault in verify(GOLDEN / codec)] == []

    def test_shards_written_today_have_the_same_bytes(self, codec, cache_dir):
        write_cache(cache_dir, make_spec(**make.SPEC, codec=codec), make_rows(5), make.maps())
        today, golden = tree(cache_dir), tree(GOLDEN / codec)
        shards = [name for name in golden if "/c." in name]
        assert len(shards) == 4
        assert {name: today[name] for name in shards} == {name: golden[name] for name in shards}

    def test_other_tools_read_it(self, codec):
        import tensorstore
        import zarr

        root = GOLDEN / codec / "maps.zarr"
        for expert, expected in enumerate(make.maps()):
            kvstore = {"driver": "file", "path": str(root / f"expert_{expert}")}
            assert zarr.open_group(str(root), mode="r")[f"expert_{expert}"][:].tobytes() == expected.tobytes()
            found = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
            assert found.tobytes() == expected.tobytes()


def test_a_shard_byte_by_byte():
    """The first shard of the small expert, taken apart by hand: index, then two chunks, each with its crc32c."""
    data = (GOLDEN / "none/maps.zarr/expert_1/c.0.0.0.0").read_bytes()
    assert len(data) == 36 + 2 * 16
    assert np.frombuffer(data, "<u8", 4).tolist() == [36, 16, 52, 16]
    assert np.frombuffer(data, "<f2", 6, 36).tolist() == [0, 0.0625, 0.125, 1, 1.0625, 0]
    assert np.frombuffer(data, "<f2", 6, 52).tolist() == [2, 0, 2.125, 0, 3.0625, 3.125]
    for start, stop in ((0, 32), (36, 48), (52, 64)):
        assert int.from_bytes(data[stop : stop + 4], "little") == crc32c_by_hand(data[start:stop])


def crc32c_by_hand(data: bytes) -> int:
    """Castagnoli, reflected: polynomial 0x82F63B78, start and end inverted."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("codec", make.CODECS)
@pytest.mark.parametrize("change", ["doubled", "exchanged", "moved"])
def test_chunks_in_other_places_are_refused(codec, change, tmp_path):
    """Rules 5.2 and 8.6, whatever the checksums say: each chunk and the index have theirs right."""
    root = shutil.copytree(GOLDEN / codec, tmp_path / "cache")
    path = root / "maps.zarr/expert_0/c.0.0.0.0"
    data = path.read_bytes()
    (start, first), (middle, second) = np.frombuffer(data, "<u8", 4).reshape(2, 2).tolist()
    entries = {
        "doubled": [start, first, start, first],
        "exchanged": [middle, second, start, first],
        "moved": [start + second, first, start, second],  # with the chunks themselves
    }[change]
    index = np.array(entries, "<u8").tobytes()
    body = data[middle:] + data[start:middle] if change == "moved" else data[start:]
    path.write_bytes(index + crc32c_by_hand(index).to_bytes(4, "little") + body)
    assert path.stat().st_size == len(data)
    with open_cache(root) as cache:
        assert cache.read([4]).tobytes() == make.maps()[0][[4]].tobytes()
        for rows in ([0], [2], range(4)):
            with raises("damaged", "does not follow the one before it"):
                cache.read(rows)


def test_the_last_shard_names_only_its_own_chunks():
    data = (GOLDEN / "none/maps.zarr/expert_1/c.1.0.0.0").read_bytes()
    assert np.frombuffer(data, "<u8", 4).tolist() == [36, 16, 2**64 - 1, 2**64 - 1]
    assert np.frombuffer(data, "<f2", 6, 36).tolist() == [4, 4.0625, 0, 0, 0, 0]  # the second row is filler


def test_making_it_again_needs_to_be_asked_for(monkeypatch):
    monkeypatch.setattr("sys.argv", ["make.py"])
    before = tree(GOLDEN)
    with pytest.raises(SystemExit):
        make.main()
    assert tree(GOLDEN) == before

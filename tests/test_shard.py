import numpy as np
import pytest
from builders import make_maps, make_spec, raises
from hypothesis import given
from hypothesis import strategies as st

from h2t.cache.errors import CacheError
from h2t.cache.format import shard
from h2t.cache.format.codecs import CODECS, codec
from h2t.cache.write.writer import create_group


def zarr_shard(spec, values) -> bytes:
    """The first shard as zarr-python itself writes it."""
    import zarr
    from zarr.storage import MemoryStore

    store = {}
    create_group(MemoryStore(store), spec)
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_group(MemoryStore(store), mode="r+")["expert_0"][:] = values
    return store["expert_0/c.0.0.0.0"].to_bytes()


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("rows", [1, 6, 8])
def test_shard_bytes_are_those_of_zarr_python(name, dtype, rows):
    spec = make_spec(rows=rows, codec=name, dtype=dtype, chunk_rows=2, shard_rows=8, maps=((5, 3, 2),))
    (values,) = make_maps(spec)
    padded = np.concatenate([values, np.zeros((-rows % 2, 5, 3, 2), values.dtype)])
    chunks = [codec(name).encode(padded[i : i + 2]) for i in range(0, rows, 2)]
    assert shard.join(chunks, 4) == zarr_shard(spec, values)


@given(chunks=st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=9), spare=st.integers(0, 3))
def test_chunks_come_back(chunks, spare):
    slots = len(chunks) + spare
    data = shard.join(chunks, slots)
    offsets, sizes = shard.parse_index(data[: shard.index_bytes(slots)], slots, len(chunks), len(data))
    stored = [data[o : o + s] for o, s in zip(offsets, sizes, strict=True)]
    assert all(map(shard.holds, stored))
    assert [s[:-4] for s in stored] == chunks


@given(count=st.integers(1, 9), size=st.integers(1, 50), spare=st.integers(0, 3))
def test_plain_chunks_give_the_same_shard(count, size, spare):
    chunks = np.random.default_rng(count).integers(0, 256, (count, size), np.uint8)
    assert shard.join_plain(chunks, count + spare) == shard.join([c.tobytes() for c in chunks], count + spare)


def test_every_bit_of_the_index_counts():
    data = shard.join([b"abc", b"defg"], 3)
    length = shard.index_bytes(3)
    for bit in range(8 * length):
        index = bytearray(data[:length])
        index[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CacheError, match="crc32c"):
            shard.parse_index(bytes(index), 3, 2, len(data))


def test_every_bit_of_a_chunk_counts():
    stored = shard.sealed(b"some values")
    assert shard.holds(stored)
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not shard.holds(bytes(flipped))


@pytest.mark.parametrize("stored", [b"", b"a", b"abc"])
def test_less_than_a_checksum_is_no_chunk(stored):
    assert not shard.holds(stored)


EMPTY = 2**64 - 1


@pytest.mark.parametrize(
    ("entries", "used", "says"),
    [
        pytest.param([[36, 5], [EMPTY, EMPTY]], 2, "chunk 1 is missing", id="missing"),
        pytest.param([[36, 5], [EMPTY, 5]], 2, "chunk 1 is missing", id="half missing"),
        pytest.param([[36, 5], [41, 5]], 1, "beyond the array", id="too many"),
        pytest.param([[36, 5], [41, 60]], 2, "outside the shard", id="too long"),
        pytest.param([[36, 5], [2**64 - 5, 4]], 2, "outside the shard", id="far away"),
        pytest.param([[2**64 - 2, 2**64 - 2], [41, 5]], 2, "outside the shard", id="overflow"),
        pytest.param([[36, 32], [36, 32]], 2, "chunk 1 does not follow", id="doubled"),
        pytest.param([[68, 32], [36, 32]], 2, "chunk 0 does not follow", id="exchanged"),
        pytest.param([[36, 32], [67, 33]], 2, "chunk 1 does not follow", id="overlap"),
        pytest.param([[36, 31], [68, 32]], 2, "chunk 1 does not follow", id="gap"),
        pytest.param([[35, 33], [68, 32]], 2, "chunk 0 does not follow", id="over the index"),
        pytest.param([[36, 32], [68, 31]], 2, "end at byte 99, the shard at 100", id="end"),
        pytest.param([[36, 32], [EMPTY, EMPTY]], 1, "end at byte 68, the shard at 100", id="more bytes than chunks"),
        pytest.param([[36, 31], [67, 33]], 2, "chunk 0 must have 32 bytes; got 31", id="another size"),
    ],
)
def test_an_index_that_cannot_be_is_refused(entries, used, says):
    index = shard.sealed(np.array(entries, "<u8").tobytes())
    with raises("damaged", says):
        shard.parse_index(index, 2, used, 100, 28)


def test_where_the_codec_leaves_the_sizes_free_any_may_be():
    index = shard.sealed(np.array([[36, 31], [67, 33]], "<u8").tobytes())
    offsets, sizes = shard.parse_index(index, 2, 2, 100)
    assert (offsets.tolist(), sizes.tolist()) == ([36, 67], [31, 33])


def test_an_index_of_another_length_is_refused():
    with pytest.raises(CacheError, match="36 bytes expected; got 20"):
        shard.parse_index(shard.sealed(bytes(16)), 2, 1, 100)

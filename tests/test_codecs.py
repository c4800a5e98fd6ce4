import numpy as np
import pytest
from builders import raises
from hypothesis import given
from hypothesis import strategies as st

from h2t.cache.format.codecs import CODECS, codec, zarr_codecs

DTYPES = ["<f2", "<f4", "<u2"]


def chunk(shape, dtype, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.maximum(rng.standard_normal(shape), 0) * 9).astype(dtype)


@pytest.mark.parametrize("name", CODECS)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 8), st.integers(1, 8)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(name, shape, dtype, seed):
    values = chunk(shape, dtype, seed)
    out = np.full_like(values, 7)
    codec(name).decode(memoryview(codec(name).encode(values)), out)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", CODECS)
def test_every_bit_pattern_survives(name):
    values = np.arange(2**16, dtype="<u2").view("<f2").reshape(1, 2**16, 1, 1)  # NaNs with payload, -0, subnormals
    out = np.empty_like(values)
    codec(name).decode(codec(name).encode(values), out)
    assert out.tobytes() == values.tobytes()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [1, 2, 47, 49, 300, 70_000])
def test_a_chunk_of_another_size_is_refused(name, size):
    """Also when it would fit: the rest of the buffer would be values that nobody wrote."""
    data = codec(name).encode(chunk((48,), "<f2"))
    with pytest.raises((ValueError, RuntimeError)):
        codec(name).decode(data, np.empty(size, "<f2"))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("data", [b"", b"\0", bytes(40), b"\xff" * 40], ids=["empty", "one byte", "zeros", "ones"])
def test_garbage_is_refused(name, data):
    with pytest.raises((ValueError, RuntimeError)):
        codec(name).decode(data, np.empty(1000, "<f2"))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 32767, 32768, 32769, 3_000_000])
def test_zstd_states_its_size_in_every_width(size):
    values = np.zeros(size, "<u2")
    out = np.ones_like(values)
    codec("zstd").decode(codec("zstd").encode(values), out)
    assert not out.any()


@pytest.mark.parametrize("ask", [codec, lambda name: zarr_codecs(name, 2)], ids=["codec", "zarr_codecs"])
def test_unknown_names_are_refused(ask):
    with raises("spec"):
        ask("gzip")

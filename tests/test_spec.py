import json

import numpy as np
import pytest
from builders import make_spec, raises

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import (
    FORMAT,
    CacheSpec,
    canonical_json,
    chunk_rows_for,
    grown_shard_bytes,
    parse_record,
    sha256,
    shard_rows_for,
    to_float32,
)


def record(spec: CacheSpec | None = None) -> bytes:
    spec = spec or make_spec()
    names = [spec.shard_file(e, s) for e in range(spec.experts) for s in range(spec.shards)]
    return spec.record(dict.fromkeys(["rows.parquet", *names], (1000, "0" * 64)))


def sealed(**changes) -> bytes:
    """The record with changed fields (dotted), its own digest true again."""
    body = json.loads(record())
    del body["self"]
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = body
        for parent in parents:
            at = at[int(parent)] if isinstance(at, list) else at[parent]
        at[last] = value
    body["self"] = sha256(canonical_json(body))
    return canonical_json(body)


@pytest.mark.parametrize("overrides", [{}, {"rows": 1, "maps": ((1, 1, 1),)}, {"maps": ((2, 3, 4), (5, 1, 1))}])
def test_record_comes_back_as_the_same_spec(overrides):
    spec = make_spec(**overrides)
    commit = parse_record(record(spec))
    assert commit.spec == spec
    assert commit.files["rows.parquet"] == (1000, "0" * 64)


def test_fingerprint_covers_values_and_not_bytes():
    base = make_spec().fingerprint
    same = [{"codec": "zstd"}, {"chunk_rows": 2}, {"shard_rows": 8}, {"provenance": {"numpy": "3"}}]
    other = [{"dtype": "bfloat16"}, {"fingerprint_inputs": {"backbone": "c"}}]
    assert [make_spec(**o).fingerprint == base for o in same] == [True] * len(same)
    assert [make_spec(**o).fingerprint == base for o in other] == [False] * len(other)


def test_fingerprint_is_the_stated_sha256():
    spec = make_spec(fingerprint_inputs={"b": 1, "a": "é"})
    assert spec.fingerprint == sha256('{"dtype":"float16","inputs":{"a":"é","b":1}}'.encode())


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"rows": 0}, id="no rows"),
        pytest.param({"maps": ()}, id="no experts"),
        pytest.param({"maps": ((3, 0, 2),)}, id="empty map"),
        pytest.param({"maps": ((3, 2),)}, id="two dimensions"),
        pytest.param({"dtype": "float64"}, id="dtype"),
        pytest.param({"chunk_rows": 0}, id="chunk of nothing"),
        pytest.param({"chunk_rows": 3, "shard_rows": 4}, id="shard not whole chunks"),
    ],
)
def test_impossible_specs_are_refused(overrides):
    with raises("spec"):
        make_spec(**overrides)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff\xfe", id="not utf-8"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b'{"format":' + b"9" * 5000 + b"}", id="long number"),
        pytest.param(record()[:-1], id="cut"),
        pytest.param(record() + b"\n", id="newline added"),
        pytest.param(json.dumps(json.loads(record())).encode(), id="not canonical"),
        pytest.param(sealed(format=0), id="format 0"),
        pytest.param(sealed(format=True), id="format true"),
        pytest.param(sealed(layout__index="end"), id="index at the end"),
        pytest.param(sealed(layout__chunk_rows=1.0), id="fractional chunk"),
        pytest.param(sealed(layout__shard_rows="4"), id="text for a number"),
        pytest.param(sealed(rows=2**62), id="rows without shards"),
        pytest.param(sealed(experts__0__shape=[2**62, 3, 2, 2]), id="rows differ"),
        pytest.param(sealed(experts__0__shape=[11, 3, 2]), id="shape too short"),
        pytest.param(sealed(fingerprint="0" * 64), id="fingerprint"),
        pytest.param(sealed(fingerprint_inputs=3), id="inputs"),
        pytest.param(sealed(files={}), id="no files"),
        pytest.param(sealed(files=[]), id="files a list"),
        pytest.param(sealed(layout__chunk_rows=1, layout__shard_rows=2**40), id="index larger than its shard"),
    ],
)
def test_damaged_records_are_refused(data):
    with raises("damaged"):
        parse_record(data)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "a\\b", "a\x00b", "", "a//b", "./a"])
def test_file_names_stay_inside_the_cache(name):
    body = json.loads(record())
    del body["self"]
    body["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    body["self"] = sha256(canonical_json(body))
    with raises("damaged"):
        parse_record(canonical_json(body))


def test_a_newer_format_is_refused_by_name():
    with raises("newer-format", f"format {FORMAT + 1}"):
        parse_record(sealed(format=FORMAT + 1))


def test_every_byte_of_the_record_counts():
    data = record()
    for at in range(len(data)):
        with pytest.raises(CacheError):
            parse_record(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_canonical_json():
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'.encode()
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("row_bytes", "chunk_rows"), [(1, 65536), (4096, 16), (8191, 8), (8192, 1), (100_000, 1), (2**31, 1)]
)
def test_rows_of_8_kib_are_chunks_of_their_own_and_smaller_ones_fill_64_kib(row_bytes, chunk_rows):
    assert chunk_rows_for(row_bytes) == chunk_rows


def test_shards_hold_whole_chunks_and_at_least_one():
    assert shard_rows_for(1000, 3, 10_000) == 9
    assert shard_rows_for(1000, 3, 1) == 3


@pytest.mark.parametrize(
    ("cache_bytes", "mebibytes"),
    [(1, 128), (4096 * 128 * 2**20, 128), (4096 * 128 * 2**20 + 1, 256), (10**12, 256), (10**13, 512), (10**15, 512)],
)
def test_shards_of_a_large_cache_are_larger(cache_bytes, mebibytes):
    assert grown_shard_bytes(128 * 2**20, cache_bytes) == mebibytes * 2**20
    assert grown_shard_bytes(2**30, cache_bytes) == 2**30  # never smaller than asked for


def test_shard_ranges_partition_the_rows():
    spec = make_spec(rows=11, shard_rows=4)
    assert [list(spec.shard_range(s)) for s in range(spec.shards)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert spec.shard_file(2, 1) == "maps.zarr/expert_2/c.1.0.0.0"


def test_bfloat16_bits_as_float32():
    bits = np.array([0x3F80, 0xC000, 0x7F80, 0x0001], np.uint16)
    assert to_float32(bits, "bfloat16").tolist() == [1.0, -2.0, np.inf, 2.0**-133]
    assert to_float32(np.array([0.5], np.float16), "float16").dtype == np.float32

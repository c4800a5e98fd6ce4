"""A stranger's cache: its names, links, shapes, bombs and lies end in one line, and nothing else is touched.

Small random ones are in tests/fuzz; here stands one example of each kind, by the entry points that people use.
"""

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from builders import make_cache, make_rows, make_spec, raises, reseal, reseal_file, table_bytes, table_in, tree
from pipeline_builders import accepted, invoke, make_samples, make_stage2_cache, python, write_params

from h2t.cache.errors import CacheError
from h2t.cache.format import codecs, shard
from h2t.cache.format.rows import SCHEMA
from h2t.cache.format.spec import ROWS, canonical_json, sha256
from h2t.cache.read.dvc_files import members
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify


def refused(*arguments) -> str:
    """The one line of a refusal by the command line."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1, result.output
    text = result.stderr or result.stdout
    assert text.endswith("\n")
    assert text[:-1].isprintable(), text
    return text


def read_all(location) -> np.ndarray:
    with open_cache(location) as cache:
        cache.rows, cache.statistics  # noqa: B018 - both are read from files
        return cache.read(np.arange(cache.spec.rows))


# Names and links.


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "maps.zarr/../../up", "a\nb", "a\\b", "\x1b[2Jx"])
def test_a_name_outside_of_the_cache_is_refused(tmp_path, name):
    make_cache(tmp_path / "c")
    reseal(tmp_path / "c", lambda body: body["files"].__setitem__(name, {"bytes": 1, "sha256": "0" * 64}))
    for command in ("info", "verify", "stats"):
        assert "not the name of a file in the cache" in refused("cache", command, tmp_path / "c")


@pytest.mark.parametrize("digest", ["VICTIM", "../../victim", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "", 5, None])
def test_a_digest_names_a_folder_of_the_block_cache_and_nothing_else(tmp_path, monkeypatch, digest):
    """A digest that is a path would have blocks written there, and the folder removed as soon as one did not hold."""
    import fsspec

    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_text("precious")
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(tmp_path / "cache" / "blocks"))
    make_cache(tmp_path / "c")
    name = make_spec().shard_file(0, 0)
    path = tmp_path / "c" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")  # a chunk that does not hold
    said = str(victim) if digest == "VICTIM" else digest
    reseal(tmp_path / "c", lambda body: body["files"][name].__setitem__("sha256", said))
    store = fsspec.filesystem("memory")
    store.put(str(tmp_path / "c"), f"/{tmp_path.name}", recursive=True)
    with raises("damaged", "a sha256 expected"):
        read_all(f"memory://{tmp_path.name}")
    assert tree(victim) == {"precious": b"precious"}


@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/dev/null", "..", "nowhere", ROWS])
@pytest.mark.parametrize("size", [None, 0])
@pytest.mark.parametrize("name", [ROWS, "batchnorm.safetensors", "maps.zarr/expert_0/c.0.0.0.0"])
def test_a_link_to_something_else_is_never_taken_for_the_file(tmp_path, name, target, size):
    """DVC links the files of a workspace, so links are followed; what is there must be what the record says."""
    make_cache(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    (tmp_path / "c" / name).symlink_to(target)
    if size is not None and "/c." not in name:
        reseal(tmp_path / "c", lambda body: body["files"][name].__setitem__("bytes", size))
    with pytest.raises(CacheError) as error:
        read_all(tmp_path / "c")
    assert error.value.reason in ("damaged", "missing")
    assert "root:" not in str(error.value)
    assert any(name in str(fault) for fault in verify(tmp_path / "c"))


def test_a_pipe_is_not_waited_for(tmp_path):
    make_cache(tmp_path / "c")
    (tmp_path / "c" / ROWS).unlink()
    os.mkfifo(tmp_path / "c" / ROWS)
    reseal(tmp_path / "c", lambda body: body["files"][ROWS].__setitem__("bytes", 0))
    assert "not a plain file" in refused("cache", "info", tmp_path / "c")


# Absurd shapes, in a process that may not take the memory.


def _shaped(**layout):
    def change(body):
        body["rows"] = layout.get("rows", body["rows"])
        for expert in body["experts"]:
            expert["shape"] = [body["rows"], *layout.get("shape", expert["shape"][1:])]
        body["experts"] *= layout.get("experts", 1)
        body["layout"] |= {k: v for k, v in layout.items() if k in ("chunk_rows", "shard_rows")}
        for entry in body["files"].values():
            entry["bytes"] = layout.get("bytes", entry["bytes"])

    return change


ABSURD = {
    "rows": _shaped(rows=2**62),
    "maps": _shaped(shape=(2**31, 2**31, 2**31)),
    "one map": _shaped(shape=(2**31, 1, 1)),
    "chunk": _shaped(chunk_rows=2**40, shard_rows=2**40),
    "shard": _shaped(shard_rows=2**40),
    "rows in few shards": _shaped(rows=2**40, shard_rows=2**40, bytes=2**45),
    "experts": _shaped(experts=10**4),
    "bytes": _shaped(bytes=2**63),
}

OPENER = """
import resource, sys
import numpy as np
from h2t.cache.errors import CacheError
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
import zarr

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 512 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        with open_cache(path) as cache:
            cache.rows
            cache.read(np.arange(min(cache.spec.rows, 8)))
        print("read", path)
    except CacheError as error:
        print(error.reason, error)
    faults = verify(path)
    print(len(faults) > 0, str(faults[0])[:100])
print("grown", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def opened_in_little_memory(*paths: Path) -> list[str]:
    """Two lines for each cache: reason and text of the refusal, and the first fault; last, the kilobytes it took."""
    return python("-c", OPENER, *paths, timeout=120).splitlines()


def bomb_in_a_chunk(target: Path, codec: str, payload: bytes) -> Path:
    """A cache, consistent in itself, whose first chunk is `payload`."""
    make_cache(target, codec=codec)
    spec = make_spec(codec=codec)
    name = spec.shard_file(0, 0)
    chunks = [payload, *[codecs.codec(codec).encode(np.zeros((1, 3, 2, 2), "<f2"))] * 3]
    (target / name).write_bytes(shard.join(chunks, spec.chunks_per_shard))
    reseal_file(target, name)
    return target


def table_bomb(rows: int, length: int) -> bytes:
    """A row table of kilobytes whose one source, repeated, would take `rows` times `length` bytes."""
    table = make_rows(min(rows, 11)).take(pa.array(np.arange(rows) % min(rows, 11)))
    table = table.set_column(0, SCHEMA.field("row"), pa.array(range(rows), pa.int64()))
    text = pa.array(["A" * length]).take(pa.array(np.zeros(rows, np.int32)))
    return table_bytes(table.set_column(6, SCHEMA.field("source"), text))


def zstd_frame(size: int) -> bytes:
    """A Zstandard frame that says it holds `size` bytes (RFC 8878): one block of one byte, repeated."""
    block = (1 | 1 << 1 | min(size, 2**17) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0b11 << 6 | 1 << 5]) + size.to_bytes(8, "little") + block + b"\0"


def test_absurd_shapes_and_bombs_are_refused_in_little_memory(tmp_path):
    paths = []
    for number, (name, change) in enumerate(ABSURD.items()):
        paths.append(tmp_path / f"{number} {name}")
        make_cache(paths[-1])
        reseal(paths[-1], change)
    huge = np.zeros(2**25, "<f2")  # 64 MB of zeros
    for codec in ("zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"):
        payload = codecs.codec(codec).encode(huge)
        assert len(payload) < 2**19
        paths.append(bomb_in_a_chunk(tmp_path / codec, codec, payload))
    paths.append(bomb_in_a_chunk(tmp_path / "terabyte", "zstd", zstd_frame(2**40)))
    blosc = bytearray(codecs.codec("blosc-lz4").encode(np.zeros(12, "<f2")))
    blosc[4:8] = (2**31 - 1).to_bytes(4, "little")
    paths.append(bomb_in_a_chunk(tmp_path / "blosc header", "blosc-lz4", bytes(blosc)))
    lies = bytearray(codecs.codec("blosc-lz4").encode(np.zeros(12, "<f2")))
    lies[12:16] = (2**30).to_bytes(4, "little")  # Blosc reads as far as its header says
    paths.append(bomb_in_a_chunk(tmp_path / "blosc length", "blosc-lz4", bytes(lies)))
    *lines, grown = opened_in_little_memory(*paths)
    for path, told, fault in zip(paths, lines[::2], lines[1::2], strict=True):
        assert told.split()[0] in ("damaged", "full", "spec", "missing"), (path.name, told)
        assert fault.startswith("True"), (path.name, fault)
    assert int(grown.split()[1]) < 200 * 1024


def test_a_row_table_that_grows_beyond_memory_is_refused(monkeypatch):
    from h2t.cache.format import rows

    data = table_bomb(rows=500, length=2**16)
    assert len(data) < 100_000
    assert len(table_in(data, 500)) == 500  # 33 MB are no bomb
    monkeypatch.setattr(rows, "available_memory", lambda: 20 * 2**20)
    with raises("full", r"would take 32\.8 MB of memory"):
        table_in(data, 500)
    monkeypatch.setattr(rows, "available_memory", lambda: 1000)
    with pytest.raises(CacheError, match="more than there is free"):
        table_in(table_bytes(make_rows(100)), 100)


def test_a_number_of_rows_is_not_believed():
    """2**40 rows where 11 are: nothing is allocated for them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises("damaged", "must number rows 0 to"):
        table_in(table_bytes(make_rows(11)), 2**40)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


# Lies in the row table, and texts that are none.


def _column(name, values):
    return lambda table: table.set_column(
        SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
    )


def _not_utf8(table):
    text = pa.array([b"\xff\xfe", *[b"x"] * 10], pa.binary()).view(pa.string())
    return table.set_column(6, SCHEMA.field("source"), text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_column("label", [-1] * 11), "at least 0"),
        (_column("view", [-1] * 11), "at least 0"),
        (_column("sample", [-(2**63)] * 11), "at least 0"),
        (_column("row", [2**63 - 1] * 11), "must number rows"),
        (_not_utf8, "UTF8"),
        (lambda table: table.slice(0, 0), "must number rows"),
    ],
    ids=["label", "view", "sample", "row", "utf-8", "no rows"],
)
def test_a_row_table_with_impossible_values_is_refused(tmp_path, change, says):
    make_cache(tmp_path / "c")
    (tmp_path / "c" / ROWS).write_bytes(table_bytes(change(make_rows(11))))
    reseal_file(tmp_path / "c", ROWS)
    command = "verify" if says == "UTF8" else "info"  # info reads no sources
    assert says in refused("cache", command, tmp_path / "c")


def test_rows_of_the_same_identity_are_a_fault(tmp_path):
    make_cache(tmp_path / "c")
    (tmp_path / "c" / ROWS).write_bytes(table_bytes(_column("source", ["same"] * 11)(make_rows(11))))
    reseal_file(tmp_path / "c", ROWS)
    assert "two rows have the same" in refused("cache", "verify", tmp_path / "c")


@pytest.mark.parametrize(
    "text",
    [
        b'{"format":1' + b"0" * 5000 + b"}",
        b"[" * 10**6,
        b'{"format":' * 10**5,
        b'{"format":1e400}',
        b'{"format":NaN}',
        b'{"format":-1}',
        b"\xff" * 100,
        b'{"format":1,"format":2}',
        b'"\\ud800"',
        b"",
    ],
    ids=["long number", "deep list", "deep object", "1e400", "NaN", "-1", "not utf-8", "twice", "surrogate", "empty"],
)
def test_a_record_that_is_none(tmp_path, text):
    make_cache(tmp_path / "c")
    (tmp_path / "c" / "cache.json").write_bytes(text)
    assert "cache.json" in refused("cache", "info", tmp_path / "c")


@pytest.mark.parametrize(
    "listing",
    [
        b'[{"md5":"../../../../etc/passwd","relpath":"cache.json"}]',
        b'[{"md5":"0123456789abcdef0123456789abcdeF","relpath":"cache.json"}]',
        b'[{"md5":5,"relpath":"a"}]',
        b'[{"relpath":"a"}]',
        b"[1]",
        b"{",
        b"[" * 9999,
    ],
)
def test_an_md5_in_a_list_of_dvc_is_an_md5(listing):
    with raises("damaged", "DVC's list of files"):
        members(listing)


# Lies in what decides nothing for the reader, but something for stage II.


def with_its_fingerprint(change):
    """`change` to a record whose fingerprint is that of its inputs all the same."""

    def whole(body):
        change(body)
        inputs = {"inputs": body["fingerprint_inputs"], "dtype": body["layout"]["dtype"]}
        body["fingerprint"] = sha256(canonical_json(inputs))

    return whole


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["provenance"].pop("classes"),
        lambda body: body["provenance"].__setitem__("classes", {"a": 1}),
        lambda body: body["provenance"].__setitem__("classes", [1, None, "\x1b[2J"]),
        lambda body: body["provenance"].__setitem__("classes", ["only one"]),
        lambda body: body["provenance"].__setitem__("counts", 7),
        lambda body: body["provenance"].__setitem__("counts", [2**63] * 3),
        lambda body: body["fingerprint_inputs"].__setitem__("backbone", "text"),
        lambda body: body["fingerprint_inputs"].__setitem__("backbone", {"weights": ["\n"]}),
        lambda body: body["fingerprint_inputs"].__setitem__("pool", {"a": "\n"}),
    ],
    ids=["none", "object", "numbers", "one", "count", "counts", "text", "list", "pool"],
)
def test_a_record_that_does_not_suit_stage_two(tmp_path, change):
    cache = make_stage2_cache(tmp_path / "c", backbone="none", train=("stage1",), evaluation=("stage1",))
    reseal(cache, with_its_fingerprint(change))
    params = write_params(tmp_path / "p.yaml", hosts__dr__batchnorm="stage1", hosts__dr__host="crt")
    refused("train-classifier", "dr", cache, "none", tmp_path / "h", "--params", params, "--device", "cpu")
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("fingerprint_inputs", "backbone", "text"),
        ("fingerprint_inputs", "batchnorm", ["a"]),
        ("fingerprint_inputs", "transform", None),
        ("fingerprint_inputs", "views", {}),
        ("fingerprint_inputs", "views", {"seed": "\x1b[2J"}),
        ("fingerprint_inputs", "parent", 7),
        ("provenance", "batch_size", 0),
        ("provenance", "batch_size", "many"),
        ("provenance", "batch_size", 2**62),
        ("provenance", "precision", ["\n"]),
        ("provenance", "statistics_from", {"a": 1}),
    ],
)
def test_a_record_that_does_not_suit_extraction(tmp_path, backbone_dir, digits_cache, part, key, value):
    """Asked why, recomputed, and as a source of statistics and rows: one line each, and nothing written."""
    shutil.copytree(digits_cache, tmp_path / "b")
    reseal(tmp_path / "b", with_its_fingerprint(lambda body: body[part].__setitem__(key, value)))
    make_samples(tmp_path / "prepare")
    params = ("--params", write_params(tmp_path / "p.yaml", extract__max_views=2))
    inputs = ("--samples", tmp_path / "prepare", "--backbone", backbone_dir)
    refused("cache", "verify", tmp_path / "b", "--recompute", "3", "--device", "cpu", *inputs, *params)
    refused("cache", "why", tmp_path / "b", "--name", "ce_mixup", *inputs, *params)
    setting = ("--set", f"extract.statistics_from={tmp_path}/b", "--device", "cpu")
    line = refused("extract", "ce_mixup", tmp_path / "prepare", backbone_dir, tmp_path / "out", *params, *setting)
    assert line.startswith("error: extract.statistics_from: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_maps_that_are_no_numbers_train_nothing(tmp_path, value):
    def change(maps, rows):
        maps[0][rows["split"].to_numpy() == "train"] = value

    cache = make_stage2_cache(
        tmp_path / "c", backbone="none", train=("stage1",), evaluation=("stage1",), change=change
    )  # fmt: skip
    params = write_params(tmp_path / "p.yaml", hosts__dr__batchnorm="stage1", hosts__dr__host="crt")
    said = refused("train-classifier", "dr", cache, "none", tmp_path / "h", "--params", params, "--device", "cpu")
    assert "NaN" in said or "finite" in said
    assert not (tmp_path / "h").exists()


def test_what_a_cache_says_of_itself_cannot_steer_a_terminal(tmp_path):
    spec = {"provenance": {"note\n": "a\nsound: 1 rows\x1b[2J", "list": ["\u202e\x07"]}}
    make_cache(tmp_path / "c", **spec)
    result = accepted("cache", "info", str(tmp_path / "c"))
    assert all(line.isprintable() for line in result.split("\n"))
    assert "\nsound" not in result
    assert json.loads(accepted("cache", "info", "--json", tmp_path / "c"))

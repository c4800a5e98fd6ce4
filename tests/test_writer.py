import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from builders import TOKEN, make_cache, make_maps, make_rows, make_spec, make_statistics, raises, tree, write_cache

from h2t.cache.format.codecs import CODECS
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter, committed

ROOT = Path(__file__).parents[1]


def writer_in(staging, spec=None, token=TOKEN) -> CacheWriter:
    spec = spec or make_spec()
    return CacheWriter(staging, spec, make_rows(spec.rows), token)


def part(spec, shard) -> list[np.ndarray]:
    held = spec.shard_range(shard)
    return [m[held.start : held.stop] for m in make_maps(spec)]


def write_some(target, spec, shards, token=TOKEN) -> Path:
    """Writes some shards and stops without a commit; returns the staging directory."""
    with Staging(target) as staging:
        writer = writer_in(staging, spec, token)
        for shard in shards:
            writer.write(shard, part(spec, shard))
        return staging.root


def pending(target, spec, token=TOKEN) -> list[int]:
    with Staging(target) as staging:
        return writer_in(staging, spec, token).pending


@pytest.mark.parametrize("name", CODECS)
def test_the_same_input_gives_the_same_bytes(tmp_path, name):
    for target in ("a", "b"):
        make_cache(tmp_path / target, codec=name, chunk_rows=2, maps=((4, 3, 3), (2, 1, 1)))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_one_row_of_one_value(cache_dir):
    make_cache(cache_dir, rows=make_rows(1), maps=((1, 1, 1),))
    assert committed(cache_dir) == make_spec(rows=1, maps=((1, 1, 1),))


def test_files_of_a_cache(cache_dir):
    make_cache(cache_dir, maps=((3, 2, 2), (1, 1, 1)))
    arrays = [
        f"maps.zarr/expert_{e}/{name}" for e in (0, 1) for name in ("zarr.json", *(f"c.{s}.0.0.0" for s in range(3)))
    ]
    others = ["README.md", "batchnorm.safetensors", "cache.json", "maps.zarr/zarr.json", "rows.parquet"]
    assert sorted(tree(cache_dir)) == sorted(arrays + others)
    assert set(json.loads((cache_dir / "cache.json").read_bytes())["files"]) == {*arrays, *others} - {"cache.json"}
    assert list(cache_dir.parent.iterdir()) == [cache_dir]


def test_order_and_threads_do_not_matter(tmp_path):
    spec = make_spec(rows=50, shard_rows=2)
    make_cache(tmp_path / "a", rows=make_rows(50), shard_rows=2)
    with Staging(tmp_path / "b") as staging:
        writer = writer_in(staging, spec)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda s: writer.write(s, part(spec, s)), reversed(writer.pending)))
        writer.commit(make_statistics(), b"# A cache\n")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("shard", "maps", "reason"),
    [
        pytest.param(0, [np.zeros((3, 3, 2, 2), "<f2")], "mismatch", id="rows"),
        pytest.param(0, [np.zeros((4, 3, 2, 1), "<f2")], "mismatch", id="shape"),
        pytest.param(0, [np.zeros((4, 3, 2, 2), "<f4")], "mismatch", id="dtype"),
        pytest.param(2, [np.zeros((4, 3, 2, 2), "<f2")], "mismatch", id="last shard"),
        pytest.param(0, [], "mismatch", id="no expert"),
        pytest.param(0, [np.zeros((4, 3, 2, 2), "<f2")] * 2, "mismatch", id="too many experts"),
        pytest.param(3, [np.zeros((0, 3, 2, 2), "<f2")], "out-of-range", id="no such shard"),
        pytest.param(-1, [np.zeros((4, 3, 2, 2), "<f2")], "out-of-range", id="negative shard"),
    ],
)
def test_maps_that_do_not_fit_are_refused(cache_dir, shard, maps, reason):
    with Staging(cache_dir) as staging:
        writer = writer_in(staging)
        with raises(reason):
            writer.write(shard, maps)
        assert writer.pending == [0, 1, 2]


def test_a_row_table_of_another_length_is_refused(cache_dir):
    with Staging(cache_dir) as staging, raises("mismatch"):
        CacheWriter(staging, make_spec(), make_rows(10), TOKEN)


def test_no_commit_before_every_shard(cache_dir):
    with Staging(cache_dir) as staging:
        writer = writer_in(staging)
        writer.write(1, part(make_spec(), 1))
        with raises("incomplete"):
            writer.commit(b"", b"")
    assert not cache_dir.exists()


def test_a_committed_cache_is_not_overwritten(cache_dir):
    make_cache(cache_dir)
    before = tree(cache_dir)
    other = make_spec(fingerprint_inputs={"backbone": "c"})
    with raises("exists"):
        write_cache(cache_dir, other, make_rows(), make_maps(other, seed=1))
    assert tree(cache_dir) == before
    write_cache(cache_dir, other, make_rows(), make_maps(other, seed=1), replace=True)
    assert committed(cache_dir) == other
    assert list(cache_dir.parent.iterdir()) == [cache_dir]


def keep_a_file(place):
    place.write_text("mine")


def keep_a_folder(place):
    place.mkdir()
    (place / "thesis.txt").write_text("mine")


def keep_a_readme(place):
    place.mkdir()
    (place / "README.md").write_text("mine")


def keep_a_note_in_a_cache(place):
    make_cache(place, seed=1)
    (place / "thesis.txt").write_text("mine")


@pytest.mark.parametrize("keep", [keep_a_file, keep_a_folder, keep_a_readme, keep_a_note_in_a_cache])
def test_replacing_a_cache_deletes_nothing_else(cache_dir, keep):
    keep(cache_dir)
    before = tree(cache_dir) if cache_dir.is_dir() else cache_dir.read_text()
    spec = make_spec()
    with raises("exists"):
        committed(cache_dir)
        write_cache(cache_dir, spec, make_rows(), make_maps(spec), replace=True)
    assert (tree(cache_dir) if cache_dir.is_dir() else cache_dir.read_text()) == before


def test_replacing_a_link_leaves_what_it_leads_to(cache_dir):
    make_cache(cache_dir.with_name("target"), seed=1)
    before = tree(cache_dir.with_name("target"))
    cache_dir.symlink_to(cache_dir.with_name("target"))
    spec = make_spec()
    write_cache(cache_dir, spec, make_rows(), make_maps(spec), replace=True)
    assert tree(cache_dir.with_name("target")) == before
    assert not cache_dir.is_symlink()


def test_a_second_writer_is_refused(cache_dir):
    with Staging(cache_dir) as staging:
        writer_in(staging)
        with raises("busy"):
            make_cache(cache_dir)


class TestResume:
    spec = make_spec(rows=48, shard_rows=4)

    def uninterrupted(self, tmp_path) -> dict[str, bytes]:
        write_cache(tmp_path / "whole", self.spec, make_rows(48), make_maps(self.spec))
        return tree(tmp_path / "whole")

    def resumed(self, target) -> dict[str, bytes]:
        write_cache(target, self.spec, make_rows(48), make_maps(self.spec))
        return tree(target)

    def test_finished_shards_are_kept(self, cache_dir, tmp_path):
        root = write_some(cache_dir, self.spec, [0, 3, 7])
        before = {p: p.stat().st_ino for p in (root / "cache").rglob("c.*")}
        assert len(before) == 3
        assert pending(cache_dir, self.spec) == [1, 2, 4, 5, 6, 8, 9, 10, 11]
        assert {p: p.stat().st_ino for p in (root / "cache").rglob("c.*")} == before
        assert self.resumed(cache_dir) == self.uninterrupted(tmp_path)

    def test_a_torn_journal_line_is_no_entry(self, cache_dir, tmp_path):
        root = write_some(cache_dir, self.spec, [0, 1, 2])
        journal = (root / "journal").read_bytes()
        (root / "journal").write_bytes(journal[:-20])
        assert pending(cache_dir, self.spec)[0] == 2
        assert self.resumed(cache_dir) == self.uninterrupted(tmp_path)

    @pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
    def test_a_shard_that_differs_from_the_journal_is_written_again(self, cache_dir, tmp_path, damage):
        root = write_some(cache_dir, self.spec, [0, 1, 2])
        path = root / "cache" / self.spec.shard_file(0, 1)
        data = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
        assert pending(cache_dir, self.spec)[0] == 1
        assert self.resumed(cache_dir) == self.uninterrupted(tmp_path)

    def test_files_that_the_journal_does_not_name_go(self, cache_dir, tmp_path):
        root = write_some(cache_dir, self.spec, [0])
        for name in ("maps.zarr/expert_0/c.5.0.0.0", "maps.zarr/expert_0/c.6.0.0.0.partial", "cache.json"):
            (root / "cache" / name).write_bytes(b"left over")
        assert pending(cache_dir, self.spec)[0] == 1
        assert self.resumed(cache_dir) == self.uninterrupted(tmp_path)

    @pytest.mark.parametrize(
        ("overrides", "token"),
        [
            pytest.param({}, {"batch_size": 5}, id="token"),
            pytest.param({"codec": "zstd"}, TOKEN, id="layout"),
            pytest.param({"fingerprint_inputs": {"backbone": "c"}}, TOKEN, id="fingerprint"),
        ],
    )
    def test_shards_of_another_attempt_are_not_mixed_in(self, cache_dir, overrides, token):
        write_some(cache_dir, self.spec, [0, 1])
        other = make_spec(**{"rows": 48, "shard_rows": 4, **overrides})
        assert pending(cache_dir, other, token) == list(range(12))

    def test_what_staging_keeps_beside_the_cache_stays(self, cache_dir):
        with Staging(cache_dir) as staging:
            staging.keep("batchnorm.safetensors", b"statistics")
            writer_in(staging, self.spec)
            assert staging.kept("batchnorm.safetensors") == b"statistics"


WRITE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from pathlib import Path
from builders import make_maps, make_rows, make_spec, write_cache
spec = make_spec(**eval(sys.argv[3]))
rows, maps = make_rows(spec.rows), make_maps(spec)
"""


def test_writing_reads_no_shard(tmp_path):
    """Counts opens: every shard is opened once, for writing; none is opened to be read, modified and written back."""
    script = WRITE + (
        "opens = []\n"
        "def hook(event, args):\n"
        "    if event == 'open' and '/c.' in str(args[0]): opens.append((Path(args[0]).name, args[1].strip('bt')))\n"
        "sys.addaudithook(hook)\n"
        "write_cache(Path(sys.argv[2]), spec, rows, maps)\n"
        "print(opens)\n"
    )
    for codec in ("none", "zstd"):
        arguments = [str(ROOT), str(tmp_path / codec), str({"codec": codec})]
        out = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, check=True, text=True)
        opens = eval(out.stdout)
        assert sorted(opens) == [(f"c.{s}.0.0.0.partial", "w") for s in range(3)]


# One process imports, then forks a child per kill, which costs milliseconds instead of a second of imports.
FORKED = """
import os, random, signal
import zarr
from builders import tree
steps = int(sys.argv[4])
target = Path(sys.argv[2])
def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            import traceback; traceback.print_exc(); os._exit(3)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def write(out=target):
    write_cache(out, spec, rows, maps)
def counted(limit, report=None):
    state = [0]
    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(target.parent) in str(args[0]):
            state[0] += 1
            if state[0] > limit:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    write()
    if report:
        report.write_text(str(state[0]))
count = target.parent / "count"
assert child(lambda: counted(10**9, count)) == 0
total = int(count.read_text())
whole = tree(target)
struck = []
for limit in sorted(random.Random(3).sample(range(total), min(steps, total))):
    import shutil
    shutil.rmtree(target, ignore_errors=True)
    code = child(lambda: counted(limit))
    assert code == -signal.SIGKILL, code
    journal = target.parent / f".{target.name}.staging" / "journal"
    struck.append(journal.read_bytes().count(b"\\n") if journal.exists() else -1)
    if target.exists():
        assert tree(target) == whole, limit
        assert child(lambda: shutil.rmtree(target)) == 0
    assert child(write) == 0
    assert tree(target) == whole, limit
print(total, struck)
"""


@pytest.mark.faults
def test_killed_at_any_file_operation_it_resumes_to_the_same_bytes(tmp_path):
    """SIGKILL just before the k-th open, rename, removal or mkdir, for a sample of all k (all with H2T_FULL=1)."""
    steps = 10**6 if os.environ.get("H2T_FULL") else 24
    overrides = {"rows": 13, "shard_rows": 1, "maps": ((2, 1, 1), (1, 1, 1))}
    arguments = [str(ROOT), str(tmp_path / "c"), str(overrides), str(steps)]
    done = subprocess.run(
        [sys.executable, "-c", WRITE + FORKED, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    total, struck = done.stdout.split(maxsplit=1)
    assert int(total) > 100
    assert sum(1 <= n < 13 for n in eval(struck)) >= 8


def test_writing_beside_a_reader_of_the_journal(cache_dir):
    """Threads journal whole lines: after concurrent writes every line is an entry."""
    spec = make_spec(rows=64, shard_rows=1)
    with Staging(cache_dir) as staging:
        writer = writer_in(staging, spec)
        threads = [threading.Thread(target=writer.write, args=(s, part(spec, s))) for s in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (staging.root / "journal").read_bytes().count(b"\n") == 64
    assert pending(cache_dir, spec) == []

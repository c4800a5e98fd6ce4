"""A disk that fills up or turns read-only under a writer. Needs root, for a file system of its own."""

import errno
import os
import shutil
import subprocess

import pytest
from builders import TOKEN, make_maps, make_rows, make_spec, make_statistics, raises, tree, write_cache
from pipeline_builders import refused
from repositories import cache_repository, git

from h2t.cache.errors import CacheError
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.sharing.repository import in_one_line

pytestmark = pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_keeps_what_was_finished_and_resumes_when_there_is_room(small_disk, tmp_path):
    overrides = {"rows": 12, "shard_rows": 1, "maps": ((16, 16, 16),)}  # 8 KiB each, 96 KiB in all
    spec = make_spec(**overrides)
    rows, maps = make_rows(12), make_maps(spec)
    write_cache(tmp_path / "whole", spec, rows, maps)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1024 * 1024 - 80 * 1024))
    target = small_disk / "cache"
    with raises("full"):
        write_cache(target, spec, rows, maps)
    assert not target.exists()
    with Staging(target) as staging:
        left = CacheWriter(staging, spec, rows, TOKEN).pending
    assert left[0] > 0
    assert left == list(range(left[0], 12))
    ballast.unlink()
    write_cache(target, spec, rows, maps)
    assert tree(target) == tree(tmp_path / "whole")


class Failing:
    """An ext4 file system on `place` that can give up, as after an error of the disk, and be mounted anew."""

    def __init__(self, room):
        self.place, self.image = room / "disk", room / "image"
        self.place.mkdir()
        with self.image.open("wb") as image:
            image.truncate(8 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)

    def mount(self) -> subprocess.CompletedProcess:
        return subprocess.run(["mount", "-o", "loop", self.image, self.place], capture_output=True, check=False)

    def unmount(self) -> None:
        subprocess.run(["umount", self.place], check=True)

    def give_up(self) -> None:
        subprocess.run(["mount", "-o", "remount,abort", self.place], check=True)


@pytest.fixture
def failing(tmp_path):
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4")
    disk = Failing(tmp_path)
    if (mounted := disk.mount()).returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr.decode().strip()}")
    yield disk
    disk.unmount()


@pytest.mark.parametrize("step", ["before", "between shards", "before the commit"])
def test_a_disk_that_turns_read_only_is_one_error_and_loses_no_shard(failing, tmp_path, step):
    overrides = {"rows": 4, "shard_rows": 1, "maps": ((16, 16, 16),)}
    spec, rows = make_spec(**overrides), make_rows(4)
    maps = make_maps(spec)
    write_cache(tmp_path / "whole", spec, rows, maps)
    target = failing.place / "cache"
    with pytest.raises(CacheError) as error:
        if step == "before":
            failing.give_up()
        with Staging(target) as staging:
            writer = CacheWriter(staging, spec, rows, TOKEN)
            for shard in writer.pending:
                if step == "between shards" and shard == 2:
                    failing.give_up()
                writer.write(shard, [maps[0][shard : shard + 1]])
            failing.give_up()
            writer.commit(make_statistics(), b"# A cache\n")
    failing.unmount()
    failing.mount()
    assert error.value.reason == "unwritable"
    assert "read-only file system" in str(error.value)
    assert not target.exists()
    with Staging(target) as staging:
        finished = {"before": 0, "between shards": 2, "before the commit": 4}[step]
        assert CacheWriter(staging, spec, rows, TOKEN).pending == list(range(finished, 4))
    write_cache(target, spec, rows, maps)
    assert tree(target) == tree(tmp_path / "whole")


def test_an_output_that_was_announced_survives_the_disk(failing):
    """Whole, or not there: never names without bytes."""
    out = failing.place / "out"
    with fresh_directory(out) as into:
        (into / "a").write_bytes(bytes(10**5))
        (into / "deep").mkdir()
        (into / "deep" / "b").write_text("b")
    failing.give_up()
    failing.unmount()
    failing.mount()
    assert tree(out) == {"a": bytes(10**5), "deep/b": b"b"}


def test_an_output_is_one_line_on_a_disk_that_turned_read_only(failing):
    line = r"out: cannot be written \(Read-only file system\)"
    with pytest.raises(UserError, match=line), fresh_directory(failing.place / "out") as into:
        failing.give_up()
        (into / "a").write_text("a")


@pytest.fixture
def read_only(tmp_path, monkeypatch):
    """A committed repository with a cache and an unfinished run, on a disk that turned read-only; where one works."""
    root = cache_repository(tmp_path)
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=one", where=root)
    (root / "data/extract/.other.staging").mkdir()
    try:
        for options in (["--bind"], ["-o", "remount,ro,bind"]):
            if subprocess.run(["mount", *options, tmp_path, tmp_path], capture_output=True, check=False).returncode:
                pytest.skip("cannot mount a folder read-only here")
        monkeypatch.chdir(root)  # the mounted one
        yield root
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], capture_output=True, check=False)


def test_gc_calls_nothing_removed_that_stays(read_only):
    """A folder in an unfinished run cannot be written, the rest can."""
    part = read_only / "data/extract/.other.staging/cache"
    subprocess.run(["mount", "-o", "remount,rw,bind", read_only.parent], check=True)
    part.mkdir()
    (part / "x").touch()
    subprocess.run(["mount", "--bind", part, part], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", part], check=True)
        for _ in range(2):
            line = refused("cache", "gc", "--apply", code=1)
            assert line.count("\n") == 1
            assert "ead-only file system" in line
    finally:
        for place in (part, part.parents[1] / ".other.staging.done/cache"):
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("cache gc", ".dvc/tmp/lock"),
        ("cache gc --apply", "data/extract/.other.staging"),
        ("cache publish", ".dvc/tmp/lock"),
        ("upgrade --apply", ".dvc/tmp/lock"),
    ],
)
def test_a_command_on_a_read_only_disk_says_what_cannot_be_written(read_only, command, place):
    line = refused(*command.split(), code=1)
    assert f"{read_only / place}: read-only file system; make " in line.replace("Read", "read").split("error: ")[1]
    assert "Errno" not in line


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "Disk quota exceeded; free some space, or ask"),
        (errno.EACCES, "Permission denied; fix the permissions"),
        (errno.EIO, "Input/output error; check the disk"),
    ],
)
def test_what_dvc_says_of_a_disk_names_the_way_out(number, says):
    with pytest.raises(UserError, match=f"^dvc: x: {says}"), in_one_line("dvc"):
        raise OSError(number, os.strerror(number), "x")
    with pytest.raises(UserError, match=r"^remote: .*bucket said no$"), in_one_line("remote"):
        raise OSError(number, "bucket said no")  # as s3fs does

"""Systems other than Linux, simulated: what they lack is taken away. None of this was run on a Mac."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import psutil
import pytest
from builders import make_cache, make_rows
from pipeline_builders import ROOT

from h2t.cache import machine, memory
from h2t.cache.reader import open_cache
from h2t.cache.write import lease
from h2t.pipeline.base.errors import of_the_machine
from h2t.pipeline.base.outputs import fresh_directory


def child(script):
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture
def no_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path / "nothing")


def test_every_stage_can_be_imported_where_the_system_does_not_say_which_cores_are_ours():
    done = child(
        "import os\ndel os.sched_getaffinity\n"
        "import h2t.pipeline.stages.extract, h2t.pipeline.project.survey, h2t.pipeline.data.images\n"
        "from h2t.cache.machine import cores\nassert cores() == os.cpu_count()"
    )
    assert done.returncode == 0, done.stderr


def test_memory_without_proc(no_proc, monkeypatch):
    free = psutil.virtual_memory().available
    assert free / 2 < memory.available_memory() < free * 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**40, 2**40))
    assert memory.available_memory() < free * 2


def test_who_is_alive():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert machine.alive(os.getpid())
    assert machine.alive(1)
    assert not any(machine.alive(pid) for pid in (ended.pid, 0, -1, 10**30))


def test_a_partial_output_of_a_process_at_work_stays(tmp_path, monkeypatch):
    from pathlib import Path

    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda p, **k: not str(p).startswith("/proc") and exists(p, **k))
    other = tmp_path / f".out.partial-{os.getppid()}"
    other.mkdir()
    with fresh_directory(tmp_path / "out") as partial:
        (partial / "x").touch()
    assert other.is_dir()


def test_what_the_finder_leaves_is_no_foreign_file(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    with fresh_directory(tmp_path / "out") as partial:
        (partial / "x").touch()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


@pytest.mark.parametrize("refused", [False, True])
def test_bytes_are_flushed_through_the_disk(tmp_path, monkeypatch, refused):
    calls = []

    def fullsync(handle, what):
        calls.append(what)
        if refused:
            raise OSError(errno.ENOTSUP, "")

    monkeypatch.setattr(machine.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(machine.fcntl, "fcntl", fullsync)
    monkeypatch.setattr(machine.os, "fsync", lambda _: calls.append("fsync"))
    machine.flush(0)
    assert calls == ([51, "fsync"] if refused else [51])


@pytest.mark.parametrize("compiled", ["", "r.compiled = lambda: None"])
def test_a_cache_of_more_shards_than_files_may_be_open(tmp_path, compiled):
    maps = make_cache(tmp_path / "c", rows=make_rows(1200), maps=((64, 8, 8),))[0]
    np.save(tmp_path / "maps.npy", maps)
    done = child(f"""if True:
        import resource, numpy as np
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        import h2t.cache.reader as r
        {compiled}
        for cache in [r.open_cache({str(tmp_path / "c")!r}) for _ in range(2)]:
            assert (cache.read(np.arange(1200)) == np.load({str(tmp_path / "maps.npy")!r})).all()
    """)
    assert done.returncode == 0, done.stderr
    assert open_cache(tmp_path / "c").spec.shards == 300


def test_too_many_open_files_is_one_line():
    assert "ulimit -n 4096" in str(of_the_machine(OSError(errno.EMFILE, "")))


def test_a_process_that_proc_hides_is_not_one_that_has_ended(monkeypatch):
    monkeypatch.setattr(lease, "Path", lambda p: memory.PROC / "nothing" if p == "/proc/1/stat" else memory.Path(p))
    assert lease._process(1)["started"] == lease.HIDDEN


def test_the_gather_compiles_where_the_time_of_a_file_has_another_name(tmp_path):
    if (cc := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no compiler")
    source = tmp_path / "gather.c"
    source.write_text(
        "#define _GNU_SOURCE\n#define st_mtim st_mtimespec\n#include <sys/stat.h>\n#undef st_mtim\n"
        f'#define __APPLE__ 1\n#include "{ROOT / "cache/read/gather.c"}"\n'
    )
    include = sysconfig.get_path("include")
    done = subprocess.run([cc, "-c", "-I", include, source, "-o", tmp_path / "o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", ["import h2t.cache.reader", "import runpy; runpy.run_path('setup.py')"])
def test_windows_is_refused_in_one_line(start):
    done = child(f"import sys, runpy, setuptools\nsys.platform = 'win32'\n{start}")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "h2t: runs on Linux and macOS; got Windows; use WSL" in line

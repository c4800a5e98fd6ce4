"""How much memory there is: the least of what machine, limit of the address space and control groups leave."""

import resource
import subprocess
import sys

import pytest
from pipeline_builders import ROOT

from h2t.cache import memory
from h2t.cache.memory import available_memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes the files in which the kernel says what there is; 8 GiB are free, and nothing else limits."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\nSwapFree: 0 kB\n")
    write("proc/self/cgroup", "0::/\n")
    return write


def test_what_the_machine_has(machine):
    assert available_memory() == 8 * GIB


def test_the_smallest_group_above_counts_and_what_it_can_give_back_is_free(machine):
    machine("proc/self/cgroup", "0::/a/b\n")
    machine("groups/a/memory.max", f"{4 * GIB}\n")
    machine("groups/a/memory.current", f"{3 * GIB}\n")
    machine("groups/a/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    machine("groups/a/b/memory.max", "max\n")
    assert available_memory() == 2 * GIB


def test_groups_of_version_1(machine):
    machine("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    machine("groups/memory/job/memory.limit_in_bytes", f"{GIB}\n")
    machine("groups/memory/job/memory.usage_in_bytes", f"{2 * GIB}\n")
    machine("groups/memory/job/memory.stat", "total_inactive_file 0\n")
    assert available_memory() == 0


def test_a_container_sees_its_own_group_at_the_root(machine):
    machine("proc/self/cgroup", "0::/../outside/of/this\n")
    machine("groups/memory.max", f"{GIB}\n")
    machine("groups/memory.current", "0\n")
    machine("groups/memory.stat", "inactive_file 0\n")
    assert available_memory() == GIB


def test_the_limit_of_the_address_space_is_heeded():
    script = """if True:
        import resource
        from h2t.cache.memory import available_memory
        before = available_memory()
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        assert 2**29 < available_memory() < 2**31 <= before, (before, available_memory())
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_memory_that_is_there_is_not_nothing():
    assert available_memory() > 2**20

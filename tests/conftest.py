import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None, derandomize=True)
settings.load_profile("quick")


MEMORY, ROOM = Path("/dev/shm"), 4 * 2**30


def pytest_configure():
    """Files of tests lie in memory where there is room: on a disk they take more processor time (docs/log.md).

    Not if TMPDIR names a place, nor where programs may not be started (noexec), as some tests start ones they wrote.
    """
    from h2t.cache.memory import available_memory

    if not os.environ.get("TMPDIR") and sys.platform == "linux" and os.access(MEMORY, os.W_OK):
        found = os.statvfs(MEMORY)
        room = min(found.f_bavail * found.f_frsize, available_memory() // 2)
        if room >= ROOM and not found.f_flag & os.ST_NOEXEC:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_finish():
    """Python need not look again and again at thousands of tests and what they import."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that two processes that share the tests end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def cache_dir(tmp_path):
    """A place for a cache that does not exist yet."""
    return tmp_path / "cache"


def _read_by(monkeypatch, way):
    from h2t.cache.read.gather import compiled

    if way != "compiled":
        for module in ("reader", "read.jobs", "tools.verify"):
            monkeypatch.setattr(f"h2t.cache.{module}.compiled", lambda: None)
    elif compiled() is None:
        pytest.skip("the compiled gather was not built")


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """How rows are read: by the compiled gather, or as where there is none."""
    _read_by(monkeypatch, request.param)
    return request.param


LAYOUTS = {"compiled": {}, "plain": {}, "decoded": {"codec": "zstd"}, "small rows": {"chunk_rows": 2}}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    """The layout of a cache; together these take every path through the reader."""
    if request.param in ("compiled", "plain"):
        _read_by(monkeypatch, request.param)
    return LAYOUTS[request.param]


@pytest.fixture
def no_waiting(monkeypatch):
    """A store that falters is asked again at once."""
    monkeypatch.setattr("h2t.cache.read.asking.FIRST_WAIT", 0)


@pytest.fixture(params=["8000000", "0"], ids=["blocks kept", "no blocks"])
def kept(request, monkeypatch):
    """With a cache of remote blocks and without."""
    monkeypatch.setenv("H2T_BLOCK_CACHE_BYTES", request.param)


@pytest.fixture(scope="session")
def all_blocks(tmp_path_factory):
    """A folder, and numbers for those below it: a folder from `tmp_path_factory` for each test takes milliseconds."""
    return tmp_path_factory.mktemp("blocks"), itertools.count()


@pytest.fixture(autouse=True)
def own_blocks(all_blocks, monkeypatch):
    """Blocks of remote caches and embeddings are apart from those of whoever runs the tests, and of other tests."""
    folder, numbers = all_blocks
    own = folder / str(next(numbers))
    monkeypatch.setenv("H2T_BLOCK_CACHE", str(own))
    monkeypatch.setenv("XDG_CACHE_HOME", f"{own}.home")


@pytest.fixture(autouse=True)
def one_thread():
    """Tests compute on one thread, so that their results do not hang on the machine's cores."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def warm_programs(tmp_path_factory):
    """A folder with the programs `h2t`, `dvc` and `warm_python`, which start at once: those of warm.py."""
    from pipeline_builders import environment

    folder, warm = tmp_path_factory.mktemp("warm"), Path(__file__).with_name("warm.py")
    place = folder / "socket"
    for name, module in (("h2t", "-m h2t.pipeline"), ("dvc", "-m dvc"), ("warm_python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{warm}" "{place}" {module} "$@"\n')
        (folder / name).chmod(0o755)
    command = [sys.executable, str(warm), "serve", str(place)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as server:
        assert server.stdout.readline() == "ready\n"
        yield folder
        server.stdin.close()


@pytest.fixture(scope="session")
def warm_h2t(warm_programs):
    """The program `h2t` there."""
    return warm_programs / "h2t"


@pytest.fixture
def starts_warm(warm_programs, monkeypatch):
    """Programs that this process starts by `sys.executable` start at once."""
    monkeypatch.setattr(sys, "executable", str(warm_programs / "warm_python"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """(Samples, Images) of the long-tailed digits, prepared once; tests only read them."""
    from pipeline_builders import make_samples

    return make_samples(tmp_path_factory.mktemp("digits") / "prepare")


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """(Samples, Images) of the digits with a fifth of the test images, where the maps themselves do not matter."""
    from pipeline_builders import make_samples

    return make_samples(tmp_path_factory.mktemp("few") / "prepare", test_per_class=10)


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory):
    """A ResNet-20 with random weights, as train_backbone writes it; tests only read it."""
    from pipeline_builders import make_backbone_dir

    folder = tmp_path_factory.mktemp("backbone") / "b"
    make_backbone_dir(folder)
    return folder


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory, digits, backbone_dir):
    """The digits' maps of that backbone under the default recipes, two views of rare classes, float32."""
    from pipeline_builders import extracted

    out = tmp_path_factory.mktemp("extract") / "b"
    extracted(out, *digits, backbone_dir, max_views=2)
    return out


@pytest.fixture(scope="session")
def plain_cache(tmp_path_factory, digits, backbone_dir):
    """The digits' maps of that backbone under the default recipes, one view, float32; tests change copies only."""
    from pipeline_builders import extracted

    out = tmp_path_factory.mktemp("plain") / "b"
    extracted(out, *digits, backbone_dir)
    return out

"""A user's own `cache.py`, `pipeline/` and `tests/`, in the current folder or on PYTHONPATH, do not get in the way.

tests/test_pipeline.py runs `dvc repro` among such files.
"""

import subprocess
import sys

import pytest
from builders import make_cache
from pipeline_builders import ROOT, environment, make_samples, write_params

from h2t.cache.tools.verify import verify

TAKEN = ("cache.py", "pipeline/__init__.py", "tests/__init__.py", "plugins.py", "presets.py")


def plant(folder):
    """Writes modules named like ours that end the program when they are imported."""
    for name in TAKEN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"raise SystemExit('imported the wrong {name}')\n")


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    plant(folder)
    return folder


def python(*arguments, cwd):
    """Runs Python in `cwd`, which comes first on PYTHONPATH as well."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=environment(PYTHONPATH=f"{cwd}:{ROOT}"), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_modules_of_the_user_are_found_as_usual(mine):
    assert "imported the wrong cache.py" in python("-c", "import cache", cwd=mine).stderr


MODULE, SCRIPT = ["-m", "h2t.pipeline"], ["-c", "from h2t.pipeline.__main__ import run; run()"]


@pytest.mark.parametrize(
    ("program", "command"), [(SCRIPT, "list"), (MODULE, "list"), (MODULE, "cache verify c"), (MODULE, "cache stats c")]
)
def test_commands(mine, program, command):
    make_cache(mine / "c")
    done = python(*program, *command.split(), cwd=mine)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_cache_is_read_here_and_by_child_processes(mine, start):
    make_cache(mine / "c")
    (mine / "read.py").write_text(
        "import multiprocessing\n"
        "from h2t.cache.reader import open_cache\n"
        "if __name__ == '__main__':\n"
        "    cache = open_cache('c')\n"
        f"    with multiprocessing.get_context({start!r}).Pool(2) as pool:\n"
        "        print({maps.shape for maps in [*pool.map(cache.read, [[3, 1]] * 4), cache.read([3, 1])]})\n"
    )
    done = python("read.py", cwd=mine)
    assert done.stdout == "{(2, 3, 2, 2)}\n", done.stderr


def test_extraction_by_a_worker_process(mine, backbone_dir):
    make_samples(mine / "samples")
    write_params(mine / "params.yaml")
    where = ("ce_mixup", "samples", backbone_dir, "c", "--set", "run.cluster=local:1")
    done = python("-m", "h2t.pipeline", "extract", *where, cwd=mine)
    assert done.returncode == 0, done.stderr
    assert verify(mine / "c") == []

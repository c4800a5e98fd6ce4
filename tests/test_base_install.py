"""The base install describes, checks and pulls caches; any other command says how to install the rest.

The packages of the extra `pipeline` are hidden.
"""

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from builders import make_cache, tree
from pipeline_builders import ROOT, environment, write_params
from repositories import cache_repository, dvc, git

from h2t.pipeline.base.errors import PIPELINE

#: DVC requires these, so the base install has them as well.
OF_DVC = {"pydantic", "tqdm"}
HIDING = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""
RUN = "import sys; from h2t.pipeline.__main__ import run; sys.argv[0] = 'h2t'; run()"


def python(script, *arguments, cwd, hidden=PIPELINE - OF_DVC):
    return subprocess.run(
        [sys.executable, "-c", HIDING.format(hidden=set(hidden)) + script, *map(str, arguments)],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def h2t(*arguments, cwd):
    return python(RUN, *arguments, cwd=cwd)


def test_the_packages_that_a_base_install_lacks_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = {line.partition(">")[0].partition("[")[0] for line in project["optional-dependencies"]["pipeline"]}
    owners = packages_distributions()
    assert {owner.lower() for name in PIPELINE for owner in owners[name]} == extra
    assert not extra & {line.partition(">")[0].partition("[")[0] for line in project["dependencies"]}


def test_info_stats_and_verify(cache_dir):
    make_cache(cache_dir)
    done = h2t("cache", "stats", cache_dir, cwd=cache_dir.parent)
    assert done.stdout.startswith("expert 0: "), done.stderr
    done = h2t("cache", "info", "--json", cache_dir, cwd=cache_dir.parent)
    assert json.loads(done.stdout)["rows"] == 11, done.stderr
    done = h2t("cache", "verify", cache_dir, cwd=cache_dir.parent)
    assert "every byte" in done.stdout, done.stderr
    (cache_dir / "README.md").write_text("mine")
    done = h2t("cache", "verify", cache_dir, cwd=cache_dir.parent)
    assert done.returncode == 1
    assert "README.md" in done.stdout


def test_pull_and_read(tmp_path):
    root = cache_repository(tmp_path)
    dvc("push", where=root)
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=one", where=root)
    git("clone", "--quiet", "--bare", str(root), str(tmp_path / "lab.git"), where=tmp_path)
    url = f"file://{tmp_path / 'lab.git'}"
    done = h2t("cache", "pull", url, "--into", "pulled", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "pulled/extract/b") == tree(root / "data/extract/b")
    script = "from h2t.cache.reader import open_cache; print(open_cache(sys.argv[1]).read([3, 1]).shape)"
    for location in ("pulled/extract/b", f"dvc+{url}#data/extract/b"):
        done = python(script, location, cwd=tmp_path)
        assert done.stdout == "(2, 3, 2, 2)\n", done.stderr


@pytest.mark.parametrize(
    "command",
    ["prepare out", "extract ce_mixup a b out", "evaluate dr a b c out", "report a out", "predict a b",
     "cache pool {cache} out", "cache import out --train a.npy"],
)  # fmt: skip
def test_other_commands_say_how_to_install_the_rest(cache_dir, command):
    make_cache(cache_dir)
    write_params(cache_dir.parent / "params.yaml")
    done = h2t(*command.format(cache=cache_dir).split(), cwd=cache_dir.parent)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(": not installed, and this command needs it; type: pip install 'h2t[pipeline]'")
    assert not (cache_dir.parent / "out").exists()


def test_the_doctor_names_what_is_missing(tmp_path):
    script = (
        "import importlib.metadata as m; known = m.version\n"
        "def version(name):\n    if name == 'torch': raise m.PackageNotFoundError\n    return known(name)\n"
        "m.version = version\n"
    )
    done = python(script + RUN, "doctor", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("fault versions")
    assert line.endswith("torch is missing; type: pip install 'h2t[pipeline]'")


def test_importing_the_reader_imports_nothing_for_servers_and_writing(tmp_path):
    script = "from h2t.cache.reader import open_cache; print([m for m in sys.modules if '.' not in m])"
    done = python(script, cwd=tmp_path, hidden=())
    loaded = set(ast.literal_eval(done.stdout))
    assert not loaded & (PIPELINE | {"zarr", "dvc", "fsspec", "aiohttp", "tenacity", "asyncio", "click"})

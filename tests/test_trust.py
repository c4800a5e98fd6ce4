"""No code from data: which calls the source may hold, and what opening and reading a stranger's cache does not do."""

import ast

import pytest
from architecture import ROOT, modules
from builders import make_cache, reseal
from pipeline_builders import python

FORBIDDEN_IMPORTS = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle", "runpy", "code"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load",
    "pickle.load",
    "pickle.loads", "pickle.Unpickler", "torch.hub.load", "torch.jit.load", "np.fromregex", "subprocess.getoutput",
}  # fmt: skip
LOADERS = {"import_module", "module_from_spec", "spec_from_file_location", "exec_module", "load_module", "run_path"}
#: (call, what it must be given)
REQUIRED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
#: Where a module is loaded by name: plug-ins, which are code and said to be (SECURITY.md).
LOADS_CODE = {"h2t.pipeline.base.plugins"}


def calls(tree: ast.AST):
    """(dotted name, node) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults_in(source: str, module: str = "m") -> list[str]:
    """What a source holds and may not hold."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {n}" for n in names if n.partition(".")[0] in FORBIDDEN_IMPORTS]
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            found.append("takes names out of pickle")
    for name, node in calls(tree):
        given = {k.arg: k.value for k in node.keywords}
        if name in FORBIDDEN_CALLS or (name.rpartition(".")[2] in LOADERS and module not in LOADS_CODE):
            found.append(f"calls {name}")
        if name in REQUIRED:
            key, wanted = REQUIRED[name]
            value = given.get(key)
            if not (isinstance(value, ast.Constant) and value.value is wanted):
                found.append(f"{name} without {key}={wanted}")
        if name == "yaml.load" and ast.unparse(node.args[1] if len(node.args) > 1 else ast.Constant(0)) != "Loader":
            found.append("yaml.load by another loader than Loader")
        if "shell" in given or name.endswith(".shell"):
            found.append(f"{name} with a shell")
        if name.endswith("_extract_all") or name.endswith(".extractall"):
            found.append(f"{name} unpacks an archive")
    return found


def test_the_source_runs_nothing_that_comes_from_data():
    for module, path in modules().items():
        assert faults_in(path.read_text(encoding="utf-8"), module) == [], module


def test_yaml_is_read_by_the_safe_loader_alone():
    import yaml

    from h2t.pipeline.base.strict_yaml import Loader

    assert issubclass(Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in (*Loader.yaml_constructors, *Loader.yaml_multi_constructors))


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "torch.load(p, weights_only=w)", "np.load(p)",
        "yaml.load(t, yaml.Loader)", "yaml.load(t)", "subprocess.run(c, shell=True)", "import marshal",
        "pickle.loads(b)",
        "from pickle import loads", "importlib.import_module(n)", "tar.extractall()", "__import__(name)",
    ],
)  # fmt: skip
def test_the_reader_of_the_source_sees_what_it_shall(line):
    assert faults_in(line)


# Behaviour: a stranger's cache under an audit hook, in a process of its own.

WATCHED = """
import json, os, sys
import numpy as np

from h2t.cache.tools import audit, verify
from h2t.cache.format import codecs
from h2t.cache import reader
import numcodecs.pcodec, pcodec, zarr, zarr.codecs, zarr.codecs.numcodecs, zarr.storage
from h2t.pipeline.extraction import batchnorm

sys.path[:0] = [{tests!r}]
from fuzz.oracle import Watch
from pathlib import Path

watch = Watch(Path({elsewhere!r}))
os.chdir({place!r})  # where a module called like one of ours lies

def run(name):
    with reader.open_cache(name) as cache:
        audit.describe(cache)
        cache.rows
        batchnorm.from_bytes(cache.statistics)
        for expert in range(cache.experts):
            cache.read(np.arange(cache.spec.rows), expert=expert)
        audit.stats(cache)
    return verify.verify(name)

for name in {names!r}:
    run(name)  # imports what is imported late
    with watch.watching():
        print(run(name))
"""


def test_opening_and_reading_a_strangers_cache_runs_nothing(tmp_path):
    names = ["none", "zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"]
    trap = "open('ran', 'w').write('ran')\nraise SystemExit('code of a stranger ran')\n"
    for name in ("cache.py", "conftest.py", "sitecustomize.py", "numcodecs.py", "zarr.py"):
        (tmp_path / name).write_text(trap)
    for name in names:
        make_cache(tmp_path / name, codec=name, chunk_rows=2)
        (tmp_path / name / "__init__.py").write_text(trap)
        reseal(tmp_path / name, lambda body: body["provenance"].update({"plugin": "os", "class": "subprocess.Popen"}))
    code = WATCHED.format(
        tests=str(ROOT / "tests"), elsewhere=str(tmp_path / "nowhere"), place=str(tmp_path), names=names
    )
    said = python("-c", code, timeout=120)
    assert not (tmp_path / "ran").exists()
    assert said.count("not named in cache.json") == len(names)  # the traps that lie inside


def test_the_watch_notices_what_it_shall(tmp_path):
    """In a process of its own: a hook stays for its life."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
import os, pickle, socket, subprocess
from pathlib import Path
from fuzz.oracle import Finding, Watch
inside = Path({str(tmp_path)!r}); (inside / "in").mkdir()
watch = Watch(inside / "in")
class Code:
    def __reduce__(self): return len, ((),)
data = pickle.dumps(Code())
def write(p): open(p, "w").close()
DEEDS = dict(
    outside=lambda: write(inside / "x"), up=lambda: write(inside / "in" / ".." / "y"),
    os_open=lambda: os.open(inside / "z", os.O_CREAT), mkdir=lambda: os.mkdir(inside / "d"),
    remove=lambda: os.remove(inside / "x"), process=lambda: subprocess.run(["true"]), run=lambda: exec("1"),
    shell=lambda: os.system("true"), pickle=lambda: pickle.loads(data),
    name=lambda: socket.getaddrinfo("localhost", 80),
    connect=lambda: socket.socket().connect_ex(("127.0.0.1", 9)))
for name, deed in DEEDS.items():
    try:
        with watch.watching():
            deed()
        print("missed", name)
    except Finding:
        pass
with watch.watching():
    write(inside / "in" / "fine"); open({__file__!r}).close(); os.remove(inside / "in" / "fine")
print("allowed")
"""
    assert python("-c", code, timeout=60) == "allowed\n"

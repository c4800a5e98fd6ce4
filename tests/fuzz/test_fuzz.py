"""Every fuzz target for a moment: its valid inputs are accepted, and seeded mutations of them find nothing.

In a process of its own, as the audit hook stays and the memory is limited. `make -C tests fuzz` is the campaign.
"""

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from architecture import ROOT
from fuzz.oracle import REFUSALS
from fuzz.targets import ROOMS, TARGETS
from pipeline_builders import environment

#: Executions that take about half a second.
QUICK = {"record": 2500, "rows": 1000, "index": 6000, "chunk": 6000, "urls": 2500, "keys": 1500, "checkpoint": 800,
         "features": 800, "lists": 1000, "image": 3000, "yaml": 800, "settings": 1000, "directory": 150}  # fmt: skip


@pytest.fixture(scope="module")
def done(warm_programs):
    """(name -> (values, refusals), what went wrong)."""
    command = [
        warm_programs / "warm_python",
        ROOT / "tests" / "fuzz" / "quick.py",
        *(f"{k}={v}" for k, v in QUICK.items()),
    ]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=300,
        check=False
    )  # fmt: skip
    lines = [line.split() for line in ended.stdout.splitlines()]
    return {name: (int(values), int(refusals)) for name, values, refusals, _ in lines}, ended.stderr[-3000:]


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(done, name):
    found, error = done
    assert name in found, error
    assert sum(found[name]) == QUICK[name]
    assert min(found[name]) > QUICK[name] / 100 or name == "urls"  # deep code is reached, and hostile input too


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid(name, tmp_path, monkeypatch):
    """Mutations of what is refused at once reach nothing."""
    monkeypatch.chdir(tmp_path)
    target = TARGETS[name]
    parse = target.open(tmp_path)
    good = 0
    for data in target.seeds():
        with suppress(*REFUSALS):  # some are hostile on purpose
            parse(data[: target.max_bytes])
            good += 1
    assert good >= len(target.seeds()) / 2


def test_every_file_of_targets_is_in_the_campaign():
    named = {p.stem for p in Path(__file__).parent.glob("*_target*.py")}
    assert named == {room.__name__.rpartition(".")[2] for room in ROOMS}

"""Numbers of stages and plug-ins: the same in the code and in stages.yaml, or a command refuses."""

import re

import pytest
from pipeline_builders import ROOT, accepted, invoke, one_line, refused, write_params

from h2t.pipeline.base import numbers, plugins
from h2t.pipeline.base.errors import UserError

MINE = '''"""Mine: the largest value of each channel."""

from h2t.pipeline.base.params import Section


class Options(Section):
    pass
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with parameters and the numbers of the code, as the working directory."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path / "params.yaml")
    (tmp_path / "stages.yaml").write_text(numbers.text(numbers.in_code()))
    return tmp_path


def change(project, old, new):
    path = project / "stages.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_numbers_are_a_date_and_a_counter():
    found = numbers.built_in()
    assert {"prepare", "report", "hosts.dr", "datasets.digits"} <= set(found)
    assert all(re.fullmatch(r"20\d\d[01]\d[0-3]\d\d\d", str(n)) for n in found.values())
    assert all(n >= numbers.FIRST for n in found.values())


def test_a_file_is_read_as_it_was_written(project):
    assert numbers.read(project / "stages.yaml") == numbers.built_in()


@pytest.mark.parametrize("text", ["[1, 2]", "a: {b: {c: 1}}", "extract: many", "a: [", "x"])
def test_a_file_of_something_else_is_one_line(tmp_path, text):
    (tmp_path / "stages.yaml").write_text(text)
    with one_line(match="must hold a whole number"):
        numbers.read(tmp_path / "stages.yaml")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "extract: 2026112601",
            "extract: 2026112507",
            "extract must be 2026112601, as in the installed h2t; got 2026112507",
        ),
        ("  dr: 2026112601\n", "", "hosts.dr must be 2026112601, as in the installed h2t; got none"),
        (
            "  dr: 2",
            "  later: 2027010101\n  dr: 2",
            "hosts.later must be absent, as in the installed h2t; got 2027010101",
        ),
    ],
)
def test_another_number_is_refused_before_anything_is_written(project, old, new, says):
    change(project, old, new)
    line = refused("prepare", "data/prepare", leaves=project / "data")
    assert says in line
    assert "type: h2t upgrade" in line
    assert len(line.splitlines()) == 1


def test_without_the_file_a_command_goes_on(project):
    (project / "stages.yaml").unlink()
    accepted("prepare", "data/prepare")


def test_plug_ins_of_the_project_are_found_and_need_no_number(project):
    (project / "plugins/pools").mkdir(parents=True)
    (project / "plugins/pools/mine.py").write_text(MINE)
    assert "mine" in plugins.names("pools")
    assert plugins.load("pools", "mine").__doc__.startswith("Mine")
    numbers.check()
    assert numbers.in_code()["pools.mine"] == numbers.OWN
    assert "pools.mine" not in numbers.built_in()
    (project / "stages.yaml").write_text(numbers.text(numbers.in_code()))
    assert numbers.read(project / "stages.yaml")["pools.mine"] == numbers.OWN
    numbers.check()


def test_a_plug_in_of_the_project_must_not_take_our_names(project):
    (project / "plugins/pools").mkdir(parents=True)
    (project / "plugins/pools/gap.py").write_text("raise RuntimeError\n")
    with pytest.raises(UserError, match="rename the file"):
        plugins.load("pools", "gap")
    assert numbers.in_code() == numbers.built_in()


def test_there_is_a_folder_for_every_kind():
    assert sorted(p.name for p in (ROOT / "plugins").iterdir()) == sorted(plugins.KINDS)


def test_the_old_place_of_a_setting_is_accepted_with_a_line(project):
    done = invoke("prepare", "out", "--set", "extract.cluster=local:2")
    assert done.exit_code == 0, done.output
    assert "note: extract.cluster belongs in the section run" in done.output
    assert "run.cluster" in refused("prepare", "out", "--set", "run={cluster: nonsense}")

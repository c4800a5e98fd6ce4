import pytest
import small_jobs
from pipeline_builders import accepted, invoke, refused, write_params

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.side_by_side import side_by_side


@pytest.mark.parametrize("kind", plugins.KINDS)
def test_every_plugin_loads_and_says_what_it_is(kind):
    names = plugins.names(kind)
    assert names == sorted(set(names))
    assert names
    for name in names:
        assert plugins.load(kind, name).__name__ == f"h2t.pipeline.{kind}.{name}"
        assert len(plugins.summary(kind, name)) > 10


@pytest.mark.parametrize("name", ["gapp", "", "../gap", "__init__", "gap.py", "GAP"])
def test_an_unknown_name_is_one_line(name):
    with pytest.raises(UserError, match=r"^no pool ") as error:
        plugins.load("pools", name)
    assert "there are: " in str(error.value)
    assert "\n" not in str(error.value)


def test_the_nearest_is_named():
    with pytest.raises(UserError, match="did you mean 'balanced'"):
        plugins.check("samplers", "balancd")


def test_a_plugin_that_is_edited_is_imported_again(tmp_path, monkeypatch):
    """Also within a second and with as many bytes, where Python would use the code that it stored."""
    (tmp_path / "pools").mkdir()
    path = tmp_path / "pools" / "mine.py"
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    for value in (7, 8, 9):
        path.write_text(f'"""Mine."""\nVALUE = {value}\n')
        if value > 7:
            assert value - 1 == plugins.load("pools", "mine").VALUE  # one run, one code
        plugins.look_again()
        assert value == plugins.load("pools", "mine").VALUE
        assert plugins.load("pools", "mine") is plugins.load("pools", "mine")
    path.write_text("VALUE = ")
    plugins.look_again()
    with pytest.raises(UserError, match=r"mine\.py: cannot be imported"):
        plugins.load("pools", "mine")


def test_a_folder_outside_adds_plugins_and_must_not_take_our_names(tmp_path, monkeypatch):
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools" / "mine.py").write_text('"""Mine: a pool from outside."""\nVALUE = 7\n')
    (tmp_path / "pools" / "gap.py").write_text("raise RuntimeError\n")
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    assert "mine" in plugins.names("pools")
    assert plugins.load("pools", "mine").VALUE == 7
    assert plugins.summary("pools", "mine") == "Mine: a pool from outside."
    with pytest.raises(UserError, match=r"pools/gap\.py: h2t has a pool 'gap' of its own; rename the file"):
        plugins.load("pools", "gap")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('"""A pool."""\nVALUE = {}["x"]\n', "line 2: KeyError: 'x'"),
        ('"""A pool."""\nimport no_such_package\n', "line 2: ModuleNotFoundError: No module named 'no_such_package'"),
        ('"""A pool."""\ndef f(:\n', "line 2: SyntaxError: invalid syntax"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(text, says, tmp_path, monkeypatch):
    (tmp_path / "pools").mkdir()
    path = tmp_path / "pools/broken.py"
    path.write_text(text)
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    for _ in range(2):  # nothing is left of the first attempt
        with pytest.raises(UserError) as error:
            plugins.load("pools", "broken")
        assert str(error.value) == f"{path}: cannot be imported ({says}); correct the plug-in"
    path.write_text('"""A pool."""\n')
    assert plugins.load("pools", "broken").__doc__ == "A pool."


def test_the_list_shows_a_plugin_with_wrong_syntax_beside_the_others(tmp_path, monkeypatch):
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools/broken.py").write_text("def f(:\n")
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    said = accepted("list", "pools")
    assert "gap" in said
    assert "cannot be read (invalid syntax" in said


BROKEN = '''"""Mine: a dataset."""
import numpy as np
from h2t.pipeline.base.params import Section
from h2t.pipeline.data import classes


class Options(Section):
    calls: str = "a library"


def load(options):
    return {"a library": Of.shape, "h2t": classes.groups}[options.calls](3)


class Of:
    def shape(n):
        return np.zeros(n).reshape(2, 2)
'''


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A command on a dataset plug-in that raises an error, and the line that is expected."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins/datasets").mkdir(parents=True)
    (tmp_path / "plugins/datasets/mine.py").write_text(BROKEN)
    write_params(tmp_path / "params.yaml", prepare={"dataset": "mine"})
    line = (
        f"{tmp_path}/plugins/datasets/mine.py: line 17, in shape: ValueError: cannot reshape array of size 3 into "
        "shape (2,2); correct the plug-in, or type H2T_TRACEBACK=1 before the command to see the traceback"
    )
    return "prepare", line


def test_an_error_of_a_plugin_is_one_line_that_says_where(broken):
    command, line = broken
    assert refused(command, "data/prepare") == f"error: {line}\n"


def test_the_traceback_of_a_plugins_error_is_shown_when_asked_for(broken, monkeypatch):
    command, _ = broken
    said = [invoke(command, "data/prepare", "-v")]
    monkeypatch.setenv("H2T_TRACEBACK", "1")
    said += [invoke(command, "data/prepare"), invoke(command, "data/prepare", "--set", "prepare.dataset=no")]
    for done in said:
        assert done.exit_code == 1
        assert "Traceback" in str(done.exception)
    assert 'datasets/mine.py", line 17, in shape' in str(said[1].exception)


def test_an_error_of_h2t_below_a_plugin_stays_a_bug(broken):
    command, _ = broken
    done = invoke(command, "data/prepare", "--set", "prepare.options={calls: h2t}")
    assert isinstance(done.exception, TypeError), done.stderr


def test_a_plugin_without_what_its_kind_must_define_is_one_line(broken, tmp_path):
    command, _ = broken
    path = tmp_path / "plugins/datasets/mine.py"
    path.write_text(BROKEN.replace("def load", "def lod"))
    assert refused(command, "data/prepare") == (
        f"error: {path}: must define load, as every plug-in in datasets does; correct the plug-in\n"
    )


def test_an_error_of_a_plugin_in_another_process_says_where(tmp_path, monkeypatch):
    (tmp_path / "pools").mkdir()
    path = tmp_path / "pools/mine.py"
    path.write_text('"""A pool."""\nclass Mine(Exception):\n    pass\ndef f():\n    raise Mine("too small")\n')
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    with pytest.raises(UserError) as error:
        side_by_side([small_jobs.uses_a_plugin], "x")
    assert str(error.value).startswith(f"{path}: line 5, in f: Mine: too small; correct the plug-in")
    assert "Traceback" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("raised", "says"),
    [("UserError('k: must be odd')", "k: must be odd"), ("OSError(28, '', 'x')", "x: No space left on device; ")],
)
def test_what_a_plugin_says_itself_and_what_the_machine_lacks_stay(tmp_path, monkeypatch, raised, says):
    """In another process as in this one."""
    (tmp_path / "pools").mkdir()
    text = f"from h2t.pipeline.base.errors import UserError\ndef f():\n    raise {raised}\n"
    (tmp_path / "pools/mine.py").write_text(text)
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    with pytest.raises(UserError) as error:
        side_by_side([small_jobs.uses_a_plugin], "x")
    assert str(error.value).startswith(says)
    assert "plug-in" not in str(error.value)

import pytest
from pipeline_builders import accepted

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError


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


def test_a_folder_outside_adds_plugins_and_cannot_hide_ours(tmp_path, monkeypatch):
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools" / "mine.py").write_text('"""Mine: a pool from outside."""\nVALUE = 7\n')
    (tmp_path / "pools" / "gap.py").write_text("raise RuntimeError\n")
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    assert "mine" in plugins.names("pools")
    assert plugins.load("pools", "mine").VALUE == 7
    assert plugins.summary("pools", "mine") == "Mine: a pool from outside."
    assert plugins.load("pools", "gap").__name__ == "h2t.pipeline.pools.gap"


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

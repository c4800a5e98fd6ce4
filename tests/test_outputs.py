import os

import pytest

from pipeline.errors import UserError
from pipeline.outputs import fresh_directory, write_json


def filled(out, names=("a", "b")):
    with fresh_directory(out) as into:
        for name in names:
            (into / name).write_text(name)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_an_output_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with fresh_directory(out) as into:
        (into / "a").write_text("x")
        assert not out.exists()
    assert names(out) == ["a"]
    assert names(out.parent) == ["out"]


def test_an_error_leaves_the_old_output_and_no_remains(tmp_path):
    filled(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), fresh_directory(tmp_path / "out") as into:
        (into / "a").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert names(tmp_path) == ["out"]


def test_an_old_output_is_replaced_also_by_more(tmp_path):
    filled(tmp_path / "out", ["a"])
    filled(tmp_path / "out", ["a", "b"])
    assert names(tmp_path / "out") == ["a", "b"]


def test_a_directory_with_anything_else_is_refused(tmp_path):
    (tmp_path / "out" / "precious").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 'precious', which is not of this stage"):
        filled(tmp_path / "out")
    assert names(tmp_path / "out") == ["precious"]
    assert names(tmp_path) == ["out"]


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "params.yaml").write_text("x")
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(UserError, match=r"holds 'params\.yaml'"):
        filled(".")
    assert names(tmp_path) == ["work"]


def test_remains_of_killed_runs_go_even_with_our_process_number(tmp_path):
    """In a container the next run often has the number of the one before."""
    for pid in (os.getpid(), 2**22 + 1):
        (tmp_path / f".out.partial-{pid}").mkdir()
        (tmp_path / f".out.partial-{pid}" / "half").write_text("x")
    filled(tmp_path / "out")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a", "b"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "target")
    filled(tmp_path / "out")
    assert (tmp_path / "target" / "a").read_text() == "old"
    assert not (tmp_path / "out").is_symlink()


def test_a_place_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"):
        filled(tmp_path / "file" / "out")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"a": float("nan")})

import re

import pytest
from pipeline_builders import CPU, fitted, make_backbone_dir, make_stage2_cache, silent

from cache.reader import open_cache
from pipeline.errors import UserError
from pipeline.stages import evaluate, report

EVIL = ['<img src=x onerror="alert(1)">', "a & b | c", "</script><script>alert(2)</script>", "'; --", "$x^2$", "Ü 漢字"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with hosts `dr` and `left`, whose classes have hostile names."""
    folder = tmp_path_factory.mktemp("report")
    digest = make_backbone_dir(folder / "b", classes=6)
    cache = make_stage2_cache(
        folder / "c", counts=(9, 7, 5, 4, 3, 2), shape=(64, 1, 1), classes=EVIL, test=4, backbone=digest
    )
    fitted(folder / "h", cache, folder / "b")
    for name in ("dr", "left"):
        with open_cache(cache) as opened:
            evaluate.run(evaluate.Params(), name, opened, folder / "h", folder / "b", CPU, folder / "e" / name, silent)
    return folder / "e"


def reported(out, evaluated, hosts=("dr",), say=silent, title="T"):
    report.run(report.Params(title=title), list(hosts), evaluated, out, say)
    return (out / "index.html").read_text(encoding="utf-8")


def test_only_hosts_of_the_parameters_are_read_and_leftovers_are_named(tmp_path, evaluated):
    said = []
    page = reported(tmp_path / "r", evaluated, say=said.append)
    assert said[0] == "note: left: not among the hosts of the parameters, left out"
    assert "left" not in (tmp_path / "r" / "results.md").read_text(encoding="utf-8").replace("left out", "")
    assert "<td>left</td>" not in page
    assert "left," not in (tmp_path / "r" / "plots" / "ratio.csv").read_text()
    assert "left" in (
        reported(tmp_path / "s", evaluated, ["left", "dr"]) and (tmp_path / "s" / "results.md").read_text()
    )


def test_a_host_that_was_not_evaluated_is_one_line(tmp_path, evaluated):
    with pytest.raises(UserError, match="host 'gcl' has not been evaluated"):
        reported(tmp_path / "r", evaluated, ["dr", "gcl"])
    assert not (tmp_path / "r").exists()


def test_what_comes_from_data_is_escaped(tmp_path, evaluated):
    page = reported(tmp_path / "r", evaluated, title="<b>&amp;</b><script>alert(3)</script>")
    assert "<img src=x" not in page
    assert "<script>alert(" not in page
    assert "<b>&amp;" not in page
    assert "&lt;b&gt;&amp;amp;" in page


def test_the_page_is_self_contained(tmp_path, evaluated):
    page = reported(tmp_path / "r", evaluated)
    assert not re.findall(r"<(?:script|img|iframe|link|source|object)[^>]*(?:src|href)\s*=\s*(?![\"']?data:)", page)
    assert not re.findall(r"@import|url\(\s*[\"']?https?:", page)


def test_the_same_input_gives_the_same_bytes(tmp_path, evaluated):
    for name in "ab":
        reported(tmp_path / name, evaluated)
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name

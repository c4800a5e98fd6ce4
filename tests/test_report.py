import re
import shutil

import pipeline_builders
import pytest
from pipeline_builders import fitted, make_backbone_dir, make_stage2_cache, python, silent
from report_builders import make_evaluated

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.reporting import comparison, files
from h2t.pipeline.stages import report

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
        pipeline_builders.evaluated(folder / "e" / name, cache, folder / "h", folder / "b", name=name)
    return folder / "e"


def reported(out, evaluated, hosts=("dr",), say=silent, title="T"):
    report.run(report.Params(title=title), Run("report", out, say=say), list(hosts), evaluated)
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


def test_the_same_input_gives_the_same_bytes(tmp_path, evaluated):
    for name in "ab":
        reported(tmp_path / name, evaluated)
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path.name


def test_hostile_names_of_hosts_are_text_on_the_page_and_in_markdown(tmp_path, evaluated):
    """Folders of somebody else's results are compared by their names, which may be anything that a folder can be."""
    name = '`a`|b|\n# <img src=x onerror="alert(4)">'.replace("/", "")
    for side in "ab":
        shutil.copytree(evaluated / "dr", tmp_path / side / name)
    said = []
    comparison.compare(tmp_path / "a", tmp_path / "b", tmp_path / "out", said.append, ("A|<b>x</b>", "B\n# y"))
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    for document in (text, "\n".join(said)):
        assert "<img" not in document
        assert "<b>" not in document
        assert "\n# " not in document.removeprefix("# ")
        for line in document.splitlines():
            if line.startswith("|") and "---" not in line:
                assert len(re.findall(r"(?<!\\)\|", line)) in (7, 8, 9, 11), line
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<b>x" not in page


@pytest.mark.parametrize(
    "data", [b"{", b"[1]", b"\xff", b"null", b"[" * 9999, b'{"a": 1}'], ids=lambda d: d.decode("latin-1")[:9]
)
def test_results_that_are_none(tmp_path, evaluated, data):
    shutil.copytree(evaluated / "dr", tmp_path / "dr")
    (tmp_path / "dr" / "metrics.json").write_bytes(data)
    with pytest.raises(UserError, match="not what evaluate wrote"):
        reported(tmp_path / "r", tmp_path)
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "y.json").write_bytes(data)
    if not data.endswith(b"}"):
        with pytest.raises(UserError, match="not a run record"):
            files.run_records(tmp_path / "runs")
    (tmp_path / "dr" / "metrics.json").write_bytes((evaluated / "dr" / "metrics.json").read_bytes())
    (tmp_path / "dr" / "heads.parquet").write_bytes(data)
    with pytest.raises(UserError, match="not what evaluate wrote"):
        reported(tmp_path / "r", tmp_path)


@pytest.mark.slow
def test_a_report_on_a_thousand_classes_stays_small(tmp_path):
    """1,000 classes, 50,000 test images, 55 heads: at most 2 GB, without torch, and a page below 5 MB."""
    small = make_evaluated(tmp_path / "small") / "dr"
    megabytes, torch = python("tests/large_report.py", small, tmp_path / "large").split()
    assert int(megabytes) < 2000
    assert torch == "False"
    assert (tmp_path / "large" / "report" / "index.html").stat().st_size < 5e6

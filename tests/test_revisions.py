"""`h2t report --compare` on revisions and experiments: real git, real DVC, a remote that is a path."""

import re
import shutil

import pytest
from pipeline_builders import accepted, refused, write_params
from report_builders import make_evaluated
from repositories import dvc, git, start_repository

from h2t.pipeline.reporting.results import load_result

DVC_YAML = """
stages:
  evaluate:
    foreach: [dr]
    do:
      cmd: cp -r made/${seed}/${item} data/evaluate/${item}
      deps: ["made/${seed}/${item}"]
      params: [seed]
      outs: ["data/evaluate/${item}"]
"""


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| dr")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three commits, `bare` without results, `one` and `two` with those of another seed; the last is checked out."""
    home = tmp_path_factory.mktemp("lab")
    root = start_repository(home, DVC_YAML, ["evaluate"])
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=bare", where=root)
    git("tag", "bare", where=root)
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(make_evaluated(home / name, seed=seed) / "dr", root / "made" / str(seed) / "dr")
        write_params(root / "params.yaml", seed=seed)
        dvc("repro", where=root)
        git("add", ".", where=root)
        git("commit", "--quiet", f"--message={name}", where=root)
        git("tag", name, where=root)
    return home


@pytest.fixture
def here(lab, monkeypatch, tmp_path):
    monkeypatch.chdir(lab / "a")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return lab


def test_a_project_below_the_root_of_its_repository_has_its_own_results(here, tmp_path, monkeypatch):
    top, root = tmp_path / "top", tmp_path / "top/deep/project"
    start_repository(top.parent, "stages: {}", []).rename(top)
    shutil.copytree(here / "a/made", root / "made")
    (root / "data/evaluate").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(here / "a" / name, root / name)
    monkeypatch.chdir(root)
    dvc("repro", where=root)
    git("add", ".", where=top)
    git("commit", "--quiet", "--message=project", where=top)
    found = table_of(accepted("report", "--compare", "HEAD", here / "one/evaluate"))
    assert found == table_of(accepted("report", "--compare", root / "data/evaluate", here / "one/evaluate"))
    assert len(found) == 3


def test_two_revisions_are_the_two_folders(here, tmp_path):
    folders = accepted("report", "--compare", here / "one/evaluate", here / "two/evaluate")
    found = accepted("report", "--compare", "one", "HEAD", tmp_path / "both")
    assert len(table_of(found)) == 3
    assert table_of(found) == table_of(folders)
    first, second = (load_result("dr", here / n / "evaluate/dr").metrics["with_h2t"]["top1"] for n in ("one", "two"))
    assert f"{second - first:+.2f} [" in table_of(found)[2]
    page = (tmp_path / "both/index.html").read_text()
    assert "A: one, B: HEAD" in page
    assert not re.search(r"h2t-revision-", page)


def test_a_revision_against_the_workspace(here):
    same = accepted("report", "--compare", "two", "data")
    assert "+0.00 identical" in table_of(same)[1]


def test_an_experiment_goes_by_its_name(here, lab):
    """`dvc exp run` on the last commit with the seed of the one before it gives the results of that."""
    dvc("exp", "run", "--name", "trial", "-S", "seed=0", where=lab / "a")
    found = accepted("report", "--compare", "HEAD", "trial", here / "both")
    assert table_of(found) == table_of(accepted("report", "--compare", "two", "one"))
    assert "A: HEAD, B: trial" in (here / "both/index.html").read_text()


def test_an_experiment_whose_name_several_have_is_one_line(here, lab):
    """DVC lets experiments on other commits have the same name."""
    root = lab / "a"
    for tag, seed in (("one", 1), ("two", 0)):
        git("checkout", "--quiet", "--force", tag, where=root)
        dvc("checkout", "--force", where=root)
        dvc("exp", "run", "--name", "twice", "-S", f"seed={seed}", where=root)
    git("checkout", "--quiet", "--force", "bare", where=root)
    line = refused("report", "--compare", "two", "twice", code=1)
    assert line.startswith("error: twice: several experiments have this name")
    git("checkout", "--quiet", "--force", "two", where=root)
    dvc("checkout", "--force", where=root)
    assert table_of(accepted("report", "--compare", "two", "twice"))  # the one on the commit that is checked out


def test_a_revision_comes_from_the_remote(here, lab):
    dvc("push", "--all-commits", where=lab / "a")
    before = table_of(accepted("report", "--compare", "one", "two"))
    shutil.rmtree(lab / "a/.dvc/cache")
    found = accepted("report", "--compare", "one", "two")
    assert table_of(found) == before


@pytest.mark.parametrize(
    ("place", "rule"), [("bare", "has no data/evaluate"), ("no-such", "neither a folder nor a revision")]
)
def test_what_cannot_be_compared_is_one_line(here, place, rule):
    line = refused("report", "--compare", place, "two", code=1)
    assert line.startswith(f"error: {place}: {rule}")

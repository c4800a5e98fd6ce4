"""`h2t report --compare`: A against B comes first, and says how many seeds both have and what is identical."""

import re

import pytest
from report_builders import make_evaluated, open_browser

from h2t.pipeline.reporting import comparison
from h2t.pipeline.reporting.results import load_result


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folders of a host with five seeds and with three of them, and one with another backbone."""
    home = tmp_path_factory.mktemp("compare")
    grid = {"ratio": [0.0, 0.3]}
    return {
        "five": make_evaluated(home / "five", grid={**grid, "seed": [0, 1, 2, 3, 4]}),
        "three": make_evaluated(home / "three", grid={**grid, "seed": [2, 3, 4]}, optimiser={"lr": 0.5}),
        "other": make_evaluated(home / "other", seed=1, grid={**grid, "seed": [0, 1, 2]}),
    }


def printed(a, b, out=None):
    said: list[str] = []
    comparison.compare(a, b, out, said.append)
    first, _, table = said[0].partition("\n\n")
    return first, [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if "| dr" in line]


def test_only_seeds_of_both_are_compared_and_counted(both):
    _, lines = printed(both["five"], both["three"])
    assert [line[4] for line in lines] == ["no seed", "3 of 5 seeds", "3 of 5 seeds"]
    a, b = (load_result("dr", both[n] / "dr") for n in ("five", "three"))
    for row, line in (("without_h2t", lines[1]), ("with_h2t", lines[2])):
        ratio = a.metrics[row]["ratio"]
        of_a, of_b = (r.at(ratio).set_index("seed").top1.loc[[2, 3, 4]].mean() for r in (a, b))
        assert float(line[5].split()[0]) == pytest.approx(of_b - of_a, abs=0.0051)


def test_what_is_identical_is_called_so(both):
    sentence, lines = printed(both["five"], both["five"])
    assert sentence == "Top-1 of B against A, over 3 classifiers: identical for 3."
    assert all(line[5].endswith("identical") for line in lines)
    assert [line[4] for line in lines] == ["no seed", "5 seeds", "5 seeds"]


def test_two_backbones_get_no_verdict(both):
    sentence, lines = printed(both["five"], both["other"])
    assert sentence.endswith("no verdict for 3.")
    assert all(line[5].endswith("no verdict") for line in lines)


def test_the_page_begins_with_a_against_b(both, tmp_path):
    sentence, lines = printed(both["five"], both["three"], tmp_path / "out")
    with open_browser() as page:
        page.open(tmp_path / "out" / "index.html")
        assert page.errors == []
        assert page.run(
            "document.querySelector('h1').closest('section').contains(document.querySelector('#sides-table'))"
        )
        assert page.run("document.querySelector('main').innerText").split("\n\n")[1].strip() == sentence
        cells = page.run(
            "[...document.querySelectorAll('#sides-table tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
        )
        assert [c[2] for c in cells] == [line[4] for line in lines]
        assert [c[5].split("\n")[0] for c in cells] == [line[5].split()[0] for line in lines]
        assert page.run("document.querySelector('#sides-table').getBoundingClientRect().bottom") < 900
        assert page.run("[...document.querySelectorAll('#methods tbody th')].map(h => h.textContent)") == [
            "A: dr",
            "B: dr",
        ]
    text = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert re.search(r"^# A: .*five.*, B: .*three", text)

"""What a reader sees first, on a screen, on a phone and on paper, whatever colours the reader can tell apart."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from pipeline_builders import ROOT
from report_builders import make_evaluated, open_browser
from test_answer import stated, with_figures

from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.reporting import page
from h2t.pipeline.reporting.answer import Answer
from h2t.pipeline.reporting.first_screen import scale
from h2t.pipeline.reporting.page import render
from h2t.pipeline.reporting.results import load_result

NAMES = ["dr", "reslt", "mislas", "gcl", "crt", "lws", "logistic_regression"]
VERDICTS = ["higher", "lower", "too close to tell", "identical", None]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Seven methods: five with another verdict each, one more, and a fit in closed form."""
    folder = tmp_path_factory.mktemp("first")
    evaluated = make_evaluated(folder, "dr", classes=["cat", "dog", "owl", "emu"], grid={"ratio": [0.0, 0.1, 0.3, 0.6]})
    make_evaluated(folder, "ncm", classes=["cat", "dog", "owl", "emu"], host="ncm", fitted=True)
    dr, ncm = (load_result(name, evaluated / name) for name in ("dr", "ncm"))
    found = []
    for i, name in enumerate(NAMES[:-1]):
        without, moved = 80.0 - i, (2.0, -2.0, 0.5, 0.0, 1.0, 3.0)[i]
        one = with_figures(
            dr, stage1=(70.0, 20.0), without_h2t=(without, 50.0 + i), with_h2t=(without + moved, 55.0 + i)
        )
        change = (moved, moved - 1, moved + 1, VERDICTS[i % 5])
        found.append(replace(stated(one, top1=change, tail=change), name=name))
    return [*found, replace(with_figures(ncm, without_h2t=(81.0, 62.5)), name=NAMES[-1])]


@pytest.fixture(scope="module")
def file(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    backbones = dict.fromkeys(NAMES, "b0")
    path.write_text(render("Long-tailed pets", Answer(results, (), Path("data/evaluate"), backbones)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shown(file):
    with open_browser() as found:
        found.open(file)
        yield found


@pytest.fixture
def desk(shown, file):
    """The page on a screen of 1440 x 900."""
    shown.seen_by("none")
    shown.resize(1440, 900)
    shown.open(file)
    shown.wait("document.querySelectorAll('#multiples svg').length > 0")
    return shown


def place_of(page, selector, what="bottom"):
    return page.run(f"document.querySelector({selector!r}).getBoundingClientRect().{what} + scrollY")


#: What people ask of a result, and where the page answers: docs/report.md tells the same.
QUESTIONS = {
    "Which classifier is best?": ("#best", "Best top-1: dr with H2T at ratio 0.3; top-1 82.0 %, tail 55.0 %."),
    "Is that luck?": ("#best", "on these test images; chosen on nine tenths of them, the best has"),
    "Which are as good?": ("#best", "Not clearly behind it:"),
    "Does H2T help here?": (
        ".answer",
        "H2T in 6 methods: top-1 higher in 2, lower in 1, identical in 1, undecided in 2",
    ),
    "How sure is that?": (
        ".answer",
        "Intervals (95 %) cover 3 seeds of stage II and 24 test images; not other trainings",
    ),
    "What did it cost?": (".answer", "Cost: "),
    "How do I use it?": (
        "#command",
        "h2t export data/train_classifier/dr data/extract/b0 data/train_backbone/b0 model",
    ),
    "What did stage II add to stage I?": ("tr[data-host=dr] .steps", "70.0 → 80.0 → 82.0"),
    "Which ratio, and was the grid wide enough?": ("tr[data-host=dr] .ratio", "0.3"),
    "Is a simple baseline as good?": ("tr[data-host=logistic_regression] .steps", "81.0"),
    "What are tail classes, and how many images are there?": (".first", "tail: 1 class with 5 training images"),
}


@pytest.mark.parametrize(("width", "height", "screens"), [(1440, 900, 1), (390, 844, 2)])
def test_ten_questions_are_answered_at_first_sight(desk, width, height, screens):
    """Without scrolling at a desk, within one scroll on a phone."""
    desk.resize(width, height)
    for question, (selector, answer) in QUESTIONS.items():
        assert answer in desk.run(f"document.querySelector({selector!r}).innerText").replace("\n", " "), question
        last = ".facts + .answer" if selector == ".first" else selector
        assert place_of(desk, last) <= height * screens, question


def test_docs_list_the_same_questions():
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+\?) \|", text, re.MULTILINE)
    assert rows == list(QUESTIONS)


def test_bold_marks_the_better_classifier_whether_with_h2t_or_without(desk):
    bold = {n: desk.run(f"document.querySelector('tr[data-host={n}] .steps strong').textContent") for n in NAMES[:4]}
    assert bold == {"dr": "82.0", "reslt": "79.0", "mislas": "78.5", "gcl": "77.0"}


def test_dots_lie_at_the_change_and_lines_over_its_interval(desk, results):
    changes = [m.changes["top1"] for m in Answer(results).methods if m.changes]
    on = scale(changes)
    for name, change in zip(NAMES, changes, strict=False):
        cell = f"document.querySelector('tr[data-host={name}] .plot .dots')"
        box = desk.run(f"(b => [b.left, b.width])({cell}.getBoundingClientRect())")
        line = desk.run(f"(b => [b.left, b.right])({cell}.querySelector('.interval').getBoundingClientRect())")
        expected = [box[0] + box[1] * on.at(v) / 100 for v in (change.low, change.high)]
        assert line == pytest.approx(expected, abs=1.5)
        dot = desk.run(f"(b => (b.left + b.right) / 2)({cell}.querySelector('path').getBoundingClientRect())")
        assert dot == pytest.approx(box[0] + box[1] * on.at(change.mean) / 100, abs=1.5)


def test_every_verdict_has_a_shape_and_words(desk):
    script = "(row => [row.querySelector('path').getAttribute('class'), row.querySelector('.plot .under').textContent])"
    seen = {n: desk.run(f"{script}(document.querySelector('tr[data-host={n}]'))") for n in NAMES[:5]}
    assert seen == {
        "dr": ["higher", "+2.0 higher"],
        "reslt": ["lower", "-2.0 lower"],
        "mislas": ["open", "+0.5 too close to tell"],
        "gcl": ["identical", "+0.0 identical"],
        "crt": ["open", "+1.0 no verdict"],
    }
    shapes = desk.run("[...new Set([...document.querySelectorAll('.dots path')].map(p => p.getAttribute('d')))].length")
    assert shapes == 4


@pytest.mark.parametrize(
    ("ends", "ticks"),
    [
        ([(-1.2, -0.3, 0.4)], ["-1.5", "-1", "-0.5", "0", "+0.5"]),
        ([(0.0, 0.0, 0.0)], ["0", "+0.1"]),
        ([(None, 3.0, None)], ["0", "+1", "+2", "+3"]),
        ([], ["0", "+0.1"]),
    ],
)
def test_a_scale_shows_zero_and_every_interval(ends, ticks):
    changes = [Difference(mean, low, high, None, (), 3) for low, mean, high in ends]
    found = scale(changes)
    assert [text for _, text in found.ticks] == ticks
    assert 0 <= found.at(0.0) <= 100
    assert all(0 <= found.at(v) <= 100 for c in changes for v in (c.low, c.mean, c.high) if v is not None)


def test_the_reader_picks_what_methods_are_ranked_by(desk, results):
    order = "[...document.querySelectorAll('#methods tbody tr')].map(r => r.dataset.host)"
    seen = {}
    for figure in ("top1", "tail", "ece"):
        desk.run(f"document.getElementById('rank').value = {figure!r}")
        desk.run("document.getElementById('rank').dispatchEvent(new Event('change'))")
        ranking = Answer(results).rankings[figure]
        assert desk.run(order) == [m.name for m in ranking.methods]
        shared = "=" if ranking.ties else ""  # also on the best, which shares its place
        places = desk.run("[...document.querySelectorAll('#methods .place')].map(c => c.textContent)")
        expected = [ranking.places[m.name] for m in ranking.methods]
        assert places == [f"{place}{shared if place == 1 else ''}" for place in expected]
        assert ranking.best.name in desk.run("document.getElementById('best').textContent")
        assert f"/{ranking.best.name} " in desk.run("document.getElementById('command').textContent")
        seen[figure] = tuple(desk.run(order))
    assert len(set(seen.values())) > 1


def test_the_command_is_copied(desk):
    desk.run("document.execCommand = kind => { window.copied = [kind, String(getSelection())]; return true; }")
    desk.run("Object.defineProperty(navigator, 'clipboard', {value: {writeText: () => Promise.reject()}})")
    desk.run("document.getElementById('copy').click()")
    desk.wait("window.copied")
    assert desk.run("window.copied") == ["copy", desk.run("document.getElementById('command').textContent")]


def test_the_address_keeps_what_was_chosen(desk, file):
    for control, value, event in (("host", "mislas", "change"), ("ratio", 1, "input"), ("rank", "tail", "change")):
        desk.run(f"document.getElementById({control!r}).value = {str(value)!r}")
        desk.run(f"document.getElementById({control!r}).dispatchEvent(new Event({event!r}))")
    address = desk.run("location.hash")
    assert dict(part.split("=") for part in address[1:].split("&")) == {
        "method": "mislas", "ratio": "0.1", "classifier": "with_h2t", "rank": "tail",
    }  # fmt: skip
    words = desk.run("document.getElementById('ratio-text').textContent")
    desk.open(file)
    desk.run(f"location.hash = {address!r}")
    desk.wait("document.getElementById('host').value === 'mislas'")
    assert desk.run("document.getElementById('ratio-text').textContent") == words
    assert desk.run("document.getElementById('rank').value") == "tail"
    desk.run("document.querySelector('nav a[href=\"#embedding\"]').click()")
    assert desk.run("location.hash").endswith("&at=embedding")
    assert "method=mislas" in desk.run("location.hash")


@pytest.mark.parametrize("address", ["#method=none&ratio=7&rank=x", "#%3Cscript%3E", "#results", "#ratio=&pair=1"])
def test_an_address_that_names_nothing_is_left_alone(desk, address):
    desk.run(f"location.hash = {address!r}")
    desk.run("new Promise(done => setTimeout(done, 200))")
    assert desk.errors == []
    assert desk.run("document.getElementById('host').value") == "dr"


def test_what_sticks_ends_with_the_pictures_that_follow_it(desk):
    """The slider moves along with its own pictures only; the choice of a method, with all that follow it."""
    assert desk.run("getComputedStyle(document.querySelector('.slider')).position") == "static"
    assert desk.run("document.querySelector('.one-method').contains(document.querySelector('.controls'))")
    before = desk.run("[...document.querySelectorAll('.one-method .chart')].map(c => c.innerHTML)")
    desk.run("document.getElementById('host').value = 'logistic_regression'")
    desk.run("document.getElementById('host').dispatchEvent(new Event('change'))")
    after = desk.run("[...document.querySelectorAll('.one-method .chart')].map(c => c.innerHTML)")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert desk.run(
        "[...document.querySelectorAll('.chart')].filter(c => !c.closest('.one-method')).map(c => c.id)"
    ) == ["multiples"]


def test_one_picture_has_every_method(desk):
    assert desk.run("[...document.querySelectorAll('.multiple .name')].map(n => n.textContent)") == NAMES
    assert desk.run("document.querySelectorAll('#multiples svg').length") == len(NAMES) - 1  # one has no H2T


def test_tail_samples_without_and_with_h2t_have_the_same_axes(desk):
    axes = "[...document.querySelectorAll('#{} [aria-label=\"y-axis tick label\"] text')].map(t => t.textContent)"
    assert desk.run(axes.format("tail-without")) == desk.run(axes.format("tail-with")) != []
    tops = desk.run("['tail-without', 'tail-with'].map(id => document.getElementById(id).getBoundingClientRect().top)")
    assert tops[0] == pytest.approx(tops[1], abs=1)


def test_the_most_confused_pairs_have_their_counts(desk, results):
    table = results[0].tables["confusion"]
    numbers = {row: results[0].numbers(row) for row in ("without_h2t", "with_h2t")}
    wrong = table[table.true != table.predicted].assign(
        pair=lambda t: [tuple(sorted(p)) for p in zip(t.true, t.predicted, strict=True)]
    )
    means = {row: wrong[wrong.number.isin(n)].groupby("pair")["count"].sum() / len(n) for row, n in numbers.items()}
    first = means["without_h2t"].add(means["with_h2t"], fill_value=0).idxmax()
    value = desk.run("document.getElementById('pair').options[1].value")
    assert sum(m.get(tuple(map(int, value.split(","))), 0) for m in means.values()) == pytest.approx(
        sum(m.get(first, 0) for m in means.values())
    )
    text = desk.run("document.getElementById('pair').options[1].textContent")
    counts = [float(n) for n in re.findall(r"([\d.]+) times", text)]
    pair = tuple(map(int, value.split(",")))
    assert counts == pytest.approx([means[r].get(pair, 0.0) for r in ("without_h2t", "with_h2t")], abs=0.051)


def test_a_pair_keeps_its_colours_and_everything_else_is_paper(desk):
    """Pixels of the regions: those of other classes have the page's own colour, no grey."""
    script = """new Promise(done => {
        const picture = new Image();
        picture.onload = () => {
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [picture.width, picture.height];
            const context = canvas.getContext('2d');
            context.drawImage(picture, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data, seen = {};
            for (let i = 0; i < data.length; i += 4) seen[[...data.slice(i, i + 4)].join()] = 1;
            done(Object.keys(seen));
        };
        picture.src = document.querySelector('#without image').getAttribute('href');
    })"""
    everything = set(desk.run(script))
    desk.run("document.getElementById('pair').value = document.getElementById('pair').options[1].value")
    desk.run("document.getElementById('pair').dispatchEvent(new Event('change'))")
    pair = set(desk.run(script))
    assert pair - {"255,255,255,255"} < everything
    assert len(pair) <= 3
    names = desk.run("[...document.querySelectorAll('#without + details, #without')].length")
    assert names
    assert "of" in desk.run("document.getElementById('pair-text').textContent")


# --- colours, for everybody

#: Linear RGB as people with full colour vision and with a deficiency see it. Source: Machado, Oliveira, Fernandes, "A
#: Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE TVCG 15, 2009, severity 1.0.
VISION = {
    "full": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB."""
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the style sheet, light and dark."""
    text = (Path(page.__file__).parent / "templates" / "style" / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{([^}]*)\}", text)[:2]
    found = [dict(re.findall(r"--([\w]+): (#[0-9a-f]{3,6})", part)) for part in (light, dark)]
    return {
        name: {k: v if len(v) == 7 else "#" + "".join(c * 2 for c in v[1:]) for k, v in palette.items()}
        for name, palette in zip(("light", "dark"), found, strict=True)
    }


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("light", ["light", "dark"])
@pytest.mark.parametrize("together", [("top1", "head", "medium", "tail"), ("stage1", "without", "with")])
def test_colours_in_one_picture_can_be_told_apart(together, light, vision):
    palette = palettes()[light]
    for a, b in combinations(together, 2):
        seen = [lab(np.array(VISION[vision]) @ linear(palette[c])) for c in (a, b)]
        assert np.linalg.norm(seen[0] - seen[1]) > 20, (a, b)


@pytest.mark.parametrize("light", ["light", "dark"])
def test_colours_stand_out_from_the_page(light):
    """At least 3 : 1, as WCAG 2.1 (1.4.11) asks for graphics."""
    palette = palettes()[light]
    paper, *others = (
        float(TO_XYZ[1] @ linear(palette[c])) + 0.05
        for c in ("paper", "top1", "head", "medium", "tail", "stage1", "without", "with")
    )
    assert all(max(paper, o) / min(paper, o) >= 3 for o in others)


def test_a_colour_has_one_meaning():
    for palette in palettes().values():
        meanings = [palette[c] for c in ("head", "medium", "tail", "stage1", "without", "with")]
        assert len(set(meanings)) == len(meanings)


def test_lines_and_legends_have_shapes_too(desk):
    dots = "[...document.querySelectorAll('.multiple svg g[aria-label=dot] path')].map(p => p.getAttribute('d'))"
    assert desk.run(f"new Set({dots}).size") >= 3
    legends = desk.run("[...document.querySelectorAll('.legend li')].every(l => l.querySelector('svg path, svg rect'))")
    assert legends
    assert desk.run("getComputedStyle(document.querySelector('.legend')).forcedColorAdjust") == "none"


# --- paper


@pytest.mark.parametrize("dark", [False, True])
def test_paper_shows_every_column_in_light_colours(shown, file, dark):
    """186 mm between the margins of A4 are 703 pixels."""
    shown.resize(703, 1000, dark)
    shown.open(file)
    shown.media("print", dark)
    shown.run("dispatchEvent(new Event('beforeprint'))")
    try:
        assert shown.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert shown.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        tables = "[...document.querySelectorAll('table')].filter(t => t.offsetParent)"
        assert shown.run(f"{tables}.filter(t => t.getBoundingClientRect().right > 704).map(t => t.id)") == []
        heads = shown.run(
            "[...document.querySelectorAll('#hosts thead th')].map(h => h.innerText.trim().toLowerCase())"
        )
        named = ["classifier", "ratio", "top-1", "tail", "medium", "head", "ece", "statistics"]
        assert [h for h in heads if h] == named
        for hidden in (".controls", ".slider", "nav", "#rank", "#copy"):
            assert shown.run(f"document.querySelector({hidden!r}).getClientRects().length") == 0, hidden
        assert shown.run("document.querySelector('.words p').getClientRects().length") > 0
        assert shown.run("document.querySelector('.legend svg').getClientRects().length") > 0
        assert shown.run("getComputedStyle(document.querySelector('.legend svg')).printColorAdjust") == "exact"
    finally:
        shown.media("screen")


def test_a_printed_page_is_a4(shown, file, tmp_path):
    shown.open(file)
    shown.pdf(tmp_path / "page.pdf")
    text = (tmp_path / "page.pdf").read_bytes()
    sizes = {tuple(map(float, s)) for s in re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", text)}
    assert sizes
    for width, height in sizes:
        assert (width, height) == pytest.approx((595, 842), abs=1)

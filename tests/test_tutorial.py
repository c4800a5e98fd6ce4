"""docs/tutorial.md is typed as it stands: every block runs, and its output is the one on the page but for figures."""

import io
import re

import pytest
import tutorial
from PIL import Image
from pipeline_builders import environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def without_figures(text: str) -> list[str]:
    """The lines of an output: figures as 0, as training differs in them from machine to machine; one space, no bars."""
    lines = re.sub(r"[\d.]+(e-\d+)?%?", "0", text).splitlines()
    return [re.sub(r"[\s\u2588]+", " ", line).strip() for line in lines if line.strip()]


def without_classes(lines: list[str]) -> list[str]:
    """Predictions without the predicted class, which may differ too."""
    return [re.sub(r"(,0,)\w+(,0)$", r"\1\2", line) for line in lines]


def test_the_tutorial(tmp_path, warm_programs, starts_warm):
    programs = f"{warm_programs}:/usr/bin:/bin"
    outputs = dict(tutorial.typed(tmp_path, environment(PATH=programs, HOME=str(tmp_path))))
    page = tutorial.PAGE.read_text(encoding="utf-8")
    shown = tutorial.printed(page)
    assert len(shown) >= 4
    for code, text in shown.items():
        found, expected = (without_classes(without_figures(given)) for given in (outputs[code], text))
        assert sorted(found) == sorted(expected), f"{code}\nIf this is right: python tests/tutorial.py"
    assert outputs[next(code for code in shown if code.startswith("h2t init"))].rstrip() in page
    drawn = Image.open(io.BytesIO(tutorial.photos_picture(tmp_path / "photos")))
    assert "<svg" in tutorial.accuracy_picture(tmp_path / "project")
    with Image.open(tutorial.PHOTOS) as picture:
        assert picture.tobytes() == drawn.tobytes()

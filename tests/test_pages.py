"""docs/methods.md and docs/parameters.md say what docstrings and parameter models say."""

import methods_page
import parameters_page
import pytest
from parameters_page import built_in

from h2t.pipeline.base import plugins
from h2t.pipeline.inspection.settings import SECTIONS


@pytest.mark.parametrize("made", [methods_page, parameters_page])
def test_a_page_is_up_to_date(made):
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), f"run: python tests/{made.__name__}.py"


@pytest.mark.parametrize("kind", ["hosts", "objectives"])
def test_every_method_names_a_source_and_the_published_setting(kind):
    text = methods_page.PAGE.read_text(encoding="utf-8").split(f"\n## {kind.capitalize()}\n", 1)[1].split("\n## ", 1)[0]
    for name in built_in(kind):
        own = text.split(f"### {name}\n", 1)[1].split("\n### ", 1)[0]
        assert "Source" in own or name == "ce", name
        assert "Published setting:" in own, f"{name}: the docstring must say what its authors do otherwise"


def test_every_section_and_every_plug_in_with_options_has_its_parameters_listed():
    text = parameters_page.PAGE.read_text(encoding="utf-8")
    assert [name for name in SECTIONS if f"| `{name}` |" not in text] == []
    kinds = [kind for kind in plugins.KINDS if kind != "samplers"]  # which take no options
    assert [name for kind in kinds for name in built_in(kind) if f"`{name}`" not in text] == []

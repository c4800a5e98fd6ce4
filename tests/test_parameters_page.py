"""docs/parameters.md says what the parameter models accept."""

from parameters_page import PAGE, built_in, page

from h2t.pipeline.base import plugins
from h2t.pipeline.inspection.settings import SECTIONS


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/parameters_page.py"


def test_every_section_and_every_plug_in_with_options_is_on_it():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in SECTIONS if f"| `{name}` |" not in text] == []
    kinds = [kind for kind in plugins.KINDS if kind != "samplers"]  # which take no options
    assert [name for kind in kinds for name in built_in(kind) if f"`{name}`" not in text] == []

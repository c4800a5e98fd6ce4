"""docs/methods.md says what the docstrings of hosts, samplers and objectives say."""

import pytest
from methods_page import PAGE, page
from parameters_page import built_in


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/methods_page.py"


@pytest.mark.parametrize("kind", ["hosts", "objectives"])
def test_every_method_names_a_source_and_the_published_setting(kind):
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {kind.capitalize()}\n", 1)[1].split("\n## ", 1)[0]
    for name in built_in(kind):
        own = text.split(f"### {name}\n", 1)[1].split("\n### ", 1)[0]
        assert "Source" in own or name == "ce", name
        assert "Published setting:" in own, f"{name}: the docstring must say what its authors do otherwise"

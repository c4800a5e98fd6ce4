"""docs/methods.md says what the docstrings of hosts and samplers say."""

from methods_page import PAGE, page
from parameters_page import built_in


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/methods_page.py"


def test_every_host_names_a_source():
    text = PAGE.read_text(encoding="utf-8")
    for name in built_in("hosts"):
        own = text.split(f"### {name}\n", 1)[1].split("\n### ", 1)[0]
        assert "Source" in own, name

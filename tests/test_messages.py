"""tests/golden/messages.txt lists every text that a user can see."""

import re

import messages

SOURCE = '''
"""A docstring of a module."""

@main.command(epilog="h2t do data/x")
def do(name):
    """Do one thing. With two sentences."""
    known = "one word" if name else "plain"
    raise UserError(f"{name}: must be {', '.join(known)}; got {name!r}" + f"; {'try again' if name else 'stop here'}")

def silent(values):
    """A docstring of a function."""
    return values["key"] + 1
'''


def test_the_list_of_messages_is_up_to_date():
    assert messages.GOLDEN.read_text(encoding="utf-8") == messages.page(), "type: python tests/messages.py"


def test_a_size_has_the_unit_that_suits_it():
    """By `cache.sizes.sized`: a division by a million or a billion would show small sizes as 0.0."""
    assert not re.search(r"/ 10{6,9}\.0.*[MG]B", messages.page())


def test_texts_and_docstrings_of_commands_are_listed_and_nothing_else():
    assert messages.texts(SOURCE) == [
        "Do one thing. With two sentences.",
        "one word",
        "{name}: must be {', '.join(known)}; got {name}; {try again | stop here}",
        "h2t do data/x",
    ]

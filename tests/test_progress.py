"""Progress bars: Ctrl-C while one is made."""

import gc
import sys

import pytest
from tqdm import tqdm

from h2t.pipeline.base.progress import Bar, progress


def interrupted(*given):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("made", "left"), [(progress, 0), (lambda items, what, **more: tqdm(items, what, **more), 1)])
def test_a_bar_that_is_interrupted_while_it_is_made_says_nothing(monkeypatch, made, left):
    """A bar of tqdm itself tells of an attribute that it lacks: "Exception ignored in"."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda of: said.append(type(of.exc_value)))
    with monkeypatch.context() as patched:
        patched.setattr(Bar, "_get_free_pos", interrupted)
        patched.setattr(tqdm, "_get_free_pos", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(None, "extract", unit="row")
        gc.collect()
    assert said == [AttributeError] * left


@pytest.mark.parametrize("name", ["unit", "last_print_t"])
def test_a_bar_that_is_interrupted_as_it_sets_an_attribute_says_nothing(monkeypatch, name):
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda of: said.append(of.exc_value))
    with monkeypatch.context() as patched:
        patched.setattr(Bar, name, property(lambda bar: 0.0, interrupted), raising=False)
        with pytest.raises(KeyboardInterrupt):
            progress(None, "extract", unit="row")
        gc.collect()
    assert said == []

"""The same inputs give the same results under the same number: every stage and every built-in plug-in."""

from importlib.metadata import version

import golden_cases
import numpy as np
import pytest

from h2t.pipeline.base import numbers

pytestmark = pytest.mark.slow

HOW = """{case}: other results under the number {number}. If that is meant, raise the number:
  1. in the file of {case}: NUMBER = the date and a counter, never a number that was used before
  2. h2t upgrade --apply
  3. python tests/golden_cases.py
"""


@pytest.mark.parametrize("case", golden_cases.all_cases())
def test_the_results_are_those_of_the_number(case):
    if case == "backbones.huggingface" and version("transformers") < "5":
        pytest.skip("transformers 4 has other names for a network's modules, and draws other weights")
    number, expected = golden_cases.load(case)
    assert numbers.built_in()[case] == number, f"{case}: type: python tests/golden_cases.py"
    lines = golden_cases.differences(golden_cases.run(case), expected)
    assert not lines, HOW.format(case=case, number=number) + "\n".join(lines)


def test_no_result_is_left_over():
    assert sorted(path.stem for path in golden_cases.RESULTS.iterdir()) == golden_cases.all_cases()


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        (np.array([1.0, 2.0]), np.array([1.0, 2.0]) * (1 + 1e-6), True),
        (np.array([1.0, 2.0]), np.array([1.0, 2.0 + 1e-4]), False),
        (np.array([np.nan]), np.array([1.0]), False),
        (np.array([1], np.float16), np.array([1 + 2**-10], np.float16), True),
        (np.array([1], np.float16), np.array([1 + 2**-9], np.float16), False),
        (np.array([1.0]), np.array([1]), False),
        (np.zeros(2), np.zeros(3), False),
        ("a", "a", True),
        ("a", "b", False),
        (np.array([3]), np.array([4]), False),
    ],
)
def test_rounding_is_no_difference_and_more_is(found, expected, same):
    assert (golden_cases.differences({"x": found}, {"x": expected}) == []) == same


def test_a_missing_or_new_part_is_a_difference():
    assert golden_cases.differences({"a": "1"}, {"b": "1"}) == ["a: new", "b: missing"]


def test_results_are_rewritten_for_a_new_number_only(tmp_path, monkeypatch, capsys):
    case, now = "pools.gap", numbers.built_in()["pools.gap"]
    monkeypatch.setattr(golden_cases, "RESULTS", tmp_path)
    monkeypatch.setattr(golden_cases, "all_cases", lambda: [case])
    assert golden_cases.main() == 0
    assert golden_cases.differences(golden_cases.run(case), golden_cases.load(case)[1]) == []
    _, found = golden_cases.load(case)

    def recorded(number, features):
        np.savez_compressed(golden_cases.path_of(case), NUMBER=np.int64(number), **{**found, "features": features})
        return golden_cases.path_of(case).read_bytes()

    kept = recorded(now, found["features"] * 1.01)
    assert golden_cases.main() == 1
    assert "other results under the same number" in capsys.readouterr().out
    assert golden_cases.path_of(case).read_bytes() == kept
    recorded(now + 1, found["features"])
    assert golden_cases.main() == 1
    assert "numbers only rise" in capsys.readouterr().out
    recorded(now - 1, found["features"] * 1.01)
    assert golden_cases.main() == 0
    assert golden_cases.load(case)[0] == now
    assert np.array_equal(golden_cases.load(case)[1]["features"], found["features"])

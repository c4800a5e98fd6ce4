"""When the audit of dependencies fails, and that it says one line where there is nothing to compare with."""

import pytest
from vulnerabilities import answered, verdict

PROBE = {"dependencies": [{"name": "pip", "version": "26", "vulns": []}]}
SILENT = {"dependencies": [{"name": "pip", "skip_reason": "not found"}]}


def found(**advisory):
    one = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"], **advisory}
    return {"dependencies": [{"name": "a", "version": "1", "vulns": [one]}, {"name": "b", "skip_reason": "not found"}]}


@pytest.mark.parametrize("probe", [None, SILENT, {"dependencies": []}])
def test_an_index_without_advisories_fails_nothing_and_says_so(probe):
    assert not answered(probe)
    code, lines = verdict(probe, None, {})
    assert (code, len(lines)) == (0, 1)
    assert "nothing was compared" in lines[0]


@pytest.mark.parametrize(
    ("advisory", "accepted", "code", "text"),
    [
        ({}, {}, 1, "mended in 2"),
        ({"fix_versions": []}, {}, 0, "not mended yet"),
        ({}, {"CVE-1": "not reached"}, 0, "accepted: not reached"),
        ({}, {"CVE-2": "another"}, 1, "mended in 2"),
    ],
)
def test_what_fails_is_what_can_be_mended(advisory, accepted, code, text):
    got, lines = verdict(PROBE, found(**advisory), accepted)
    assert got == code
    assert "a 1: PYSEC-1" in lines[0]
    assert text in lines[0]
    assert lines[-1] == f"audit: 1 packages compared, {code} to be mended; 1 are not in the index"


def test_too_late_an_answer_fails_nothing():
    assert verdict(PROBE, None, {})[0] == 0

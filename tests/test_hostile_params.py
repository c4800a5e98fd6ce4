"""Hostile parameter files and overrides: one line by the command that reads them, in bounded time and memory."""

import pytest
from pipeline_builders import refused, write_params

from pipeline import params

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases counted"),
        (MERGES, "aliases counted"),
        ("a: &a [*a]", "inside of what it stands for"),
        ("a: &a {b: *a}", "inside of what it stands for"),
        ("[" * 5000, "not readable"),
        ("a: " + "{a: " * 5000, "not readable"),
        ("- " * 5000, "not readable"),
        ("a: 0x" + "f" * 10**5, "too many digits"),
        ("a: " + "9" * 10**5, "too many digits"),
        ("a: " + "1:" * 10**5 + "1", "too many digits"),
        ("a: 2001-99-99", "month must be"),
        ("a: !!timestamp x", "not readable"),
        ("a: !!int ''", "not readable"),
        ("a: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 1\na: 2", "stands twice"),
        ("? [a]\n: 1", "unhashable"),
        ("a: \x07", "not readable"),
        ("- 1", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
        ("\ufeff\ufeffa: 1", "unknown section"),
        ('"\\ud800": 1', "unknown section"),
        ('"a\\nb\\e[2J": 1', "unknown section"),
        ("? \n", "unknown section"),
        ("1: 2", "unknown section"),
    ],
    ids=lambda value: value[:24] if len(value) < 40 else value[:24] + "...",
)
def test_parameters_that_are_none(tmp_path, text, says):
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    assert says in refused("prepare", tmp_path / "out", "--params", tmp_path / "p.yaml", leaves=tmp_path / "out")


def test_parameters_that_are_not_utf_8(tmp_path):
    (tmp_path / "p.yaml").write_bytes(b"seed: \xff\xfe")
    assert "not readable as YAML" in refused("prepare", tmp_path / "out", "--params", tmp_path / "p.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1e400", "seed=.nan", "seed=-1", "seed=2001-01-01", "hosts.dr.optimiser.lr=1e400",
        "hosts.dr.optimiser.lr=.inf",
        "hosts.dr.optimiser.lr=.nan", "hosts.dr.grid.ratio=[.nan]", "prepare.imbalance.ratio=.inf",
        "prepare=2001-01-01",
        "hosts.dr.grid.seed=[1e400]", "seed=" + "[" * 5000, "seed=!!timestamp x", "seed=0x" + "f" * 9999,
        "seed=\x1b[2J",
        "prepare.dataset=../../etc/passwd", "hosts.dr.host=__init__", "hosts.dr.host=" + "a" * 5000, "hosts.dr.pool=.",
        "hosts.dr.host=\ud800", "hosts.a\nb.c=1", "hosts={? {a: b} : 1}", "hosts={[a]: 1}", "seed.a=1", "=1", "x", "",
        "prepare.options={? : 1}", "evaluate.groups=[1, .nan]", "extract.shard_bytes=-9223372036854775809",
    ],
)  # fmt: skip
def test_overrides_that_are_none(tmp_path, override):
    file = write_params(tmp_path / "p.yaml")
    refused("prepare", tmp_path / "out", "--params", file, "--set", override, leaves=tmp_path / "out")


def test_aliases_and_merges_of_a_usual_size_stay(tmp_path):
    (tmp_path / "p.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n")
    assert params.load(tmp_path / "p.yaml")["b"] == {"x": 2, "y": [1, 2]}

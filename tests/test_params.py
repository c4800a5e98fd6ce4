import copy
from typing import Annotated

import pytest
import yaml
from pipeline_builders import make_params

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import (
    DISTINCT,
    Count,
    Positive,
    Ratio,
    Section,
    above,
    at_least,
    build,
    load,
    section,
    within,
)
from h2t.pipeline.inspection import settings
from h2t.pipeline.stages import prepare, report


class Inner(Section):
    ratios: Annotated[list[Ratio], DISTINCT] = [0.0]


class Outer(Section):
    count: Count
    rate: Positive = 0.1
    inner: Inner = Inner()


CASES = [
    ({"count": 1}, None),
    ({"count": 1, "rate": 1}, None),
    ({"count": 0}, "s.count: must be at least 1; got 0"),
    ({"count": True}, "s.count: must be a valid integer; got True"),
    ({"count": 1.0}, "s.count: must be a valid integer; got 1.0"),
    ({"count": "1"}, "s.count: must be a valid integer; got '1'"),
    ({"count": None}, "s.count: must be a valid integer; got None"),
    ({"count": 1, "rate": float("inf")}, "s.rate: must be a finite number; got inf"),
    ({"count": 1, "rat": 2}, "s.rat: unknown key; did you mean 'rate'?"),
    ({"cnt": 1}, "s.cnt: unknown key; did you mean 'count'?"),
    ({"count": 1, "inner": {"ratio": [1]}}, "s.inner.ratio: unknown key; did you mean 'ratios'?"),
    ({"count": 1, "inner": {"ratios": [0.0, 2.0]}}, "s.inner.ratios[1]: must lie in [0, 1]; got 2.0"),
    ({"count": 1, "inner": {"ratios": [0, 0.0]}}, "s.inner.ratios: must be a list of one or more different values"),
    ({}, "s.count: missing"),
    ([], "s: must be a mapping of keys; got []"),
]


@pytest.mark.parametrize(("values", "line"), CASES, ids=str)
def test_sections(values, line):
    if line is None:
        build(Outer, "s", values)
        return
    with pytest.raises(UserError) as error:
        build(Outer, "s", values)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build(Outer, "s", {"count": 1}).count = 2


@pytest.mark.parametrize(
    ("validator", "good", "bad"),
    [(within(0, 1), (0, 1, 0.5), (-1e-9, 1.1)), (above(0), (1e-9,), (0, -1)), (at_least(2), (2, 3), (1.9,))],
)
def test_ranges_hold_at_their_ends(validator, good, bad):
    for value in good:
        assert validator.func(value) == value
    for value in bad:
        with pytest.raises(ValueError, match="must"):
            validator.func(value)


class Bare(Section):
    """A plug-in of somebody who states no ranges."""

    rate: float = 0.0
    count: int = 0
    rates: list[float] = []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"rate": 1e39}, "s.rate: must fit float32, at most 3.4e+38; got 1e+39"),
        ({"rate": -1e39}, "s.rate: must fit float32, at most 3.4e+38; got -1e+39"),
        ({"rate": float("nan")}, "s.rate: must be a finite number; got nan"),
        ({"rates": [1.0, 1e300]}, "s.rates: must fit float32"),
        ({"count": 2**63}, "s.count: must be a whole number of at most 64 bits; got 9223372036854775808"),
        ({"count": -(2**63) - 1}, "s.count: must be a whole number of at most 64 bits"),
    ],
)
def test_no_number_goes_beyond_float32_or_int64(values, line):
    with pytest.raises(UserError) as error:
        build(Bare, "s", values)
    assert str(error.value).startswith(line)
    build(Bare, "s", {"rate": 3e38, "count": 2**63 - 1, "rates": [-3e38]})


def test_a_text_that_no_file_can_hold_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text('report: {title: "a \\ud800"}\n')
    with pytest.raises(UserError, match=r"report\.title: must be text without halves of characters") as error:
        build(report.Params, "report", load(tmp_path / "p.yaml")["report"])
    assert str(error.value).isascii()


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as error:
        build(Outer, "s", {"count": "x" * 5000})
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E4", 5e4),
        ("-1.5e+2", -150.0),
        ("1", 1),
        ("0.5", 0.5),
        ("e5", "e5"),
        ("1e", "1e"),
        ("[1e-3, 2]", [0.001, 2]),
        ("null", None),
        ("true", True),
    ],
)
def test_values_are_read_as_dvc_reads_them(tmp_path, text, value):
    from ruamel.yaml import YAML

    (tmp_path / "p.yaml").write_text(f"a: {text}\n")
    found = load(tmp_path / "p.yaml")["a"]
    assert found == value
    assert type(found) is type(value)
    assert YAML(typ="safe").load(f"a: {text}\n")["a"] == value
    assert load(tmp_path / "p.yaml", [f"a={text}"])["a"] == value


AMBIGUOUS = ["010", "-017", "+0_7", "1:30", "-1:30.5", "[1, 010]", "!!int '010'", "08", "0_8", "+0o10", "1_0e3"]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_a_number_that_dvc_reads_otherwise_is_refused(tmp_path, text):
    (tmp_path / "p.yaml").write_text(f"seed: 0\na: {text}\n")
    with pytest.raises(UserError, match=r"line 2, column \d+: .*(can mean base 8|of base 60|can be text or a number)"):
        load(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="the value must be YAML"):
        load(tmp_path / "p.yaml", [f"a={text}"])


def test_overrides_reach_into_sections_and_leave_the_rest(tmp_path):
    (tmp_path / "p.yaml").write_text("a: {b: {c: 1}, d: 2}\n")
    assert load(tmp_path / "p.yaml", ["a.b.c=[3]", "e=5"]) == {"a": {"b": {"c": [3]}, "d": 2}, "e": 5}


def test_a_section_that_is_not_there_gets_the_nearest():
    with pytest.raises(UserError, match=r"^params: no section 'hosts\.gcll'; did you mean 'gcl'"):
        section({"hosts": {"dr": {}, "gcl": {}}}, "hosts.gcll")


def test_names_of_plugins_default_to_the_key():
    values = make_params()
    del values["hosts"]["dr"]["host"]
    settings.check(values)
    assert values["hosts"]["dr"]["host"] == "dr"


def test_an_entry_has_the_defaults_where_it_says_nothing_else():
    values = make_params()
    values["host_defaults"] = {"batchnorm": "stage1", "optimiser": {"lr": 0.5, "epochs": 7}, "grid": {"ratio": [0.0]}}
    values["hosts"] = {
        "dr": {"backbone": "ce_mixup", "optimiser": {"epochs": 3}},
        "ncm": {"backbone": "ce_mixup"},
    }
    settings.check(values)
    assert values["hosts"]["dr"] == {
        "host": "dr",
        "backbone": "ce_mixup",
        "batchnorm": "stage1",
        "optimiser": {"lr": 0.5, "epochs": 3},
        "grid": {"ratio": [0.0]},
    }
    # A closed-form fit takes neither an optimiser nor a grid.
    assert values["hosts"]["ncm"] == {"host": "ncm", "backbone": "ce_mixup", "batchnorm": "stage1"}


def test_checking_twice_changes_nothing():
    values = make_params()
    settings.check(values)
    once = copy.deepcopy(values)
    settings.check(values)
    assert values == once


@pytest.mark.parametrize(
    ("section", "wrong", "line"),
    [
        ("host_defaults", {"optimiser": {"lrr": 1}}, r"^host_defaults\.optimiser\.lrr: unknown key; did you mean 'lr'"),
        ("backbone_defaults", {"epochs": 0}, r"^backbone_defaults\.epochs: must be at least 1; got 0"),
        ("host_defaults", [], r"^host_defaults: must be a mapping of keys; got \[\]"),
    ],
)
def test_a_wrong_default_is_named_where_it_stands(section, wrong, line):
    values = make_params(**{section: wrong})
    with pytest.raises(UserError, match=line):
        settings.check(values)


def test_sections_may_be_left_out():
    values = make_params()
    for name in settings.LEFT_OUT:
        values.pop(name, None)
    settings.check(values)
    assert set(values) == set(settings.SECTIONS)


@pytest.mark.parametrize(
    ("override", "at"),
    [
        ("run.cluster=local:2", ("run", "cluster")),
        ("train_classifier.residency=stream", ("train_classifier", "residency")),
        ("hosts.dr.optimiser.lr=0.5", ("hosts", "dr", "optimiser", "lr")),
        ("host_defaults.optimiser.lr=0.5", ("host_defaults", "optimiser", "lr")),
    ],
)
def test_an_override_reaches_a_section_that_the_file_leaves_out(tmp_path, override, at):
    values = make_params()
    for name in ("train_classifier", "run", "host_defaults"):
        values.pop(name, None)
    values["hosts"]["dr"].pop("optimiser")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    found = load(tmp_path / "params.yaml", [override])
    settings.check(found)
    for key in at:
        found = found[key]
    assert found == yaml.safe_load(override.partition("=")[2])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("runn.cluster=local:2", r"^--set runn\.cluster=local:2: no section 'runn'; did you mean 'run'"),
        ("hosts.drr.optimiser.lr=1", r"^--set hosts\.drr\.optimiser\.lr=1: no section 'hosts\.drr'; did you mean 'dr'"),
        ("hosts.dr.optimizer.lr=1", r"^hosts\.dr\.optimizer: unknown key; did you mean 'optimiser'"),
    ],
)
def test_an_override_of_an_unknown_section_is_refused(tmp_path, override, line):
    values = {**make_params(), "run": {}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=line):
        settings.check(load(tmp_path / "params.yaml", [override]))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (-1, "prepare.test: must be greater than 0; got -1"),
        ("many", "prepare.test: must be a valid number; got 'many'"),
        ({"at_mots": 2}, "prepare.test.at_mots: unknown key; did you mean 'at_most'?"),
        ({"at_most": 2, "keep": -3}, "prepare.test.keep: must be at least 1; got -3"),
        ({}, "prepare.test.at_most: missing; add it (h2t presets lists complete files)"),
    ],
)
def test_a_key_of_several_forms_is_named_without_their_types(given, says):
    with pytest.raises(UserError) as error:
        build(prepare.Params, "prepare", {"dataset": "digits", "test": given})
    assert str(error.value) == says

"""Hostile parameter files and overrides: one line by the command that reads them, in bounded time and memory."""

import math
from typing import Annotated, Literal, get_args, get_origin

import pydantic
import pytest
from pipeline_builders import refused, write_params

from h2t.pipeline.base import params, plugins

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k0: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "values after expanding aliases"),
        (MERGES, "values after expanding aliases"),
        ("a: &a [*a]", "inside its own target"),
        ("a: &a {b: *a}", "inside its own target"),
        ("a: [1", "must be a readable YAML file"),
        ("[" * 5000, "must be a readable YAML file"),
        ("a: " + "{a: " * 5000, "must be a readable YAML file"),
        ("- " * 5000, "must be a readable YAML file"),
        ("a: 0x" + "f" * 10**5, "more than 300 digits"),
        ("a: " + "9" * 10**5, "more than 300 digits"),
        ("a: " + "1:" * 10**5 + "1", "more than 300 digits"),
        ("a: 2001-99-99", "month must be"),
        ("a: !!timestamp x", "must be a readable YAML file"),
        ("a: !!int ''", "must be a readable YAML file"),
        ("a: !!python/object/apply:os.system [touch ran]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: 1\na: 2", "duplicate key"),
        ("? [a]\n: 1", "unhashable"),
        ("a: \x07", "must be a readable YAML file"),
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
    assert "must be a readable YAML file" in refused("prepare", tmp_path / "out", "--params", tmp_path / "p.yaml")


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


def _models():
    """Every parameter model: those of the stages and of every plug-in, and the models inside them."""
    from h2t.pipeline.heads.residency import Residency
    from h2t.pipeline.stages import evaluate, extract, pool, prepare, report, train_backbone, train_classifier

    stages = (evaluate, extract, pool, prepare, report, train_backbone, train_classifier)
    found = [Residency, *(stage.Params for stage in stages)]
    for kind, name in (("datasets", "Options"), ("backbones", "Options"), ("pools", "Options"), ("hosts", "Loss")):
        found += [getattr(plugins.load(kind, n), name) for n in plugins.names(kind)]
    found += [plugins.load("objectives", n).Loss for n in plugins.names("objectives")]
    inner = [f.annotation for model in found for f in model.model_fields.values()]
    return {*found, *(m for m in inner if isinstance(m, type) and issubclass(m, params.Section))}


def _numbers(field):
    """The types inside a field's annotation, with what is annotated on each: (type, metadata)."""

    def walk(annotation, metadata):
        if annotation in (int, float):
            yield annotation, metadata
        elif get_origin(annotation) is Annotated:
            inner, *more = get_args(annotation)
            yield from walk(inner, [*more, *metadata])
        else:
            for part in get_args(annotation):
                if get_origin(annotation) is not Literal:
                    yield from walk(part, metadata)

    return list(walk(field.annotation, list(field.metadata)))


@pytest.mark.parametrize("model", sorted(_models(), key=lambda m: f"{m.__module__}.{m.__name__}"), ids=str)
def test_every_number_of_every_model_has_a_range(model):
    """No bare int or float, and nothing that float32 or int64 cannot hold gets through, in a list or alone."""
    config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    for name, field in model.model_fields.items():
        numbers = _numbers(field)
        for kind, metadata in numbers:
            assert metadata, f"{model.__module__}: {name} is a bare {kind.__name__}; give it a type of base.params"
        if not numbers:
            continue
        adapter = pydantic.TypeAdapter(Annotated[field.annotation, *field.metadata, 0], config=config)
        for value in (1e39, -1e39, math.nan, math.inf, 2**63, -(2**63) - 1):
            for given in (value, [value], [value] * 2, [value] * 3):
                with pytest.raises(pydantic.ValidationError):
                    adapter.validate_python(given)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("hosts.dr.optimiser.lr=1e-300", "hosts.dr.optimiser.lr: must lie in"),
        ("hosts.dr.optimiser.momentum=1.5", r"hosts.dr.optimiser.momentum: must lie in [0, 1]"),
        ("hosts.dr.optimiser.epochs=99999999999", "hosts.dr.optimiser.epochs: must be at most"),
        ("backbones.ce_mixup.gamma=1e30", "backbones.ce_mixup.gamma: must"),
        ("backbones.ce_mixup.warmup_epochs=99999999999999999999", "warmup_epochs: must be at most"),
        ("backbones.ce_mixup={arch: resnet20, nesterov: true, momentum: 0.0}", "nesterov needs a momentum above 0"),
        ("backbones.ce_mixup.options={experts: 1000000000}", "experts: must be at most 1000; got 1000000000"),
        ("extract.batch_size=1000000000", "extract.batch_size: must be at most 1048576"),
        ("extract.max_views=40000", "extract.max_views: must be at most 32768"),
    ],
)  # fmt: skip
def test_numbers_that_nothing_can_compute_with_are_refused_by_name(tmp_path, override, says):
    file = write_params(tmp_path / "p.yaml")
    assert says in refused("prepare", tmp_path / "out", "--params", file, "--set", override, leaves=tmp_path / "out")


def test_aliases_and_merges_of_a_usual_size_stay(tmp_path):
    (tmp_path / "p.yaml").write_text("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n")
    assert params.load(tmp_path / "p.yaml")["b"] == {"x": 2, "y": [1, 2]}

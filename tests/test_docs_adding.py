"""The pages on adding things: short, and their code is what the conformance tests accept."""

import re
from pathlib import Path

import pytest
import yaml
from conformance import (
    COUNTS,
    check_backbone,
    check_gradients,
    check_head_alone,
    check_logits,
    check_objective,
    check_pool,
    check_sampler,
)
from pipeline_builders import ROOT, make_params, make_samples, make_stage2_cache

from h2t.pipeline.base import plugins
from h2t.pipeline.inspection import settings
from h2t.pipeline.inspection.doctor import NAMED_BY_DVC

PAGES = sorted((ROOT / "docs").glob("adding-a*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def install(page: Path, folder: Path) -> tuple[str, str]:
    """Writes the page's plug-in where its first line says; returns (kind, name)."""
    (code,) = blocks(page, "python")
    kind, name = re.match(r"# (\w+)/(\w+)\.py\n", code).groups()
    (folder / kind).mkdir(parents=True, exist_ok=True)
    (folder / kind / f"{name}.py").write_text(code.split("\n", 1)[1], encoding="utf-8")
    return kind, name


@pytest.fixture
def outside(tmp_path, monkeypatch):
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path / "plugins"))
    return tmp_path / "plugins"


def merged(values, changes):
    """`changes` of a page over complete parameters: an entry is laid over the default entry."""
    for section, entries in changes.items():
        for name, entry in entries.items():
            first = next(iter(values[section].values()))
            values[section][name] = {**values[section].get(name, first), **entry}
            if section == "hosts" and "host" not in entry and name in plugins.names("hosts"):
                values[section][name]["host"] = name
    return values


def test_there_is_a_page_for_every_kind(outside):
    assert sorted(install(page, outside)[0] for page in PAGES) == sorted(plugins.KINDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_is_short_and_its_parameters_are_accepted(page, outside):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    kind, name = install(page, outside)
    assert name in plugins.names(kind)
    assert plugins.summary(kind, name).endswith(".")
    for block in blocks(page, "yaml"):
        written = yaml.safe_load(block)
        settings.check(merged(make_params(), written))
        for section, entries in written.items():
            for entry in entries.values():
                assert set(NAMED_BY_DVC[section]) <= set(entry)


def test_the_host_of_the_page(outside, tmp_path):
    _, name = install(ROOT / "docs" / "adding-a-host.md", outside)
    cache = make_stage2_cache(tmp_path / "c", counts=COUNTS, shape=(20, 2, 2))
    check_head_alone(name, cache)
    check_gradients(name, (9, 1))
    check_logits(name)


@pytest.mark.parametrize(
    ("page", "check"),
    [
        ("adding-an-objective", check_objective),
        ("adding-a-backbone", check_backbone),
        ("adding-a-sampler", check_sampler),
        ("adding-a-pool", check_pool),
    ],
)
def test_the_plug_in_of_the_page(page, check, outside):
    _, name = install(ROOT / "docs" / f"{page}.md", outside)
    check(name)


def test_the_dataset_of_the_page(outside, tmp_path):
    install(ROOT / "docs" / "adding-a-dataset.md", outside)
    imbalance = {"profile": "exponential", "ratio": 4.0, "seed": 0}
    samples, images = make_samples(
        tmp_path / "s", dataset="stripes", imbalance=imbalance, test_per_class=10, validation_per_class=2
    )
    assert samples.counts == [48, 12]
    assert images.batch([0, 1], [None, None]).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("name", plugins.names("samplers"))
def test_samplers_conform(name):
    check_sampler(name)


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_objectives_conform(name):
    check_objective(name)


@pytest.mark.parametrize("name", plugins.names("pools"))
def test_pools_conform(name):
    check_pool(name)

"""The pages on adding things are short, the conformance tests accept their code, and `dvc repro` runs it."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import test_objectives
import test_pools
import test_samplers
import torch
import yaml
from conformance import (
    CHANNELS,
    COUNTS,
    check_backbone,
    check_gradients,
    check_head_alone,
    check_logits,
    check_ratio_0,
    gradient_hosts,
)
from dvc.repo import Repo
from pipeline_builders import ROOT, environment, make_params, make_samples, make_stage2_cache
from printed import blocks
from repositories import dvc

from h2t.pipeline.base import plugins
from h2t.pipeline.inspection import settings
from h2t.pipeline.inspection.setting_up import NAMED_BY_DVC

PAGES = sorted((ROOT / "docs").glob("adding-a*.md"))


def install(page: Path, folder: Path) -> tuple[str, str]:
    """Writes the page's plug-in into `folder`, which stands for `plugins`; returns (kind, name)."""
    (code,) = blocks(page, "python")
    kind, name = re.match(r"# plugins/(\w+)/(\w+)\.py\n", code).groups()
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


# Plug-ins of the pages pass the tests of the built-in ones.


def check_objective(name):
    test_objectives.test_gradients_are_finite_and_the_head_gives_logits(name, COUNTS)


def check_sampler(name):
    test_samplers.test_positions_are_in_range_and_int64(name, (9, 3, 2))
    test_samplers.test_a_step_needs_no_step_before_it(name)
    test_samplers.test_epochs_steps_and_seeds_differ(name)


def check_pool(name):
    maps = torch.rand(2, 5, 6, 3, 4).double()
    test_pools.test_shapes_and_neighbours(name, {}, maps)
    test_pools.test_gradients_are_finite_also_at_zero(name, {}, maps)
    test_pools.test_pooling_commutes_exactly_where_it_says_so(name, {}, maps)


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
    assert name in gradient_hosts()

    def noise(maps, rows):
        maps[0][np.array(rows["statistics"]) == "instance"] += 1.5

    cache = make_stage2_cache(tmp_path / "c", counts=COUNTS, shape=(CHANNELS, 2, 2))
    other_donors = make_stage2_cache(tmp_path / "d", counts=COUNTS, shape=(CHANNELS, 2, 2), change=noise)
    check_head_alone(name, cache)
    check_ratio_0(name, cache, other_donors)
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


@pytest.mark.slow
def test_dvc_repro_runs_the_plug_ins_of_all_pages(tmp_path, monkeypatch, warm_h2t):
    """A project has six files in `plugins/`: a run uses each of them, and an edit makes its stages stale."""
    for name in ("dvc.yaml", "stages.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "inputs").mkdir()
    for page in PAGES:
        install(page, tmp_path / "plugins")
    optimiser = {"epochs": 1, "batch_size": 8}
    grid = {"ratio": [0.0, 0.3], "donor": ["instance", "cube_root"], "seed": [0]}
    values = {
        "device": "cpu",
        "prepare": {"dataset": "stripes", "options": {"images": 30}, "test_per_class": 10},
        "backbones": {"mine": {"arch": "plain", "objective": "label_smoothing", "epochs": 1, "batch_size": 8}},
        "backbone_defaults": {},
        "extract": {"batchnorm": ["stage1"]},
        "pool": {"pool": "log_sum_exp"},
        "host_defaults": {"batchnorm": "stage1", "pool": "log_sum_exp", "optimiser": optimiser, "grid": grid},
        "hosts": {"hinge": {"host": "hinge", "backbone": "mine"}},
        "evaluate": {},
        "report": {},
        "seed": 0,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    for key, value in environment(PATH=f"{warm_h2t.parent}:{os.environ['PATH']}").items():
        monkeypatch.setenv(key, value)
    dvc("init", "--no-scm", where=tmp_path)
    subprocess.run([warm_h2t, "upgrade", "--apply"], cwd=tmp_path, check=True, capture_output=True)
    dvc("repro", where=tmp_path)
    assert "hinge" in (tmp_path / "data/report/results.md").read_text()
    heads = pq.read_table(tmp_path / "data/evaluate/hinge/heads.parquet").to_pydict()
    assert set(heads["donor"]) >= {"instance", "cube_root"}
    with (tmp_path / "plugins/hosts/hinge.py").open("a") as file:
        file.write("# edited\n")
    with contextlib.chdir(tmp_path), Repo() as repo:
        assert set(repo.status()) == {"train_classifier@hinge", "evaluate@hinge"}

"""examples/cifar10_lt: its cache is sound, its stages are those of its dvc.yaml, its figures come out again, and its
classifiers can be exported."""

import csv
import hashlib
import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from dvc.cli import parse_args
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from PIL import Image
from pipeline_builders import ROOT, accepted

from h2t.pipeline.inspection.settings import check

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "cifar10_lt"
WITHIN = {"top1": 0.3, "head": 1.0, "medium": 1.0, "tail": 1.0}  # as its README says


def stated():
    """Method -> figure -> percent, from the table of the README."""
    lines = re.findall(
        r"^\| ([a-z]\w* .*?) \| (\d.*?) \| [\d.]+ \|$", (EXAMPLE / "README.md").read_text(), re.MULTILINE
    )
    return {name: dict(zip(WITHIN, map(float, values.split(" | ")), strict=True)) for name, values in lines}


def test_its_cache_is_small_and_sound():
    assert sum(p.stat().st_size for p in (EXAMPLE / "data/extract").rglob("*") if p.is_file()) < 20e6
    accepted("cache", "verify", EXAMPLE / "data/extract/ce_mixup")


def test_dvc_reads_its_stages(tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(EXAMPLE / name, tmp_path / name)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        found = {stage.name for stage in repo.index.stages}
    hosts = yaml.safe_load((EXAMPLE / "params.yaml").read_text())["hosts"]
    assert found == {"report", *(f"{stage}@{host}" for stage in ("train_classifier", "evaluate") for host in hosts)}


def test_its_readme_queues_an_experiment_for_each_ratio(tmp_path):
    """What DVC makes of the command; the queue itself was run by hand (docs/log.md)."""
    commands = re.findall(r"^dvc ((?:exp|queue) .*)$", (EXAMPLE / "README.md").read_text(), re.MULTILINE)
    queued, started = (parse_args(shlex.split(command)) for command in commands)
    assert (queued.queue, started.jobs) == (True, 2)
    ratios = []
    for override in get_hydra_sweeps({"params.yaml": queued.set_param}):
        shutil.copy(EXAMPLE / "params.yaml", tmp_path)
        apply_overrides(tmp_path / "params.yaml", override["params.yaml"])
        values = yaml.safe_load((tmp_path / "params.yaml").read_text())
        check(values)
        ratios.append(values["hosts"]["dr"]["grid"]["ratio"])
        assert values["hosts"]["dr"]["grid"]["seed"] == values["host_defaults"]["grid"]["seed"]
    assert ratios == [[0.0, 0.1], [0.0, 0.2]]


def test_git_ignores_nothing_that_dvc_writes_there():
    """DVC does not run where git ignores `dvc.lock`."""
    found = subprocess.run(["git", "check-ignore", str(EXAMPLE / "dvc.lock")], cwd=ROOT, check=False)
    assert found.returncode == 1


def test_its_figures_come_out_again_and_its_classifiers_can_be_exported(tmp_path, monkeypatch):
    root = tmp_path / "example"
    shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("train_classifier", "evaluate", "report"))
    monkeypatch.chdir(root)
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    assert set(stages) == {"train_classifier", "evaluate", "report"}
    hosts = yaml.safe_load((root / "params.yaml").read_text())["hosts"]
    expected = stated()
    assert len(expected) == 1 + 2 * len(hosts)
    for host in hosts:
        for stage in ("train_classifier", "evaluate"):
            program, *arguments = stages[stage]["do"]["cmd"].replace("${key}", host).split()
            assert program == "h2t"
            accepted(*arguments)
        found = json.loads((root / f"data/evaluate/{host}/metrics.json").read_text())
        lines = {"stage I": "stage1", f"{host} without H2T": "without_h2t", f"{host} with H2T": "with_h2t"}
        for line, key in lines.items():
            for figure, percent in expected[line].items():
                assert found[key][figure] == pytest.approx(percent, abs=WITHIN[figure]), (line, figure)
        assert found["difference"]["top1"]["verdict"] == found["difference"]["tail"]["verdict"] == "higher"
    accepted(*stages["report"]["cmd"].split()[1:])
    assert (root / "data/report/index.html").is_file()
    Image.new("RGB", (48, 40), "red").save("photo.png")
    answer, readme = (root / "data/report/results.md").read_text(), (root / "README.md").read_text()
    (printed,) = re.findall("To use it: h2t (.*)", answer)
    accepted(*shlex.split(printed.replace(" model ", " answer ")))
    exporting, predicting = (
        shlex.split(line) for line in re.findall("^h2t ((?:export|predict) .*)", readme, re.MULTILINE)
    )
    accepted(*exporting)
    for model in ("answer", "model"):
        predicting[1] = model
        (line,) = csv.DictReader(accepted(*predicting).splitlines())
        assert (
            line["class"]
            in json.loads((root / "data/extract/ce_mixup/cache.json").read_text())["provenance"]["classes"]
        )


def test_the_backbones_of_table_6_are_those_of_their_record():
    record = json.loads((ROOT / "benchmarks/results/stage1.json").read_text())["backbones"]
    for name, about in record.items():
        data = (ROOT / f"benchmarks/weights/{name}.safetensors").read_bytes()
        assert hashlib.sha256(data).hexdigest() == about["sha256"]
        assert len(about["curve"]["loss"]) == 200

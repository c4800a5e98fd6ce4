"""`h2t sweep`: more classifiers on the cached features, in one process, beside the pipeline's outputs."""

import json
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from builders import tree
from pipeline_builders import accepted, loaded_by, refused, write_params

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.inspection.sweep import keep_grid


@pytest.fixture(scope="module")
def project(tmp_path_factory, digits_cache, backbone_dir):
    """The outputs of the pipeline, up to an evaluated host."""
    folder = tmp_path_factory.mktemp("sweep")
    data = folder / "data"
    for stage, made in (("extract", digits_cache), ("train_backbone", backbone_dir)):
        (data / stage).mkdir(parents=True)
        (data / stage / "ce_mixup").symlink_to(made)
    write_params(folder / "params.yaml", hosts__ncm={"host": "ncm", "backbone": "ce_mixup"})
    params = ("--params", folder / "params.yaml")
    maps, backbone = data / "extract/ce_mixup", data / "train_backbone/ce_mixup"
    accepted("train-classifier", "dr", maps, backbone, data / "train_classifier/dr", *params)
    accepted("evaluate", "dr", maps, data / "train_classifier/dr", backbone, data / "evaluate/dr", *params)
    return folder


def sweep(project, *options, host="dr"):
    return accepted("sweep", host, "--params", project / "params.yaml", "--data", project / "data", *options)


def outputs(project):
    return {part: tree(project / "data" / part) for part in ("train_classifier", "evaluate")}


def test_figures_are_those_of_the_pipeline(project):
    before = outputs(project)
    lines = json.loads(sweep(project, "--ratio", "0.3,0.5", "--json"))
    assert outputs(project) == before
    assert [line["ratio"] for line in lines] == [0.0, 0.3, 0.5]
    figures = pq.read_table(project / "data/evaluate/dr/heads.parquet").to_pylist()
    metrics = json.loads((project / "data/evaluate/dr/metrics.json").read_text())
    for line in lines[:2]:
        same = [
            f
            for f in figures
            if f["split"] == "test"
            and f["ratio"] == line["ratio"]
            and f["statistics"] == metrics["without_h2t"]["statistics"]
        ]
        assert line["seeds"] == [f["seed"] for f in same] == [0, 1]
        for name in ("top1", "head", "medium", "tail", "ece"):
            assert line[name] == pytest.approx(np.mean([f[name] for f in same]), abs=1e-4)
        assert line["standing"]["mean"] == pytest.approx(0, abs=1e-4)
    assert lines[0]["difference"] is None
    assert lines[2]["standing"] is None  # the pipeline has no ratio 0.5
    difference = lines[2]["difference"]["top1"]
    assert difference["mean"] == pytest.approx(lines[2]["top1"] - lines[0]["top1"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert (difference["covers"], difference["seeds"]) == (["seeds", "images"], 2)
    assert metrics["with_h2t"]["ratio"] == 0.3
    for figure, expected in metrics["difference"].items():
        found = lines[1]["difference"][figure]
        assert [found[key] for key in ("mean", "low", "high")] == pytest.approx(
            [expected[key] for key in ("mean", "low", "high")], abs=1e-3
        )
    assert lines[0]["standing"]["covers"] == ["seeds"]


def test_nothing_is_imported_that_a_sweep_does_not_need(project):
    options = ["--params", project / "params.yaml", "--data", project / "data", "--ratio", "0.3"]
    assert not loaded_by("sweep", "dr", *options, cwd=project) & {"pandas", "sklearn", "dask", "zarr", "dvc"}


def test_an_evaluation_of_another_cache_is_not_compared_with(project, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(project / "data", data, symlinks=True)
    about = data / "evaluate/dr/about.json"
    values = json.loads(about.read_text())
    values["host"]["cache"] = "0" * 64
    about.write_text(json.dumps(values))
    given = ("--params", project / "params.yaml", "--ratio", "0.3")
    same = " ".join(accepted("sweep", "dr", *given, "--data", project / "data").split())
    assert "own classifiers as they were trained (over seeds), by ratio: 0: equal; 0.3: equal." in same
    others = " ".join(accepted("sweep", "dr", *given, "--seed", "7,1,4", "--data", project / "data").split())
    assert "as they were trained (over the 1 of 3 seeds that both have), by ratio: 0: equal; 0.3: equal." in others
    said = accepted("sweep", "dr", *given, "--data", data)
    assert "is an evaluation of another cache" in said
    assert "own classifiers" not in said


def test_the_table_has_a_line_for_each_setting(project, tmp_path):
    text = sweep(project, "--ratio", "0.5", "--lr", "0.01,0.1", "--donor", "balanced", "--out", tmp_path / "kept", "-q")
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["ratio", "lr", "top-1"]
    assert [line.split()[:2] for line in lines[1:5]] == [["0", "0.01"], ["0.5", "0.01"], ["0", "0.1"], ["0.5", "0.1"]]
    assert max(map(len, lines)) <= 80
    kept = json.loads((tmp_path / "kept/sweep.json").read_text())
    assert {line["donor"] for line in kept} == {"balanced"}
    assert (tmp_path / "kept/heads/heads.safetensors").is_file()


def test_a_grid_can_be_kept(project, tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text("# my words\n" + (project / "params.yaml").read_text())
    asked = ("--ratio", "0.4", "--seed", "3", "--save")
    said = accepted("sweep", "dr", "--params", params, "--data", project / "data", *asked)
    assert f"{params}: hosts.dr.grid is now ratio 0.0, 0.4; seed 3; to train these, type: dvc repro" in said
    assert params.read_text().startswith("# my words\n")
    before, after = (yaml.safe_load(path.read_text()) for path in (project / "params.yaml", params))
    assert after["hosts"]["dr"]["grid"] == {**before["hosts"]["dr"]["grid"], "ratio": [0.0, 0.4], "seed": [3]}
    before["hosts"]["dr"]["grid"] = after["hosts"]["dr"]["grid"]
    assert after == before


LAID_OUT = """# my words
hosts:
    dr:
        host: 'dr'   # quoted
        grid: {ratio: [0.0, 0.3], seed: [0]}
        loss: {one: 1.0000000001, two: 2.0000000002, three: 3.0000000003, four: 4.0000000004, five: 5.0000000005}
    list:
      - a

      - b
"""


def test_keeping_a_grid_changes_no_other_line(tmp_path):
    (tmp_path / "params.yaml").write_text(LAID_OUT)
    (tmp_path / "link.yaml").symlink_to("params.yaml")
    keep_grid(tmp_path / "link.yaml", "dr", {"ratio": [0.1]})
    assert (tmp_path / "params.yaml").read_text() == LAID_OUT.replace("[0.0, 0.3]", "[0.0, 0.1]")
    assert (tmp_path / "link.yaml").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_keeping_a_grid_keeps_line_ends_and_replaces_an_empty_one(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_bytes(LAID_OUT.replace("\n", "\r\n").encode())
    keep_grid(path, "dr", {"ratio": [0.1]})
    assert path.read_bytes().decode() == LAID_OUT.replace("[0.0, 0.3]", "[0.0, 0.1]").replace("\n", "\r\n")
    path.write_text("hosts:\n  dr:\n    host: dr\n    grid:\n")
    keep_grid(path, "dr", {"lr": [0.1]})
    assert yaml.safe_load(path.read_text()) == {"hosts": {"dr": {"host": "dr", "grid": {"lr": [0.1]}}}}


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a text that\n  stands in two lines", 1),
        ("'quoted\n  text'", 1),
        ("[1,\n  2]", 1),
        ("{a: 1,  # why\n  b: 2}", 1),
        ("|\n    one\n    two", None),
        (">-\n    one\n    two\n\n    three", None),
    ],
)
def test_keeping_a_grid_joins_no_lines(tmp_path, value, line):
    path = tmp_path / "params.yaml"
    path.write_text(before := f"other: {value}\n{LAID_OUT}")
    if line is None:
        keep_grid(path, "dr", {"ratio": [0.1]})
        assert path.read_text() == before.replace("[0.0, 0.3]", "[0.0, 0.1]")
        return
    with pytest.raises(
        UserError, match=rf"params\.yaml: line {line}: --save keeps a value only if it stands in one line"
    ):
        keep_grid(path, "dr", {"ratio": [0.1]})
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["[0.0,0.3]", "[ 0.1, 0.2, ]", "{a: 1,b: 2}", "null", "~", '"\\u00e9"', "&a [0.1]"])
def test_a_grid_is_kept_beside_values_that_are_spelt_otherwise(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(f"---\nother : {text}\n{LAID_OUT}")
    before = yaml.safe_load(path.read_text())
    keep_grid(path, "dr", {"ratio": [0.1]})
    before["hosts"]["dr"]["grid"]["ratio"] = [0.0, 0.1]
    assert yaml.safe_load(path.read_text()) == before


def test_a_full_disk_leaves_the_parameters_as_they_are(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(LAID_OUT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # bytes of a file
    try:
        with pytest.raises(UserError, match=r"params\.yaml: cannot be written \(File too large\)"):
            keep_grid(path, "dr", {"ratio": [0.1]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == LAID_OUT
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_sweep_would_not_keep_is_said_before_it_trains(project, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    (tmp_path / "more").mkdir()
    for name in ("sweep.json", "notes.txt"):
        (tmp_path / "more" / name).write_text("[]")
    named_here = ("--save", "--ratio", "0.1", "--set", "hosts.new={host: dr, backbone: ce_mixup}")
    for options, says in (
        (("--out", tmp_path / "full"), "hold a sweep and nothing else; got notes.txt"),
        (("--out", tmp_path / "more"), "hold a sweep and nothing else; got notes.txt"),
        (("--save",), "--save needs a list"),
    ):
        line = refused("sweep", "dr", "--params", project / "params.yaml", "--data", project / "data", *options)
        assert says in line
        assert "features in memory" not in line
    line = refused("sweep", "new", "--params", project / "params.yaml", "--data", project / "data", *named_here)
    assert "--save needs an entry hosts.new" in line


@pytest.mark.parametrize(
    ("host", "options", "words"),
    [
        ("ncm", (), "closed-form fit"),
        ("dr", ("--ratio", "1.5"), "ratio"),
        ("dr", ("--ratio", "0.3,a"), "ratio"),
        ("dr", ("--ratio", "0.3,010"), "--ratio ratio=010: the value must be YAML"),
        ("dr", ("--lr", "-1"), "lr"),
        ("dr", ("--donor", "nobody"), "donor"),
        ("other", (), "hosts"),
    ],
)
def test_what_cannot_be_swept_is_one_line(project, host, options, words):
    before = outputs(project)
    given = ("--params", project / "params.yaml", "--data", project / "data")
    line = refused("sweep", host, *given, *options)
    assert line.count("\n") == 1
    assert words in line
    assert outputs(project) == before


def test_the_profile_names_where_time_goes(project, tmp_path):
    """Parts follow each other from the start of the process and leave nothing out, by both clocks."""
    command = [
        sys.executable,
        "-m",
        "h2t.pipeline",
        "sweep",
        "dr",
        "--ratio",
        "0.3",
        "--seed",
        "0",
        "--profile",
        "--json",
    ]
    command += ["--params", project / "params.yaml", "--data", project / "data", "--record", tmp_path / "r.json"]
    began = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    took = time.perf_counter() - began
    json.loads(ran.stdout)
    said = ran.stderr.splitlines()[-1]
    assert all(part in said for part in ("start", "reading", "training", "evaluation", "drawing", "in all"))
    record = json.loads((tmp_path / "r.json").read_text())
    parts = record["parts"]
    assert set(parts) == {"start", "reading", "training", "evaluation", "drawing"}
    assert all(min(time.values()) >= 0 for time in parts.values())
    whole = sum(time["seconds"] for time in parts.values())
    assert record["seconds"] <= whole <= took
    assert sum(time["cpu"] for time in parts.values()) >= record["cpu"]

"""What a command does not need is not imported, because importing torch takes longer than most commands."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from builders import make_cache
from pipeline_builders import environment, loaded_by, make_params, write_params
from report_builders import make_evaluated

from h2t.pipeline.evaluation.evidence import embed, embed_once

HEAVY = {"torch", "torchvision", "sklearn", "matplotlib", "dask", "dvc", "zarr"}


COMMANDS = (
    "--help",
    "--version",
    "cache --help",
    "train-classifier --help",
    "list",
    "presets tiny",
    "watch photos p.json",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_looking_around_imports_no_numbers(tmp_path, command):
    (tmp_path / "photos").mkdir()
    write_params(tmp_path / "params.yaml", inputs={"photos": "photos"})
    assert not loaded_by(*command.split(), cwd=tmp_path) & (HEAVY | {"numpy", "pandas", "pyarrow", "PIL"})


def test_cache_info_imports_no_torch_and_nothing_for_servers(tmp_path):
    make_cache(tmp_path / "c")
    assert not loaded_by("cache", "info", "c", cwd=tmp_path) & (HEAVY | {"pandas", "fsspec", "aiohttp", "tenacity"})


def test_inputs_imports_no_torch(tmp_path):
    write_params(tmp_path / "params.yaml")
    (tmp_path / "digests").mkdir()
    assert not loaded_by("inputs", "digests", "out", cwd=tmp_path) & (HEAVY | {"pandas"})
    assert (tmp_path / "out/backbones/ce_mixup.json").is_file()


def test_report_imports_no_torch(tmp_path):
    made = make_evaluated(tmp_path)
    values = make_params()
    values["host_defaults"] = {"optimiser": {"epochs": 2}}  # which a host with a closed-form fit does not take
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    heavy = (
        HEAVY - {"matplotlib"} if pd.__version__ < "3" else HEAVY
    )  # which imports it for tables, where it is installed
    assert not loaded_by("report", made, "out", cwd=tmp_path) & heavy
    assert (tmp_path / "out/index.html").is_file()


def test_evaluate_imports_no_torchvision_and_no_scikit_learn_once_points_are_known(tmp_path):
    made = make_evaluated(tmp_path)
    values = make_params()
    for arch in ("resnet50", "resnext50", "resnet152", "torchvision"):
        options = {"model": "efficientnet_b0"} if arch == "torchvision" else {}
        values["backbones"][arch] = {**values["backbones"]["ce_mixup"], "arch": arch, "options": options}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    folders = ("extract/b0", "train_classifier/dr", "train_backbone/b0", "out")
    assert not loaded_by("evaluate", "dr", *folders, cwd=tmp_path) & {"sklearn", "torchvision"}
    assert (tmp_path / "out/heads.parquet").read_bytes() == (made / "dr/heads.parquet").read_bytes()


def points_file():
    (path,) = Path(os.environ["XDG_CACHE_HOME"], "h2t/embeddings").iterdir()
    return path


def test_features_that_are_all_equal_have_points_too():
    """scikit-learn's t-SNE ends the process there, by a signal."""
    assert np.array_equal(embed(np.ones((30, 4), np.float32)), np.zeros((30, 2)))


def test_points_are_computed_once_for_the_same_features():
    features = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    points = embed_once(features)
    assert np.array_equal(points, embed(features))
    script = (
        "import sys; import numpy as np; from h2t.pipeline.evaluation.evidence import embed_once\n"
        "points = embed_once(np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32))\n"
        "assert 'sklearn' not in sys.modules; print(points.tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == points.tobytes().hex()
    assert np.array_equal(embed_once(features[::-1]), embed(features[::-1]))


def test_a_damaged_or_unwritable_file_of_points_changes_nothing(monkeypatch, tmp_path):
    features = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    points = embed_once(features)
    whole = points_file().read_bytes()
    for damaged in (whole[:-1], b"", whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        points_file().write_bytes(damaged)
        assert np.array_equal(embed_once(features), points)
        assert points_file().read_bytes() == whole
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert np.array_equal(embed_once(features), points)

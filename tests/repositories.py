"""Small repositories of real git and real DVC, whose stages copy what a test has made."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest.mock import patch

from builders import make_cache
from dvc.cli import main as dvc_main
from pipeline_builders import ROOT, make_backbone_dir, write_params

#: The dvc.yaml of a repository that publishes a cache and its backbone, from `made/cache` and `made/backbone`.
_PUBLISHED = """
stages:
  train_backbone:
    cmd: cp -r made/backbone data/train_backbone/b
    outs: [data/train_backbone/b]
  extract:
    cmd: cp -r made/cache data/extract/b
    outs: [data/extract/b]
"""


def git(*arguments, where):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=where, check=True, capture_output=True)


def dvc(*arguments, where):
    """In this process, which saves the imports; not with its arguments, which DVC would read too."""
    with contextlib.chdir(where), patch.object(sys, "argv", ["dvc"]):
        assert dvc_main([*arguments, "--quiet"]) == 0


def start_repository(home: Path, stages: str, outputs: Iterable[str]) -> Path:
    """`home`/a with our DVC configuration, the dvc.yaml `stages`, places for `outputs` and the remote `home`/store."""
    root = home / "a"
    (root / ".dvc").mkdir(parents=True)
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    (root / "dvc.yaml").write_text(stages)
    (root / ".gitignore").write_text("/data/*/*\n/made/\n")
    write_params(root / "params.yaml")
    for kind in outputs:
        (root / "data" / kind).mkdir(parents=True)
    git("init", "--quiet", "--initial-branch=main", where=root)
    dvc("remote", "add", "--default", "store", str(home / "store"), where=root)
    return root


def cache_repository(home: Path, **cache) -> Path:
    """A repository whose stages have made a cache `b`, of settings `cache`, and its backbone, uncommitted."""
    root = start_repository(home, _PUBLISHED, ["train_backbone", "extract"])
    make_cache(root / "made/cache", **cache)
    make_backbone_dir(root / "made/backbone")
    dvc("repro", where=root)
    return root

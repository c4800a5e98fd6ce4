"""Small repositories of real git and real DVC, whose stages copy what a test has made."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from builders import make_cache
from dvc.cli import main as dvc_main
from dvc.repo import Repo
from pipeline_builders import ROOT, environment, make_backbone_dir, write_params

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


CODE = ("h2t", "cache", "pipeline", "plugins", "inputs", "dvc.yaml", "stages.yaml", ".dvcignore", ".dvc/config")
COUNTING_H2T = """#!/bin/sh
case "$1" in watch|train-backbone|extract) echo "$1@$2";; *) echo "$1";; esac >> {calls}
exec {h2t} "$@"
"""


class Project:
    """A repository with our code and dvc.yaml, and an `h2t` that notes down what it is called for."""

    def __init__(self, root: Path, h2t: Path, **own: str) -> None:
        self.root, self.calls = root, root.with_name(f"{root.name}.calls")
        programs = root.with_name(f"{root.name}.bin")
        programs.mkdir(exist_ok=True)
        (programs / "h2t").write_text(COUNTING_H2T.format(calls=self.calls, h2t=h2t))
        (programs / "h2t").chmod(0o755)
        self.env = environment(
            PATH=f"{programs}:{h2t.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH=str(root),
            DVC_SITE_CACHE_DIR=str(root.with_name(f"{root.name}.site")),
            H2T_BLOCK_CACHE=str(root.with_name(f"{root.name}.blocks")),
            **own,
        )

    def ran(self, *arguments: str) -> list[str]:
        """What `dvc repro`, in this process, calls `h2t` for."""
        self.called()
        with patch.dict(os.environ, self.env):
            dvc("repro", *arguments, where=self.root)
        return self.called()

    def run(self, *arguments: object) -> str:
        """What a program, in a process of its own, says on stdout."""
        done = subprocess.run(
            [str(a) for a in arguments], cwd=self.root, env=self.env, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def called(self) -> list[str]:
        """What `h2t` was called for since last asked."""
        found = self.calls.read_text().split() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return found

    def status(self) -> dict[str, Any]:
        with contextlib.chdir(self.root), Repo() as repo:
            return repo.status()


def start_project(root: Path, values: dict[str, Any], h2t: Path, *ignored: str) -> Project:
    """A project with the parameters `values`; git ignores `data` and the folders `ignored`."""
    for name in CODE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            patterns = shutil.ignore_patterns("__pycache__", "*.json" if name == "inputs" else "*.so")
            shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=patterns)
        else:
            shutil.copy(ROOT / name, root / name)
    shutil.copy(ROOT / ".dvc/.gitignore", root / ".dvc/.gitignore")
    (root / ".gitignore").write_text("".join(f"/{folder}/\n" for folder in ("data", *ignored)))
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    git("init", "--quiet", "--initial-branch=main", where=root)
    return Project(root, h2t)

"""The tests with the oldest packages that pyproject.toml allows, in a fresh clone of HEAD and its own environment.

    make -C tests oldest PYTHON=python3.11          or: python tests/oldest.py [--at FOLDER] [TESTS ...]

Takes 10 GB and half an hour. Packages for development are of today. FOLDER is kept; without --at it is a temporary one.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from printed import ROOT

NEWER = "onnx"  # an extra that asks for a newer torch than the others


def oldest(project: dict) -> list[str]:
    """`name==version` of each requirement, base and extras, at the lowest version that it allows."""
    named = [line for extra, lines in project["optional-dependencies"].items() if extra != NEWER for line in lines]
    found = (re.match(r"([\w.-]+)(?:\[.*\])?>=([\w.]+)", line) for line in (*project["dependencies"], *named))
    return [f"{one[1]}=={one[2]}" for one in found if one]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="makes the environment")
    parser.add_argument("--at", type=Path, help="a folder that is kept")
    parser.add_argument("tests", nargs="*", help="files of tests; by default all")
    given = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ",".join(extra for extra in project["optional-dependencies"] if extra != NEWER)
    with tempfile.TemporaryDirectory(prefix="oldest-") as temporary:
        folder = (given.at or Path(temporary)).resolve()
        clone, limits, programs = folder / "clone", folder / "oldest.txt", folder / "venv/bin"
        if not clone.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            subprocess.run([given.python, "-m", "venv", str(folder / "venv")], check=True)
        limits.write_text("\n".join(oldest(project)) + "\n", encoding="utf-8")
        pip = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip>=25.1"], check=True)
        wanted = ["--constraint", str(limits), "--editable", f".[{extras}]", "--group", "dev"]
        subprocess.run([*pip, *wanted], cwd=clone, check=True)
        env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        pytest = [str(programs / "python"), "-m", "pytest", "--numprocesses", "auto", "--dist", "loadfile"]
        sys.exit(subprocess.run([*pytest, "--no-loadscope-reorder", *given.tests], cwd=clone, env=env).returncode)


if __name__ == "__main__":
    main()

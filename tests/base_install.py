"""Installs a wheel of this folder without the extra `pipeline`, and reads, verifies and pulls with it: size and times.

    python tests/base_install.py [FOLDER]

Needs the package index. FOLDER keeps the environment; without it a temporary one is used. The environment that runs
this makes and publishes the cache.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from builders import make_cache
from pipeline_builders import make_backbone_dir
from repositories import PUBLISHED, dvc, git, start_repository

ROOT = Path(__file__).parent.parent
IMPORTS = """
import json, sys, time
started = time.process_time()
import numpy, pyarrow, numcodecs
ours = time.process_time()
from h2t.cache.reader import open_cache
done = time.process_time()
with open_cache(sys.argv[1]) as cache:
    cache.read(range(cache.spec.rows))
read = time.process_time() - done
print(json.dumps({"numpy_pyarrow_numcodecs": ours - started, "reader": done - ours, "open_and_read": read}))
"""


def published(home: Path) -> tuple[Path, str]:
    """A repository with a published cache `b` and its backbone, and the URL of a bare clone of it."""
    from h2t.pipeline.sharing.publish import publish

    root = start_repository(home, PUBLISHED, ["train_backbone", "extract"])
    make_cache(root / "made/cache")
    make_backbone_dir(root / "made/backbone")
    dvc("repro", where=root)
    git("add", ".", where=root)
    git("commit", "--quiet", "--message=one", where=root)
    with contextlib.chdir(root):
        publish(Path(), lambda line: None)
    git("commit", "--quiet", "--all", "--message=verify", where=root)
    git("clone", "--quiet", "--bare", str(root), str(home / "lab.git"), where=home)
    return root, f"file://{home / 'lab.git'}"


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
    return done.stdout


def megabytes(folder: Path) -> float:
    """What the files below `folder` take on the disk, in 10^6 bytes."""
    return round(sum(path.lstat().st_blocks * 512 for path in folder.rglob("*")) / 1e6, 1)


def main(folder: Path) -> None:
    """Prints the figures as JSON."""
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", environment, cwd=folder)
    run(environment / "bin/pip", "install", "--upgrade", "pip", cwd=folder)
    (packages,) = environment.glob("lib/python3*/site-packages")
    pip = megabytes(packages)
    run(environment / "bin/pip", "install", ROOT, cwd=folder)
    facts = {"megabytes": round(megabytes(packages) - pip, 1)}
    facts["megabytes_of_bytecode"] = round(sum(megabytes(path) for path in packages.rglob("__pycache__")), 1)
    assert not (packages / "torch").exists()
    with tempfile.TemporaryDirectory() as made:
        _, url = published(Path(made))
        h2t, here = environment / "bin/h2t", Path(made)
        print(run(h2t, "cache", "pull", url, "--into", "pulled", cwd=here))
        print(run(h2t, "cache", "verify", "pulled/extract/b", cwd=here))
        print(run(h2t, "cache", "info", "pulled/extract/b", cwd=here))
        script = [environment / "bin/python", "-c", IMPORTS, "pulled/extract/b"]
        times = [json.loads(run(*script, cwd=here)) for _ in range(5)]
    facts["cpu_seconds"] = {key: round(min(time[key] for time in times), 3) for key in times[0]}
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        given = Path(*sys.argv[1:] or [temporary])
        given.mkdir(parents=True, exist_ok=True)
        main(given.resolve())

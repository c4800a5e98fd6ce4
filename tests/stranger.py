"""A stranger's hour: a fresh clone of HEAD, `make repro`, then the commands that README and docs print, in their order.

    make stranger PYTHON=python3.13        or: python tests/stranger.py [--at FOLDER] [--only WORD]

What is not committed is not cloned. FOLDER is kept, and gone on with, so that a mended command can be tried again;
without --at it is a temporary one. The output of every command goes to FOLDER/log, its line of the checklist to the
terminal.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from printed import ROOT, blocks, printed

#: Pages that are followed from the first line to the last, in this order.
FOLLOWED = (
    "README.md",
    "presets/README.md",
    *(f"docs/adding-{what}.md" for what in ("a-dataset", "a-host", "a-pool", "an-objective")),
    "CONTRIBUTING.md",
    "docs/log.md",
    "docs/sharing.md",
)

#: Commands on them that are not typed here, and why; tests/test_docs_commands.py says who runs them.
LEFT = {
    "make test": "what CI runs",
    "make stranger": "this",
    "make test-remotes": "installs an ssh server",
    "make coverage": "the tests once more",
    "make mutants": "a quarter of an hour",
    "make fuzz": "a campaign",
    "make faults": "a campaign",
    "python tests/faults/campaign.py --seed 20261126": "part of make faults",
    "h2t cache info": "its name alone",
    "h2t predict": "its name alone",
    "h2t cache verify --recompute N": "no N",
    "python -m benchmarks.bench_remote": "a benchmark",
    "dvc repro --force": "everything once more",
    "dvc exp run": "its name alone",
    "dvc remote add": "its name alone",
    "dvc config": "its name alone",
    "dvc push --run-cache": "what h2t cache publish does",
    "dvc repro --pull": "in a colleague's clone",
    "h2t cache verify URL": "no URL",
    "h2t cache pull $REPOSITORY@REV --into kept": "no repository",
    "h2t extract --anew": "its name alone",
    "torchrun --nproc-per-node 4 -m h2t.pipeline train-backbone ce_mixup data/prepare "
    "data/train_backbone/ce_mixup": "GPUs",
}
IDENTITY = {"GIT_AUTHOR_NAME": "A", "GIT_COMMITTER_NAME": "A"} | dict.fromkeys(
    ("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "a@example.org"
)


def steps() -> list[tuple[str, str]]:
    """(page, command) of all that is followed; each command once; the block of results.md whole.

    The blocks of sharing.md are a test's.
    """
    found: dict[str, str] = {}
    for page in FOLLOWED:
        for command in printed(page):
            if command.text not in LEFT and not (page == "docs/sharing.md" and command.fenced):
                found.setdefault(command.text, page)
            if command.text == "make analysis-ratio":
                for path in sorted((ROOT / "presets" / "analyses").glob("*.yaml")):
                    for first in re.findall(r"^#   (h2t .*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
                        found.setdefault(first, str(path.relative_to(ROOT)))
                    found.setdefault(f"make analysis-{path.stem}", page)
    (block,) = blocks("docs/results.md")
    return [*((page, text) for text, page in found.items()), ("docs/results.md", block)]


def prepare(page: str, plugins: Path) -> None:
    """What a page shows beside its commands: the plug-in, written where its first line says."""
    for code in blocks(page, "python") if "adding" in page else []:
        name = re.match(r"# (\w+/\w+\.py)\n", code)[1]
        (plugins / name).parent.mkdir(parents=True, exist_ok=True)
        (plugins / name).write_text(code.split("\n", 1)[1], encoding="utf-8")


def stands_for(command: str, folder: Path, python: str) -> str:
    """The command with what its capital letters and paths of another machine stand for."""
    if command.startswith("h2t prepare OUT"):  # the page's line of parameters, and few enough images to hold out
        command += " --set prepare.dataset=stripes --set 'prepare.options={images: 40}' --set prepare.imbalance.ratio=4"
        command += " --set prepare.test_per_class=10 --set prepare.validation_per_class=2"
    if command == "make format":  # it has nothing to mend
        command += " && git diff --exit-code --stat -- '*.py' dvc.yaml"
    if command.startswith("make repro"):
        command = f"make repro PYTHON={python}"
    if "> cifar.yaml" in command:  # a hundred images in place of CIFAR's
        first, _, rest = command.partition("\n")
        command = f"{first}\npython tests/small_cifar.py\n{rest}"
    for name, meant in {
        "OTHER/data": f"{folder}/other",
        "/shared/dvc-cache": f"{folder}/shared",
        "NAME > params.yaml": f"cifar10-100 > {folder}/cifar.yaml",
        "prepare OUT": f"prepare {folder}/stripes",
        "diff HEAD NAME": 'diff HEAD "$(dvc exp list --name-only | tail -n 1)"',
    }.items():
        command = command.replace(name, meant)
    return command


def run(command: str, clone: Path, log: Path, **more: str) -> tuple[bool, float]:
    """Runs it as typed at a prompt in the clone, the environment activated if there is one."""
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not p.startswith(str(ROOT))]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV"))}
    env |= {"PATH": os.pathsep.join(path), **IDENTITY, **more}
    script = f"[ -f .venv/bin/activate ] && source .venv/bin/activate\nset -e\n{command}\n"
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as out:
        print(f"\n$ {command}", file=out, flush=True)
        done = subprocess.run(
            ["bash", "-c", script], cwd=clone, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    return done.returncode == 0, time.monotonic() - started


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def follow(folder: Path, python: str, only: str) -> int:
    """Walks through the steps; returns how many failed."""
    clone, log, failed = folder / "clone", folder / "log", 0
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "-B", "main"], cwd=clone, check=True)
    for page, command in steps():
        if only not in command:
            continue
        prepare(page, folder / "plugins")
        typed = stands_for(command, folder, python)
        own = {"H2T_PLUGINS": str(folder / "plugins")} if "adding" in page else {}
        passed, seconds = run(typed, clone, log, **own)
        say(f"{'ok  ' if passed else 'FAIL'} {seconds:7.1f} s  {page:26} {command.splitlines()[0]}")
        failed += not passed
        if command.startswith("make repro"):
            if not passed:
                say("\n".join(log.read_text(encoding="utf-8").splitlines()[-20:]))
                return failed
            shutil.copytree(clone / "data/evaluate", folder / "other/evaluate", dirs_exist_ok=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="makes the environment")
    parser.add_argument("--at", type=Path, help="a folder that is kept")
    parser.add_argument("--only", default="", help="commands with this in them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stranger-") as temporary:
        folder = (given.at or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        failed = follow(folder, given.python, given.only)
        if failed and given.at is None:
            shutil.copy(folder / "log", "stranger.log")
    sys.exit(f"{failed} failed; see {given.at / 'log' if given.at else 'stranger.log'}" if failed else 0)


if __name__ == "__main__":
    main()

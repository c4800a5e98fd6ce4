"""`dvc repro` of presets/tiny.yaml ended at random instants, or started twice; after each, it must end in its bytes.

    python tests/faults/repro.py --runs 6 --seed 1

DVC and the stage that it runs are ended together, as a terminal or a scheduler does it. Exit 1 if a byte differs.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stages import PRESET, ROOT, litter, tree

CODE = ("h2t", "cache", "pipeline", "plugins", "inputs", "dvc.yaml", "stages.yaml", ".dvcignore")
HOW = ("SIGKILL", "Ctrl-C", "twice")
ATTEMPTS = 10


class Repository:
    """A repository with our code, dvc.yaml and DVC configuration, and the tiny parameters."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / ".dvc").mkdir(parents=True)
        for name in CODE:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root / name)
        shutil.copy(ROOT / ".dvc" / "config", root / ".dvc" / "config")
        shutil.copy(PRESET, root / "params.yaml")
        command = root / "bin" / "h2t"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m h2t.pipeline "$@"\n')
        command.chmod(0o755)
        subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)

    def start(self) -> subprocess.Popen[str]:
        """`dvc repro`, the leader of a group of processes."""
        path = os.pathsep.join([str(self.root / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro"],
            cwd=self.root,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(self.root), "DVC_NO_ANALYTICS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def forget(self) -> None:
        """As it was before the first run."""
        for name in ("data", ".dvc/cache", ".dvc/tmp"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "dvc.lock").unlink(missing_ok=True)

    def outputs(self) -> dict[str, bytes]:
        return {name: data for name, data in tree(self.root / "data").items() if not name.endswith(".gitignore")}

    def left(self) -> list[str]:
        return [name for name in litter(self.root / "data") if name != ".gitignore"]


def struck(
    repository: Repository, how: str, after: float, expected: dict[str, bytes]
) -> tuple[list[int], list[str]] | None:
    """(exit codes under the fault, what is wrong); None if it ended before."""
    repository.forget()
    first = repository.start()
    time.sleep(after)
    if first.poll() is not None:
        first.communicate()
        return None
    processes = [first]
    if how == "twice":
        processes.append(repository.start())
    else:
        os.killpg(first.pid, signal.SIGKILL if how == "SIGKILL" else signal.SIGINT)
    said = [process.communicate()[0] for process in processes]
    ends = [process.returncode for process in processes]
    wrong = ["a traceback" for text in said if "Traceback" in text]
    if 0 in ends and repository.outputs() != expected:
        wrong.append("exit 0, but the outputs are not whole")
    if how != "twice" and 0 in ends:
        wrong.append("exit 0, though it was ended")
    again = repository.start()
    text, _ = again.communicate()
    if again.returncode:
        wrong.append(f"again: exit {again.returncode}: {text[-300:]}")
    if repository.outputs() != expected:
        wrong.append("again: other bytes")
    if left := repository.left():
        wrong.append(f"again: left behind {left}")
    return ends, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    given = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for the processes that this one starts
    print(f"seed {given.seed}", flush=True)  # noqa: T201
    harm = 0
    with tempfile.TemporaryDirectory(prefix="h2t-faults-") as folder:
        repository = Repository(Path(folder) / "repository")
        began = time.perf_counter()
        text, _ = (undisturbed := repository.start()).communicate()
        assert undisturbed.returncode == 0, text
        taken = time.perf_counter() - began
        expected = repository.outputs()
        print(f"undisturbed: {taken:.1f} s, {len(expected)} files", flush=True)  # noqa: T201
        draws = random.Random(given.seed)
        for number in range(given.runs):
            how = HOW[number % len(HOW)]
            for _ in range(ATTEMPTS):
                after = draws.uniform(0, taken)
                if (found := struck(repository, how, after, expected)) is not None:
                    break
            else:
                raise SystemExit(f"dvc repro ended before the fault {ATTEMPTS} times")
            ends, wrong = found
            harm += bool(wrong)
            verdict = f"WRONG: {'; '.join(wrong)}" if wrong else "same bytes"
            print(f"{number} {how} after {after:.1f} s: exit {', '.join(map(str, ends))}: {verdict}", flush=True)  # noqa: T201
    print(f"seed {given.seed}: {given.runs} runs, {harm} wrong")  # noqa: T201
    if harm:
        raise SystemExit("a fault did harm")


if __name__ == "__main__":
    main()

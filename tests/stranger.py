"""Follows README and docs in a fresh clone of HEAD: their shell blocks as they stand, from `make repro` to the results.

    make -C tests stranger PYTHON=python3.13        or: python tests/stranger.py [--at FOLDER]

Uncommitted work is not cloned. Everything that is printed goes to FOLDER/log, one line for each block to the terminal.
FOLDER is kept and used again by the next run; without --at it is a temporary one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from printed import ROOT, TYPED, blocks


def stands_for(block: str, python: str) -> str:
    """The block with this Python, and with a hundred images in place of CIFAR's."""
    block = block.replace("make repro ", f"make repro PYTHON={python} ", 1)
    first, _, rest = block.partition("\n")
    return f"{first}\npython tests/small_cifar.py\n{rest}" if "> cifar.yaml" in first else block


def typed(script: str, clone: Path, log: Path) -> bool:
    """Runs it as at a prompt in the clone, in the clone's environment once there is one. True if all of it passed."""
    path = [p for p in os.environ["PATH"].split(os.pathsep) if not p.startswith(str(ROOT))]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTHON", "VIRTUAL_ENV"))}
    env["PATH"] = os.pathsep.join(path)
    script = f"[ -f .venv/bin/activate ] && source .venv/bin/activate\nset -ex\n{script}"
    with log.open("a", encoding="utf-8") as out:
        done = subprocess.run(
            ["bash", "-c", script], cwd=clone, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3", help="makes the environment")
    parser.add_argument("--at", type=Path, help="a folder that is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stranger-") as temporary:
        folder = (given.at or Path(temporary)).resolve()
        clone, log = folder / "clone", folder / "log"
        if not clone.exists():
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for page in TYPED:
            for block in blocks(page):
                started = time.monotonic()
                passed = typed(stands_for(block, given.python), clone, log)
                sys.stdout.write(f"{time.monotonic() - started:7.1f} s  {page}  {block.splitlines()[0]}\n")
                sys.stdout.flush()
                if not passed:
                    sys.exit("\n".join([*log.read_text(encoding="utf-8").splitlines()[-20:], f"failed: {page}"]))


if __name__ == "__main__":
    main()

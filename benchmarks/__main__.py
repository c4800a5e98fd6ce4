"""Every benchmark, one after the other, each in a process of its own: `python -m benchmarks [--tiny]`, or `make bench`.

Data (up to about 20 GiB) goes to a temporary directory that is removed at the end; results to `benchmarks/results`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("read", "extract", "stack", "scale")


def main() -> None:
    """Runs them; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds instead of an hour; only shows that they work")
    parser.add_argument("--data", type=Path, default=None, help="a directory with room; default: a temporary one")
    arguments = parser.parse_args()
    failed = []
    with tempfile.TemporaryDirectory(dir=arguments.data) as folder:
        for name in NAMES:
            print(f"\n== {name} ==", flush=True)
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--data", f"{folder}/{name}"]
            command += ["--tiny", "--out", f"{folder}/{name}.json"] if arguments.tiny else []
            if subprocess.run(command).returncode:
                failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

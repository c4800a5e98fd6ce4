"""The compiled gather; everything else about the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

if sys.platform == "win32":
    sys.exit("h2t: runs on Linux and macOS; got Windows; use WSL (https://learn.microsoft.com/windows/wsl)")

setup(
    ext_modules=[
        # Where it cannot be built, installing goes on and the reader's own loop serves.
        Extension("h2t.cache.read._gather", ["h2t/cache/read/gather.c"], extra_compile_args=["-O2"], optional=True)
    ]
)

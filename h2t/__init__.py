"""H2T on cached feature maps: `h2t.cache` reads and writes caches, `h2t.pipeline` is everything around them."""

import sys

if sys.platform == "win32":  # said here, before the first import of what only other systems have
    raise ImportError("h2t: runs on Linux and macOS; got Windows; use WSL (https://learn.microsoft.com/windows/wsl)")

"""What every fuzz target is made of; the targets themselves are in `*_target.py` and `*_targets.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Parse = Callable[[bytes], object]


@dataclass(frozen=True)
class Target:
    """One parser.

    `parser` says which, as file: function. `open` gets a folder that may be written to and gives the parser as a
    function of bytes, which raises `oracle.Finding` for a value that it should have refused. `seeds` are valid inputs,
    and `mutate` keeps enough of their structure that deep code is reached.
    """

    name: str
    parser: str
    open: Callable[[Path], Parse]
    seeds: Callable[[], list[bytes]]
    mutate: Callable[[bytes, Random], bytes]
    max_bytes: int = 4096

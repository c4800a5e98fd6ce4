"""What a stage is told besides its parameters: what it works on, where it writes and how it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Drops `line`: what `say` is where nobody reads."""


@dataclass(frozen=True)
class Run:
    """One run of a stage.

    `name`: the entry of the parameters, used in messages. `out`: the output. `seed`: of every random stream.
    `say`: gets one line of progress or result at a time.
    """

    name: str
    out: Path
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    seed: int = 0
    say: Say = silent

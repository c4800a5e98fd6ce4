"""What a stage is told besides its parameters: what it works on, where it writes and how it reports."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Drops `line`: what `say` is where nobody reads."""


@dataclass(frozen=True)
class Run:
    """One run of a stage.

    `name`: the entry of the parameters, used in messages. `out`: the output. `chosen`: the device to compute on, by
    default the CPU. `seed`: of every random stream. `say`: gets one line of progress or result at a time.
    """

    name: str
    out: Path
    chosen: "torch.device | None" = None
    seed: int = 0
    say: Say = silent

    @property
    def device(self) -> "torch.device":
        """The device to compute on. Stages that do not ask for it need no torch."""
        import torch

        return self.chosen or torch.device("cpu")

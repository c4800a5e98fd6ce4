"""What every fault has in common: it strikes a command that is held at an instant, and can be lifted again."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from process import Command
from stages import Stage


@dataclass
class Place:
    """Where a run happens: `folder` holds parameters and data, `room` all else that the fault needs."""

    room: Path
    again: Callable[[], Command]  # the same command once more, in the same folder
    second: Command | None = None

    @property
    def folder(self) -> Path:
        return self.room / "work"

    @property
    def shared(self) -> Path:
        return self.room / "shared"


@dataclass
class Fault:
    """`ends`: the exit codes that the struck command may have, where that is known beforehand.

    `quiet`: what it says is one line. `cleans`: it has the time to clear up after itself. `cold`: needs its own start.
    """

    name: str
    ends: tuple[int, ...] | None = None
    quiet: bool = True
    cleans: bool = True
    cold: bool = False
    every: int = 1  # it takes part in every n-th turn only
    before: str = "change"  # what it strikes before, where it does not go by time
    environment: dict[str, str] = field(default_factory=dict)

    def lacking(self) -> str | None:
        """Why this machine cannot have the fault; None if it can."""
        return None

    def concerns(self, stage: Stage) -> bool:
        """Whether it can strike this stage."""
        return True

    def prepare(self, place: Place) -> None:
        """Before the folder is furnished."""

    def furnished(self, place: Place, reads: tuple[str, ...]) -> None:
        """After the folder was furnished, before the command starts."""

    def strike(self, command: Command, place: Place, draws: random.Random) -> None:
        """The command is held; lets it go on under the fault."""
        command.go_on()

    def lift(self, place: Place) -> None:
        """After the command ended: all is well again."""

    def clear(self, place: Place) -> None:
        """After the run."""

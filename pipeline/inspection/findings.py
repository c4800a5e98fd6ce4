"""What a check of `h2t doctor` reports."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "fault"]


@dataclass(frozen=True)
class Finding:
    """The result of one check, in one line; what to type; and the path of the output it concerns, if any."""

    check: str
    state: State
    detail: str
    remedy: str = ""
    place: str = ""

    def __str__(self) -> str:
        line = f"{self.state:5} {self.check:12} {self.detail}"
        return f"{line}; type: {self.remedy}" if self.remedy else line

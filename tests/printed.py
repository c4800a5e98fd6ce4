"""The commands that README and docs print: every line of a fenced shell block, every `command` in a sentence or table.

What a page says in prose about a command counts too, so that a renamed target or option is noticed there.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "presets/README.md", "benchmarks/README.md"),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = ("h2t", "make", "dvc", "git", "python", "pip", "torchrun", "dask", "cp", "source")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Printed:
    page: str
    text: str
    fenced: bool


def blocks(page: str, language: str = "sh") -> list[str]:
    """The fenced blocks of one language."""
    return [body for name, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if name == language]


def commands(script: str) -> list[str]:
    """The commands of a shell script, one by one; of a loop those inside, without comments and `cd`."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        plain = re.sub(r"(^|\s)#\s.*$", "", line)
        for part in re.split(r"&&|;", plain) if "'" not in plain else [plain]:
            text = " ".join(re.sub(r"^\s*(for .*|do\b|done\b|cd .*)", "", part).split())
            if text:
                found.append(text)
    return found


def printed(page: str) -> list[Printed]:
    """Every command of a page, in its order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found, at = [], 0
    for fence in [*FENCE.finditer(text), None]:
        prose = text[at : fence.start() if fence else len(text)]
        for span in re.findall(r"`([^`]+)`", prose):
            if span.split()[:1] and span.split()[0] in PROGRAMS and len(span.split()) > 1:
                found += [Printed(page, command, False) for command in commands(" ".join(span.split()))]
        if fence and fence[1] in ("sh", "bash"):
            found += [Printed(page, command, True) for command in commands(fence[2])]
        elif fence:  # a remark in parameters or code that names a command
            remarks = re.findall(r"#\s+(\S+ .*)$", fence[2], re.MULTILINE)
            found += [Printed(page, " ".join(r.split()), False) for r in remarks if r.split()[0] in PROGRAMS]
        at = fence.end() if fence else len(text)
    return found


def words(command: str) -> list[str]:
    """The arguments, up to a redirection."""
    return shlex.split(re.split(r"\s>\s", command)[0])

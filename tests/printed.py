"""The commands that README and docs print: fenced shell blocks, and `commands` in sentences and tables."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "presets/README.md", "benchmarks/README.md"),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

#: Pages whose shell blocks tests/stranger.py types in a fresh clone, in this order.
TYPED = ("README.md", "docs/numbers.md", "docs/results.md")
#: Pages whose blocks a test runs: sharing.md as they stand, the benchmarks on smaller data.
TESTED = {
    "docs/own-data.md": "test_init.py",
    "docs/sharing.md": "test_docs_sharing.py",
    "docs/tutorial.md": "test_tutorial.py",
    "docs/frozen-backbones.md": "test_probe.py",
    "docs/table6.md": "test_paper.py",
    "benchmarks/README.md": "test_benchmarks.py",
}


def blocks(page: str | Path, language: str = "sh") -> list[str]:
    """The fenced blocks of one language."""
    return [body for name, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if name == language]


def commands(page: str, program: str) -> list[str]:
    """Every command of `program` on a page, without comments and redirections."""
    text = (ROOT / page).read_text(encoding="utf-8")
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    lines = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    parts = [p for line in [*spans, *lines] for p in re.split(r"&&|;", re.sub(r"(^|\s)#\s.*$", "", line))]
    found = [" ".join(re.split(r"\s>\s", part)[0].split()) for part in parts]
    return [command for command in found if command.startswith(f"{program} ")]

"""The parameter files that come with the project: names, summaries and texts."""

from pathlib import Path

from h2t.pipeline.base.errors import UserError, nearest

FOLDER = Path(__file__).parents[2] / "presets"


def names() -> list[str]:
    """The sorted names of all presets. Raises UserError if the folder is missing."""
    presets = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    if not presets:
        raise UserError(f"{FOLDER}: no presets here, although they come with h2t; install it again")
    return presets


def text(name: str) -> str:
    """The text of a preset. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"no preset {name!r}{nearest(name, names())} (there are: {', '.join(names())})")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """The comment at the top of the file, up to the first colon or full stop."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    comment = " ".join(lines)
    ends = [place for mark in (": ", ". ") if (place := comment.find(mark)) >= 0]
    return comment[: min(ends)] if ends else comment

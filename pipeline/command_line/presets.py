"""The parameter files that come with the project: their names, first words and texts."""

from pathlib import Path

from h2t.pipeline.base.errors import UserError, nearest

FOLDER = Path(__file__).parents[2] / "presets"


def names() -> list[str]:
    """Every preset. Raises UserError if the folder did not come along."""
    found = sorted(p.stem for p in FOLDER.glob("*.yaml"))
    if not found:
        raise UserError(f"{FOLDER}: no presets here; they come with the repository, so work in a clone of it")
    return found


def text(name: str) -> str:
    """The whole file. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"no preset {name!r}{nearest(name, names())} (there are: {', '.join(names())})")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def summary(name: str) -> str:
    """What the file says of itself, up to the first colon or full stop."""
    lines = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    said = " ".join(lines)
    ends = [place for mark in (": ", ". ") if (place := said.find(mark)) >= 0]
    return said[: min(ends)] if ends else said

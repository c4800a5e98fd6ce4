"""Small helpers for text that people read."""

from collections.abc import Iterable, Sequence


def counted(number: int, what: str, plural: str = "") -> str:
    """`number` and `what` in the singular or the plural: 1 row, 2 rows, 1,234 rows; `plural` where -s is wrong."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {plural or what + 's'}"


def some(names: Sequence[str], most: int) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its cells as they are."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, rule, *lines))

"""Small helpers for text that people read."""

from collections.abc import Iterable, Sequence


def counted(number: int, what: str, plural: str = "") -> str:
    """`number` and `what` in the singular or the plural: 1 row, 2 rows, 1,234 rows; `plural` where -s is wrong."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {plural or what + 's'}"


def duration(seconds: float | None) -> str:
    """Seconds as text, in a suitable unit; a dash for None."""
    if seconds is None:
        return "–"
    length, unit = next((n, u) for n, u in ((3600, "h"), (60, "min"), (1, "s")) if seconds >= 2 * n or n == 1)
    value = seconds / length
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def some(names: Sequence[str], most: int) -> str:
    """The first `most` names, separated by commas, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its cells as they are."""
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, rule, *lines))

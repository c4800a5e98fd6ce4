"""Small helpers for text that people read."""


def counted(number: int, what: str, plural: str = "") -> str:
    """`number` and `what` in the singular or the plural: 1 row, 2 rows, 1,234 rows; `plural` where -s is wrong."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {plural or what + 's'}"

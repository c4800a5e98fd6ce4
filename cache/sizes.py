"""Sizes for people."""


def sized(count: float) -> str:
    """`count` bytes as text of three digits with a decimal unit: 999 B, 1 kB, 50.2 kB, 2.35 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # else it would be rounded to 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"

"""Says what was tried for a line of the results, what was chosen, and on what."""

from collections.abc import Mapping, Sequence
from typing import Any

from h2t.pipeline.base.text import counted
from h2t.pipeline.reporting.results import ROWS, HostResult

MOST_NAMED = 3  # classes that are named; of more, their number is told
PLACES = {"validation images": "on validation images"}


def choices(results: Sequence[HostResult]) -> list[str]:
    """A sentence for each line of the results in which something was chosen."""
    return [
        f"{result.name}, {label}: {said(entry['chosen'])}"
        for result in results
        for row, label in ROWS.items()
        if (entry := result.metrics[row]) and entry.get("chosen")
    ]


def said(chosen: Mapping[str, Any]) -> str:
    """The entry `chosen` of metrics.json in words.

    For example: ratio 0.4 of 0.1, 0.2, 0.4 (the largest tried), chosen on validation images.
    """
    parts = []
    for name, values in chosen["tried"].items():
        value = chosen["values"][name]
        edge = ""
        if name in chosen["at_edge"]:
            edge = f" (the {'largest' if value == max(values) else 'smallest'} tried: one beyond may be better)"
        parts.append(f"{name} {number(value)} of {', '.join(map(number, values))}{edge}")
    text = f"{'; '.join(parts)}; chosen " + PLACES.get(chosen["by"], f"by cross-validation in {chosen['by']}")
    left_out = chosen["left_out"]
    if left_out:
        named = ", ".join(left_out) if len(left_out) <= MOST_NAMED else counted(len(left_out), "class", "classes")
        text += f" without {named}, of which there is one training image{' each' if len(left_out) > 1 else ''}"
    return text


def number(value: Any) -> str:
    """A chosen value as text."""
    return str(value) if isinstance(value, str) else f"{value:g}"

"""Chooses constants and the ratio by validation accuracy: on validation images, or in cross-validation.

Every host is tuned alike. Constants of the grid (learning rate, l2, tau ...) are chosen for each ratio, donor and
selection on their own, so that the host without H2T is tuned like the host with it. Test samples choose nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from h2t.pipeline.base.errors import UserError

Line = Mapping[str, Any]  # a head's setting, as in heads.parquet, with its validation accuracy as `top1`
Setting = tuple[Any, ...]


def _setting(line: Line) -> Setting:
    return line["ratio"], line["donor"], line["selection"]


@dataclass(frozen=True)
class Chosen:
    """The chosen values of `constants` by (ratio, donor, selection).

    `by`: what they were chosen on, such as `validation images`; None if nothing could be chosen. `left_out`: names of
    the classes that had no part in it.
    """

    by: str | None
    constants: Sequence[str]
    values: Mapping[Setting, Setting]
    left_out: Sequence[str] = ()

    def keeps(self, head: Line) -> bool:
        """Whether `head` has the chosen constants."""
        return self._own(head) == self.values[_setting(head)]

    def _own(self, head: Line) -> Setting:
        return tuple(head[name] for name in self.constants)

    def as_dict(self, head: Line, heads: Sequence[Line]) -> dict[str, Any] | None:
        """The entry `chosen` of metrics.json for the setting of `head`; None if there was nothing to choose from.

        `heads`: all heads whose donor and selection are those that H2T is reported with.
        """
        tried = {name: sorted({h[name] for h in heads if h["ratio"] == head["ratio"]}) for name in self.constants}
        if head["ratio"]:
            tried["ratio"] = sorted({h["ratio"] for h in heads if h["ratio"]})
        tried = {name: values for name, values in tried.items() if len(values) > 1}
        if self.by is None or not tried:
            return None
        values = {name: head[name] for name in tried}
        edges = [name for name in tried if _at_an_edge(name, values[name], tried[name])]
        return {"by": self.by, "values": values, "tried": tried, "at_edge": edges, "left_out": list(self.left_out)}


def _at_an_edge(name: str, value: Any, tried: Sequence[Any]) -> bool:
    """Whether a chosen number is the smallest or largest tried, so that one beyond might be better.

    Nothing lies beyond 0, nor beyond the ratio 1; and below the smallest ratio lies the host without H2T.
    """
    if isinstance(value, str | bool):
        return False
    if name == "ratio":
        return bool(value == tried[-1] < 1)
    return bool(value == tried[-1] or (value == tried[0] and value != 0))


def choose(
    where: str,
    heads: Sequence[Line],
    constants: Sequence[str],
    judged: Sequence[Line],
    by: str | None,
    left_out: Sequence[str] = (),
) -> Chosen:
    """The constants of the best mean validation accuracy for each ratio, donor and selection.

    `judged`: the lines of all `heads`, or of one seed's, with their accuracy. Among equals, the first of the grid is
    taken. Raises UserError, naming the stack `where`, if there is a choice and nothing to choose on.
    """
    best: dict[Setting, Setting] = {}
    for setting in dict.fromkeys(map(_setting, heads)):
        own = [h for h in heads if _setting(h) == setting]
        candidates = list(dict.fromkeys(tuple(h[name] for name in constants) for h in own))
        if len(candidates) > 1 and not judged:
            raise UserError(
                f"{where}: a choice among values of {', '.join(constants)} needs validation images or "
                "cross-validation; got neither; set folds for the host and train again"
            )
        means = {
            values: np.mean(
                [
                    line["top1"]
                    for line in judged
                    if _setting(line) == setting and tuple(line[name] for name in constants) == values
                ]
            )
            for values in (candidates if len(candidates) > 1 else ())
        }
        best[setting] = max(candidates, key=lambda values: means.get(values, 0.0))
    return Chosen(by if judged else None, constants, best, left_out)

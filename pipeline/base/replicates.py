"""Replicates: the division of the data, stage I and the batch-norm statistics once more, from other seeds.

Replicate 0 lies in the usual folders. Replicate r has the same tree in the folder `replicates/r` beside them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.seeds import stream

FOLDER = "replicates"
MOST = 2**32  # replicates are numbered below, as seeds are


def further(values: Mapping[str, Any]) -> list[int]:
    """The replicates of the parameters but 0. Raises UserError unless they are 0 and other whole numbers, each once."""
    given = values.get("replicates", [0])
    whole = isinstance(given, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    if not whole or given[:1] != [0] or len(set(given)) < len(given) or not all(0 <= n < MOST for n in given):
        raise UserError(
            f"replicates: must list different whole numbers and begin with 0, such as [0, 1, 2]; got {given!r}"
        )
    return given[1:]


def seed_of(seed: int, replicate: int) -> int:
    """The seed of a replicate, in [0, 2**32): `seed` itself for replicate 0."""
    return seed if replicate == 0 else int(stream(seed, "replicate", replicate).integers(2**32))


def place(path: Path, replicate: int) -> Path:
    """Where a replicate has what replicate 0 has at `path`: data/replicates/1/extract/b for data/extract/b."""
    stage = path.parent
    return path if replicate == 0 else stage.parent / FOLDER / str(replicate) / stage.name / path.name

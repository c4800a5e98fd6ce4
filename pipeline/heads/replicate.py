"""One replicate as stage II reads it."""

from dataclasses import dataclass
from pathlib import Path

from h2t.cache.reader import Cache
from h2t.pipeline.base.replicates import FOLDER


@dataclass(frozen=True)
class Replicate:
    """The open cache of a replicate, and the directory of the backbone that it was extracted with."""

    number: int
    cache: Cache
    backbone: Path

    def inside(self, folder: Path) -> Path:
        """Where a host's directory `folder` has the classifiers of this replicate; its own for replicate 0."""
        return folder / FOLDER / str(self.number) if self.number else folder

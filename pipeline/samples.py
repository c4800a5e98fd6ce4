"""What `prepare` wrote, read back: the sample table and the class facts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import plugins
from pipeline.errors import UserError
from pipeline.images import Images, Transform, open_images
from pipeline.params import build


@dataclass(frozen=True)
class Samples:
    """`table`: sample, split, label, source, digest, sorted by split, label, source; row i describes sample i."""

    table: pa.Table
    facts: Mapping[str, Any]

    @property
    def counts(self) -> list[int]:
        """Training samples per class, descending."""
        return list(self.facts["counts"])

    @property
    def transform(self) -> Transform:
        return build(Transform, "classes.json: transform", self.facts["transform"])

    def of(self, split: str) -> np.ndarray:
        """Sample numbers of a split, int64, sorted by label."""
        return np.flatnonzero(np.array(self.table["split"]) == split)

    @property
    def labels(self) -> np.ndarray:
        """The label of every sample, int64."""
        return self.table["label"].to_numpy().astype(np.int64)

    def images(self, prepare: Mapping[str, Any]) -> Images:
        """The images, read as the parameters' section `prepare` says; their bytes must be those that were prepared."""
        dataset = plugins.load("datasets", prepare["dataset"])
        if prepare["dataset"] != self.facts["dataset"]:
            raise UserError(
                f"prepare.dataset: samples were prepared from {self.facts['dataset']!r}; got {prepare['dataset']!r}"
            )
        options = build(dataset.Options, "prepare.options", prepare.get("options", {}))
        sources, digests = (self.table[name].to_pylist() for name in ("source", "digest"))
        return open_images(dataset, options, sources, digests, self.transform)


def load_samples(path: Path) -> Samples:
    """The output of `prepare` in the directory `path` (or the one that holds the file `path`). Raises UserError."""
    folder = path.parent if path.suffix == ".parquet" else path
    try:
        table = pq.read_table(folder / "samples.parquet")
        facts = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared samples here; run h2t prepare {folder}") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{folder}: prepared samples are unreadable ({error}); run h2t prepare again") from None
    return Samples(table, facts)

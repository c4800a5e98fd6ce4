"""What `prepare` wrote, read back: the sample table and the class facts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.data.images import Images, Transform, open_images

TEXT = pa.string()
SCHEMA = pa.schema({"sample": pa.int64(), "split": TEXT, "label": pa.int32(), "source": TEXT, "digest": TEXT})


@dataclass(frozen=True)
class Samples:
    """`table`: columns as SCHEMA, sorted by split, label, source; row i describes sample i. `facts`: classes.json."""

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
        had, asked = self.transform.model_dump(), dataset.transform(options).model_dump()
        if differ := [key for key in had if had[key] != asked[key]]:
            key = differ[0]
            raise UserError(
                f"prepare.options.transform.{key}: samples were prepared with {had[key]}; got {asked[key]}; "
                "prepare again (dvc repro or h2t prepare)"
            )
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
    if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
        raise UserError(f"{folder}: samples.parquet is not a table that prepare wrote; run h2t prepare again")
    labels, counts = np.unique(table.filter(pc.field("split") == "train")["label"], return_counts=True)
    try:
        same = facts["counts"] == counts.tolist() and list(range(len(facts["classes"]))) == labels.tolist()
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{folder}: classes.json is not of this samples.parquet; run h2t prepare again")
    return Samples(table, facts)

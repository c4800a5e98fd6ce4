"""Reads the output of `prepare`: the sample table and the facts about classes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.data.images import Images, Transform, open_images, transform_for
from h2t.pipeline.data.network_input import Input

TEXT = pa.string()
SCHEMA = pa.schema({"sample": pa.int64(), "split": TEXT, "label": pa.int32(), "source": TEXT, "digest": TEXT})


@dataclass(frozen=True)
class Samples:
    """The prepared samples.

    `table` has the columns of SCHEMA, sorted by split, label and source; its row i describes sample i. `facts` is the
    content of classes.json.
    """

    table: pa.Table
    facts: Mapping[str, Any]

    @property
    def counts(self) -> list[int]:
        """Number of training samples of each class, descending."""
        return list(self.facts["counts"])

    @property
    def transform(self) -> Transform:
        """The transform that the samples were prepared with."""
        return build(Transform, "classes.json: transform", self.facts["transform"])

    def with_input(self, stated: Input) -> "Samples":
        """The samples as a backbone with this input takes them: only the transform is another."""
        transform = transform_for(self.transform, stated).model_dump(mode="json")
        return replace(self, facts={**self.facts, "transform": transform})

    def of(self, split: str) -> np.ndarray:
        """The sample numbers of `split`, int64 (n,), sorted by label."""
        return np.flatnonzero(np.array(self.table["split"]) == split)

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64 (samples,)."""
        return self.table["label"].to_numpy().astype(np.int64)

    def images(self, prepare: Mapping[str, Any]) -> Images:
        """The images, read by the dataset of the parameters' section `prepare`.

        Raises UserError if the section names another dataset or transform than the samples were prepared with.
        """
        dataset = plugins.load("datasets", prepare["dataset"])
        if prepare["dataset"] != self.facts["dataset"]:
            raise UserError(
                f"prepare.dataset: must be {self.facts['dataset']!r}, as the samples were prepared from it; "
                f"got {prepare['dataset']!r}; prepare again (dvc repro or h2t prepare)"
            )
        options = build(dataset.Options, "prepare.options", prepare.get("options", {}))
        had, asked = dict(self.transform), dict(dataset.transform(options))
        if differ := [key for key in had if had[key] != asked[key]]:
            key = differ[0]
            raise UserError(
                f"prepare.options.transform.{key}: must be {had[key]}, as the samples were prepared with it; "
                f"got {asked[key]}; prepare again (dvc repro or h2t prepare)"
            )
        sources, digests = (self.table[name].to_pylist() for name in ("source", "digest"))
        return open_images(dataset, options, sources, digests, self.transform)


def load_samples(path: Path) -> Samples:
    """The output of `prepare` in the directory `path`; `path` may also be its samples.parquet.

    Raises UserError if the files are missing, unreadable or do not belong together.
    """
    import pyarrow.compute as pc  # takes 0.1 s to import, and every stage imports this module

    folder = path.parent if path.suffix == ".parquet" else path
    try:
        table = pq.ParquetFile(folder / "samples.parquet").read()  # `read_table` imports pandas
        facts = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared samples here; run h2t prepare {folder}") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{folder}: the prepared samples cannot be read ({error}); run h2t prepare again") from None
    if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
        raise UserError(f"{folder}: samples.parquet has other columns than prepare writes; run h2t prepare again")
    labels, counts = np.unique(table.filter(pc.field("split") == "train")["label"], return_counts=True)
    try:
        same = facts["counts"] == counts.tolist() and list(range(len(facts["classes"]))) == labels.tolist()
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{folder}: classes.json and samples.parquet do not match; run h2t prepare again")
    return Samples(table, facts)

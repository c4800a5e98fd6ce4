"""Reads the output of `prepare`: the sample table and the facts about classes."""

import errno
import hashlib
import json
import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from h2t.cache.format.spec import canonical_json
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.data.images import Images, Transform, open_images
from h2t.pipeline.data.network_input import Input
from h2t.pipeline.data.texts import PIECE_ROWS, Texts
from h2t.pipeline.data.views import transform_for

TEXT = pa.string()
SCHEMA = pa.schema({"sample": pa.int64(), "split": TEXT, "label": pa.int32(), "source": TEXT, "digest": TEXT})
GROUPED = SCHEMA.append(pa.field("group", pa.int32()))  # of a data set whose images have groups

KEPT_BYTES = 16 * 1024 * 1024  # a table file up to this size is kept in memory: some 300,000 samples, 40 MB
BUFFER_BYTES = 2**20  # of a column read at a time


@dataclass(frozen=True)
class Samples:
    """The prepared samples.

    `table` has the columns of SCHEMA or GROUPED, sorted by split, label and source; its row i describes sample i.
    `facts` is the content of classes.json.
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
        import pyarrow.compute as pc  # takes 0.1 s to import, and every stage imports this module

        return np.flatnonzero(pc.equal(self.table["split"], split).to_numpy())

    @property
    def labels(self) -> np.ndarray:
        """The label of each sample, int64 (samples,)."""
        return self.table["label"].to_numpy().astype(np.int64)

    @property
    def digest(self) -> str:
        """sha256 of split, label, source and digest of all samples, as canonical JSON of these columns.

        Groups are not part of it: no map depends on them.
        """
        whole = hashlib.sha256()
        for column, before in zip(("digest", "label", "source", "split"), "{,,,", strict=True):
            whole.update(f'{before}"{column}":['.encode())
            for number, batch in enumerate(self.table.select([column]).to_batches(max_chunksize=PIECE_ROWS)):
                whole.update(b"," * (number > 0) + canonical_json(batch[column].to_pylist())[1:-1])
            whole.update(b"]")
        whole.update(b"}")
        return whole.hexdigest()

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
        sources, digests = (Texts(self.table[name]) for name in ("source", "digest"))
        return open_images(dataset, options, sources, digests, self.transform)


def load_samples(path: Path) -> Samples:
    """The output of `prepare` in the directory `path`; `path` may also be its samples.parquet.

    Raises UserError if the files are missing, unreadable or do not belong together.
    """
    import pyarrow.compute as pc  # as above

    folder = path.parent if path.suffix == ".parquet" else path
    try:
        table = _table(folder / "samples.parquet")
        facts = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no prepared samples here; run h2t prepare {folder}") from None
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{tempfile.gettempdir()}: no space left to unpack samples.parquet; free some, or set TMPDIR"
            ) from None
        raise UserError(f"{folder}: the prepared samples cannot be read ({error}); run h2t prepare again") from None
    if table.schema not in (SCHEMA, GROUPED) or any(column.null_count for column in table.columns):
        raise UserError(f"{folder}: samples.parquet has other columns than prepare writes; run h2t prepare again")
    found = pc.value_counts(pc.filter(table["label"], pc.equal(table["split"], "train"))).to_pylist()
    counts = {line["values"]: line["counts"] for line in sorted(found, key=lambda line: line["values"])}
    try:
        same = facts["counts"] == list(counts.values()) and list(range(len(facts["classes"]))) == list(counts)
    except (KeyError, TypeError):
        same = False
    if not same:
        raise UserError(f"{folder}: classes.json and samples.parquet do not match; run h2t prepare again")
    return Samples(table, facts)


def _table(path: Path) -> pa.Table:
    """The table in a Parquet file. A large one is unpacked into a nameless temporary file, not into memory."""
    file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)  # `read_table` imports pandas
    if path.stat().st_size <= KEPT_BYTES:
        return file.read()
    with tempfile.TemporaryFile(prefix="h2t-samples-") as unpacked:
        with pa.ipc.new_file(unpacked, file.schema_arrow) as into:
            for batch in file.iter_batches(PIECE_ROWS, use_threads=False):
                into.write_batch(batch)
        unpacked.flush()
        mapped = mmap.mmap(unpacked.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()

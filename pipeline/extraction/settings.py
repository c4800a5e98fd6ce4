"""Section `extract` of the parameters. Every stage checks it, so it stands apart from what extraction imports."""

from typing import Annotated, Literal

import pydantic

from h2t.pipeline.base.params import DISTINCT, Bytes, Count, Epochs, Positive, Section, at_most
from h2t.pipeline.base.precision import Precision
from h2t.pipeline.extraction.cluster import ADDRESS
from h2t.pipeline.extraction.recorded import MOST_IMAGES

MOST_VIEWS = 2**15  # views are numbered from 0 in 16 bits


class Params(Section):
    """Section `extract`."""

    batchnorm: Annotated[list[Literal["stage1", "calibrated", "branchwise", "reverse"]], DISTINCT] = [
        "stage1",
        "branchwise",
    ]
    """Batch-norm recipes whose rows the cache stores; a host reads one of them. Without batch norm it is `stage1`.

    If the key is left out, it is `stage1` as well for the pretrained weights of a package.
    """
    batchnorm_passes: Epochs = 200
    """Batches that each set of statistics is estimated from."""
    max_views: Annotated[Count, at_most(MOST_VIEWS)] = 1
    """Largest number of views of a training image: view 0 is the evaluation transform, the others are augmented."""
    view_target: Positive = 1.0
    """A class of n images gets ceil(view_target x mean class size / n) views, up to `max_views`."""
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    """Number format in which maps are stored."""
    codec: Literal["none", "zstd", "blosc-lz4", "numcodecs.lz4", "pcodec"] = "none"
    """Compression of maps."""
    chunk_rows: Count | None = None
    """Rows in a chunk, the unit of reading and of checksums; null chooses by the size of a row."""
    shard_bytes: Bytes = 128 * 1024**2
    """Size of a shard file, in bytes before compression; left out, larger from 0.55 TB on, up to 512 MiB."""
    batch_size: Annotated[Count, at_most(MOST_IMAGES)] = 128
    """Images in a forward pass."""
    precision: Precision = "float32"
    """Number format of the forward pass."""
    cluster: Annotated[str | None, ADDRESS] = None
    """Set `run.cluster` instead, which DVC does not watch."""
    statistics_from: Annotated[str, pydantic.Field(min_length=1)] | None = None
    """Previous cache, or folder with one for each backbone: its statistics are kept, unchanged rows copied."""

"""A process that writes a small cache, and says on stdout what it does; for others to kill.

python tests/faults/writing.py TARGET [--step]

With --step it waits for a line on stdin before each shard, so that a test knows where it is.
"""

import hashlib
import signal
import sys
from pathlib import Path

import numpy as np

from h2t.cache.format.rows import make_rows
from h2t.cache.format.spec import CacheSpec
from h2t.cache.write.staging import Staging
from h2t.cache.write.writer import CacheWriter

ROWS, SHARDS, SHAPE = 14 * 256 - 3, 14, (64, 8, 8)  # shards of 2 MiB, the last one shorter


def spec() -> CacheSpec:
    return CacheSpec(
        rows=ROWS,
        maps=(SHAPE,),
        dtype="float16",
        codec="none",
        chunk_rows=1,
        shard_rows=256,
        fingerprint_inputs={"backbone": "faults"},
    )


def write(target: Path, *, step: bool = False) -> list[int]:
    """Writes what is missing of the cache `target`; returns the shards that it wrote."""
    numbers = np.arange(ROWS)
    sources = [f"{i:05}" for i in numbers]
    table = make_rows(
        {
            "sample": numbers,
            "view": np.zeros(ROWS, np.int16),
            "statistics": ["stage1"] * ROWS,
            "split": ["train"] * ROWS,
            "label": numbers % 7,
            "source": sources,
            "digest": [hashlib.sha256(s.encode()).hexdigest() for s in sources],
        }
    )
    with Staging(target) as staging:
        writer = CacheWriter(staging, spec(), table, {"attempt": "same"})
        pending = writer.pending
        print("pending", *pending, flush=True)  # noqa: T201
        for shard in pending:
            if step:
                sys.stdin.readline()
            print("begin", shard, flush=True)  # noqa: T201
            size = len(writer.spec.shard_range(shard))
            values = np.random.default_rng(shard).standard_normal((size, *SHAPE), np.float32)
            writer.write(shard, [np.maximum(values, 0).astype(np.float16)])
            print("end", shard, flush=True)  # noqa: T201
        writer.commit(b"\x02\0\0\0\0\0\0\0{}", b"# A cache\n")
    return pending


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where whoever started this ignores it
    write(Path(sys.argv[1]), step="--step" in sys.argv)

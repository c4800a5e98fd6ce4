"""Maps, tokens and class tokens of a ViT-B/16 at 224 pixels in caches of random values: bytes, pooled copies, reading.

    python -m benchmarks.bench_tokens --data DIR

Each cache is read at random rows, as many as give about the same number of bytes, in turns in one process. The ratio is
bytes per second over those of maps (768 x 14 x 14); maps of a ResNet-50 stand beside them. A pooled copy holds one
float32 vector per row; `pool` is the time of `h2t pool`, which reads every byte once.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import alternate, arguments, machine, ratio, save, table
from benchmarks.synthetic import write_synthetic
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base.run import Run
from h2t.pipeline.stages import pool

SHAPES = {"map": (768, 14, 14), "tokens": (768, 197, 1), "cls": (768, 1, 1), "ResNet-50 map": (2048, 7, 7)}
BYTES, TINY_BYTES = 512 * 2**20, 4 * 2**20  # of each cache
SHARE = 8  # of the rows, one in so many is read by a call
DRAWS = 12  # other rows in every call, so that they come from memory and not from the processor's cache


def reading(cache: Cache) -> Callable[[], object]:
    """A function that reads random rows into one array."""
    draws = np.random.default_rng(0)
    some = cycle([draws.choice(cache.spec.rows, cache.spec.rows // SHARE, replace=False) for _ in range(DRAWS)])
    out = np.empty((cache.spec.rows // SHARE, *cache.spec.maps[0]), cache.spec.stored_dtype)
    return lambda: cache.read(next(some), out=out)


def main(given: Sequence[str] | None = None) -> None:
    options = arguments("bench_tokens", __doc__.splitlines()[0]).parse_args(given)  # type: ignore[union-attr]
    about, rounds = machine(), 2 if options.tiny else options.rounds
    lines: dict[str, dict[str, Any]] = {}
    for name, shape in SHAPES.items():
        folder: Path = options.data / name.replace(" ", "-")
        rows = (TINY_BYTES if options.tiny else BYTES) // (2 * int(np.prod(shape)))
        if not (folder / "cache.json").is_file():
            write_synthetic(folder, rows, shape, classes=4 if options.tiny else 100)
        copy = folder.with_name(f"{folder.name}-pooled")
        shutil.rmtree(copy, ignore_errors=True)
        with open_cache(folder) as cache:
            clock, used = time.perf_counter(), time.process_time()
            pooled = pool.run(pool.Params(), Run(name, copy), cache)
            lines[name] = {
                "shape": list(shape),
                "rows": rows,
                "row_bytes": cache.spec.row_bytes(0),
                "rows_per_chunk": cache.spec.chunk_rows,
                "pooled_row_bytes": pooled.row_bytes(0),
                "pool": {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - used},
                "gather": rows // SHARE,
            }
    caches = {name: open_cache(options.data / name.replace(" ", "-")) for name in SHAPES}
    timings = alternate({name: reading(cache) for name, cache in caches.items()}, rounds)
    per_byte = {name: lines[name]["gather"] * lines[name]["row_bytes"] for name in SHAPES}
    for name, timing in timings.items():
        scaled = ratio(timings["map"], timing)
        lines[name] |= {
            **timing.json(),
            "bytes_per_second": per_byte[name] / timing.median,
            "per_byte_vs_map": {k: v * per_byte[name] / per_byte["map"] for k, v in scaled.items()},
        }
        caches[name].close()
    save(options.out, {"tiny": options.tiny, "machine": about, "results": lines})
    print(shown(lines))


def shown(lines: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    header = ["features", "shape", "bytes a row", "pooled", "h2t pool, CPU s per GB", "GB/s at random", "over maps"]
    rows = []
    for name, line in lines.items():
        whole = line["rows"] * line["row_bytes"] / 1e9
        against = line["per_byte_vs_map"]
        rows.append(
            [
                name,
                "x".join(map(str, line["shape"])),
                f"{line['row_bytes']:,}",
                f"{line['pooled_row_bytes']:,}",
                f"{line['pool']['cpu'] / whole:.1f}",
                f"{line['bytes_per_second'] / 1e9:.2f}",
                f"{against['median']:.2f} ({against['p10']:.2f} to {against['p90']:.2f})",
            ]
        )
    return table(header, rows)


if __name__ == "__main__":
    main()

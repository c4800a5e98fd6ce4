"""Makes the golden caches again: `python tests/golden/make.py --regenerate`. Nothing else ever writes them."""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

CODECS = ("none", "zstd")
#: Two experts of different shape, small rows in chunks of two, a last shard and a last chunk that are not full.
SPEC = {"rows": 5, "maps": ((2, 2, 3), (3, 1, 1)), "dtype": "float16", "chunk_rows": 2, "shard_rows": 4}


def maps() -> list[np.ndarray]:
    """Row r, position p (counted in C order) holds r + p / 16, and 0 where r + p is divisible by 3."""
    result = []
    for shape in SPEC["maps"]:
        row, position = np.indices((SPEC["rows"], int(np.prod(shape))))
        values = np.where((row + position) % 3 == 0, 0, row + position / 16)
        result.append(values.reshape(SPEC["rows"], *shape).astype("<f2"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--regenerate", action="store_true", required=True)
    parser.parse_args()
    from builders import make_rows, make_spec, write_cache

    for codec in CODECS:
        shutil.rmtree(HERE / codec, ignore_errors=True)
        write_cache(HERE / codec, make_spec(**SPEC, codec=codec), make_rows(SPEC["rows"]), maps())


if __name__ == "__main__":
    main()

"""Named random streams. Every random number in the project comes from one of these; no global generator is used.

A stream is identified by a seed and a key. So any step of any epoch can be drawn without drawing the earlier ones, and
streams with different keys are independent (NumPy's SeedSequence with a spawn key).
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


@lru_cache(maxsize=256)
def word(name: str) -> int:
    """The number, below 2^32, that stands for a word of a key."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


class _Known(ISeedSequence):
    """A SeedSequence whose first two words of 64 bits, from which Philox starts, are known.

    NumPy's bit generators accept any `ISeedSequence`.
    """

    def __init__(self, words: np.ndarray) -> None:
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, dtype) == (2, np.uint64)
        return self._words


#: (seed, *key) -> where Philox starts, uint64 (2,), of streams that were started ahead (`many_streams.start`).
_started: dict[tuple[int | str, ...], np.ndarray] = {}


def keep_started(starts: dict[tuple[int | str, ...], np.ndarray]) -> None:
    """Keeps where the streams of these (seed, *key) start, in place of those kept before. It changes no draw."""
    global _started
    _started = starts


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """A new generator for `seed` and `key`. The same seed and key always give the same draws."""
    start = _started.get((seed, *key))
    if start is not None:
        return np.random.Generator(np.random.Philox(_Known(start)))  # type: ignore[arg-type]  # not in NumPy's stubs
    words = tuple(word(part) if isinstance(part, str) else part for part in key)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=words)))


def torch_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed for a torch generator, the first draw of the stream of `seed` and `key`."""
    return int(stream(seed, *key).integers(2**63))


def permutation(draws: np.random.Generator, size: int) -> np.ndarray:
    """`draws.permutation(size)`, the same one, in 4 bytes a number where they suffice."""
    numbers = np.arange(size, dtype=np.int32 if size <= np.iinfo(np.int32).max else np.int64)
    draws.shuffle(numbers)
    return numbers

"""Named random streams. Every random number in the project comes from one of these; no global generator is used.

A stream is identified by a seed and a key. So any step of any epoch can be drawn without drawing the earlier ones, and
streams with different keys are independent (NumPy's SeedSequence with a spawn key).
"""

import hashlib
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=256)
def word(name: str) -> int:
    """The number, below 2^32, that stands for a word of a key."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """A new generator for `seed` and `key`. The same seed and key always give the same draws."""
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

"""Named random streams. Every random number in the project comes from one of these; no global generator is used.

A stream is identified by a seed and a key. So any step of any epoch can be drawn without drawing the earlier ones, and
streams with different keys are independent (NumPy's SeedSequence with a spawn key).
"""

import hashlib

import numpy as np


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
    return part


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """A new generator for `seed` and `key`. The same seed and key always give the same draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(map(_word, key)))))


def torch_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed for a torch generator, the first draw of the stream of `seed` and `key`."""
    return int(stream(seed, *key).integers(2**63))

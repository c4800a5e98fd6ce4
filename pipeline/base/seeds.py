"""Named random streams. Every draw in the project comes from one of these; nothing touches a global generator.

A stream is addressed by a seed and a key, so any step of any epoch can be drawn without the ones before it, and two
streams with different keys are independent (NumPy's SeedSequence with a spawn key).
"""

import hashlib

import numpy as np


def _word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "little")
    return part


def stream(seed: int, *key: int | str) -> np.random.Generator:
    """The generator addressed by `seed` and `key`; the same address always gives the same draws."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=tuple(map(_word, key)))))


def torch_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed for a torch generator, from the stream of that address."""
    return int(stream(seed, *key).integers(2**63))

"""Many named streams at once: their starts, and their first draws, equal to those of `seeds.stream` one by one.

Starting a NumPy generator takes about 40 microseconds, which is longer than a GPU needs for an image of 32 pixels. So
NumPy's SeedSequence (M. E. O'Neill's seed_seq_fe128) and the generator Philox 4x64 with ten rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) are computed here on arrays. NumPy promises to keep both.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from h2t.pipeline.base.seeds import keep_started, word

FEW = 32  # as many streams are started one by one in the time that `start` takes for any number of them
_POOL = 4
_HIGH, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_MULTIPLY = np.array([[0xD2E7470EE14C6C93], [0xCA5A826395121157]], np.uint64)  # of the counter's words 0 and 2
_WEYL = np.array([[0x9E3779B97F4A7C15], [0xBB67AE8584CAA73B]], np.uint64)  # added to the key after each round


class ManyStreams:
    """N streams, each as `stream(seed, *key)`, from which all draw in step.

    `key`: words and numbers below 2^32, the same for all streams, or an array (N,) of such numbers, one for each; a
    word of `stream` is the number `seeds.word` of it. NumPy repeats some draws of `integers`, about one in
    2^32 / `high`; `repeats` (N,), bool, is true for the streams that met one. All later draws of these are wrong.
    """

    def __init__(self, seed: int, *key: int | str | np.ndarray) -> None:
        parts = [word(part) if isinstance(part, str) else part for part in key]
        words = [*_in_words(seed), *(np.asarray(part, np.uint32) for part in parts)]
        streams = np.broadcast_arrays(*words)[0].shape
        self.repeats = np.zeros(streams, bool)
        self._key = _philox_keys(np.array([np.broadcast_to(w, streams) for w in words]))
        self._block, self._words = 0, np.empty((0, *streams), np.uint64)
        self._half: np.ndarray | None = None

    def integers(self, high: int) -> np.ndarray:
        """Whole numbers in [0, high), int64 (N,), as `Generator.integers(high)`; `high` from 1 to 2^32 - 1."""
        if high == 1:
            return np.zeros(self.repeats.shape, np.int64)
        product = self._next_half() * np.uint64(high)
        self.repeats |= (product & _LOW) < (2**32 - high) % high
        return (product >> _HIGH).astype(np.int64)

    def random(self) -> np.ndarray:
        """Float64 (N,) in [0, 1), as `Generator.random()`."""
        return (self._next() >> np.uint64(11)) * (1.0 / 2**53)

    def _next(self) -> np.ndarray:
        """The next 64 random bits of each stream, uint64 (N,)."""
        if not len(self._words):
            self._block += 1
            self._words = _philox(self._key, self._block)
        first, self._words = self._words[0], self._words[1:]
        return first

    def _next_half(self) -> np.ndarray:
        """The next 32: the low half of 64, and the high half, kept for the call after, in uint64 (N,)."""
        if self._half is not None:
            half, self._half = self._half, None
            return half
        both = self._next()
        self._half = both >> _HIGH
        return both & _LOW


def start(seeds: Sequence[int], *keys: Sequence[int | str | Sequence[int]]) -> None:
    """Starts the streams of these seeds and keys ahead, so that `stream` takes 5 microseconds for each, not 27.

    A part of a key may be several numbers, of which each makes a key. Numbers are below 2^32, seeds may be larger and
    are then left out. Streams that were started before and not taken are forgotten.
    """
    small = [seed for seed in seeds if seed < 2**32]
    starts: dict[tuple[int | str, ...], np.ndarray] = {}
    for key in keys:
        axes = [small, *([part] if isinstance(part, int | str) else part for part in key)]
        if math.prod(map(len, axes)) < FEW:
            continue
        numbers = [np.array([word(p) if isinstance(p, str) else p for p in axis], np.uint32) for axis in axes]
        own, *rest = (grid.ravel() for grid in np.meshgrid(*numbers, indexing="ij"))
        filled = [np.zeros_like(own)] * (_POOL - 1)
        starts.update(zip(itertools.product(*axes), _philox_keys(np.array([own, *filled, *rest])).T, strict=True))
    keep_started(starts)


def _in_words(number: int) -> list[np.ndarray]:
    """A seed in words of 32 bits, the lowest first, filled up to the size of the pool, as SeedSequence reads it."""
    count = max(_POOL, -(-number.bit_length() // 32))
    return [np.asarray(number >> 32 * i & 0xFFFFFFFF, np.uint32) for i in range(count)]


class _Hash:
    """SeedSequence's hash: every call multiplies by the next constant."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, values: np.ndarray) -> np.ndarray:
        values = values ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        values = values * np.uint32(self._constant)
        return values ^ (values >> np.uint32(16))


def _mix(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mixed: np.ndarray = x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715)
    return mixed ^ (mixed >> np.uint32(16))


def _philox_keys(words: np.ndarray) -> np.ndarray:
    """uint64 (2, N), from the seed's and the key's words, uint32 (W, N) with W >= 4."""
    hashed = _Hash(0x43B0D7E5, 0x931E8875)
    pool = [hashed(w) for w in words[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashed(pool[source]))
    for w in words[_POOL:]:
        pool = [_mix(p, hashed(w)) for p in pool]
    hashed = _Hash(0x8B51F9DD, 0x58F38DED)
    low0, high0, low1, high1 = (hashed(p).astype(np.uint64) for p in pool)
    return np.array([low0 | high0 << _HIGH, low1 | high1 << _HIGH])


def _philox(key: np.ndarray, block: int) -> np.ndarray:
    """Block `block`, from 1, of each stream: uint64 (4, N), from keys (2, N)."""
    even = np.zeros_like(key)  # words 0 and 2 of the counter
    odd = np.zeros_like(key)  # words 1 and 3
    even[0] = block
    for _ in range(10):
        high, low = _product(even)
        even, odd = high[::-1] ^ odd ^ key, low[::-1]
        key = key + _WEYL
    return np.array([even[0], odd[0], even[1], odd[1]])


def _product(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower 64 bits of `_MULTIPLY` times `x` (2, N)."""
    a1, a0, b1, b0 = _MULTIPLY >> _HIGH, _MULTIPLY & _LOW, x >> _HIGH, x & _LOW
    middle = a1 * b0 + (a0 * b0 >> _HIGH)
    other = a0 * b1 + (middle & _LOW)
    return a1 * b1 + (middle >> _HIGH) + (other >> _HIGH), _MULTIPLY * x

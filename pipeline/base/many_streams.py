"""Many named streams at once: their starts, and their first draws, equal to those of `seeds.stream` one by one.

Starting a NumPy generator takes about 40 microseconds, which is longer than a GPU needs for an image of 32 pixels. So
NumPy's SeedSequence (M. E. O'Neill's seed_seq_fe128) and the generator Philox 4x64 with ten rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) are computed here on arrays. NumPy promises to keep both.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from h2t.pipeline.base.seeds import stream, word

FEW = 32  # as many streams are started one by one in the time that it takes to compute the starts of any number
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


class ManyGenerators:
    """N streams that start at `keys`, uint64 (2, N), each of which draws arrays as a generator of its own would.

    Draws that NumPy may repeat are not: `repeats` (N,), bool, is true for the streams that may have met one, about
    `high` in 2^32 of all draws. Their draws are to be made again one by one, as `at_once` does.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self.repeats = np.zeros(keys.shape[1], bool)
        self._used = np.zeros((keys.shape[1], 1), np.int64)  # halves of 64 random bits that each stream has used
        self._halves = np.empty((keys.shape[1], 0), np.uint32)

    def integers(self, high: int | np.ndarray, *, size: int | None = None) -> np.ndarray:
        """Whole numbers in [0, high), int64 (N, size), as `Generator.integers(high, size=size)` of each stream.

        `high`, from 1 to 2^32 - 1, is one number, or an array (N, size), from 1, in which case `size` is left out.
        """
        shape = (len(self.repeats), size) if size is not None else np.shape(high)
        highs = np.broadcast_to(np.asarray(high, np.uint64), shape)
        ends = self._used + (highs > 1).cumsum(1)  # a number below 1 needs no random bits
        self._used = ends[:, -1:]
        self._draw(max(1, int(self._used.max())))
        product = np.take_along_axis(self._halves, ends - 1, 1) * highs
        self.repeats |= ((product & _LOW) < highs).any(1)
        return (product >> _HIGH).astype(np.int64)

    def choice(self, high: int, *, size: int, p: np.ndarray) -> np.ndarray:
        """Whole numbers in [0, high), int64 (N, size), as the first `Generator.choice(high, size, p=p)` of each."""
        assert not self._used.any(), "choice must be the first draw of a law with AT_ONCE"
        self._used += 2 * size
        self._draw(2 * size)
        uniform = (self._halves.view("<u8")[:, :size] >> np.uint64(11)) * (1.0 / 2**53)
        ends = p.cumsum()
        return (ends / ends[-1]).searchsorted(uniform, side="right")

    def _draw(self, halves: int) -> None:
        """Makes at least so many halves of each stream, and twice as many at first: most laws draw twice."""
        if halves > self._halves.shape[1]:
            words = np.stack([bits.random_raw(halves) for bits in _restarted(self._keys)])
            self._halves = words.astype("<u8", copy=False).view("<u4")  # the low half comes first


def _restarted(keys: np.ndarray) -> Iterator[np.random.Philox]:
    """One generator of bits, which starts at each of `keys` (2, N) in turn: 2 microseconds; a new one takes 27."""
    bits = np.random.Philox(0)
    state = bits.state
    for key in keys.T:
        state["state"]["key"] = key
        bits.state = state
        yield bits


def generators(
    seeds: Sequence[int], key: Sequence[int | str], steps: Sequence[int], *rest: Sequence[int]
) -> Iterator[np.random.Generator]:
    """Gives `stream(seed, *key, step, *others)` for each step, each seed and all numbers in `rest`, in this order.

    Each is valid until the next one is asked for. Numbers, but for seeds, are below 2^32.
    """
    axes = (steps, seeds, *rest)
    if _few(axes):
        yield from (stream(seed, *key, step, *others) for step, seed, *others in itertools.product(*axes))
    else:
        generator = None
        for bits in _restarted(_starts(seeds, key, steps, *rest)):
            generator = generator or np.random.Generator(bits)
            yield generator


def at_once(
    seeds: Sequence[int],
    key: Sequence[int | str],
    steps: Sequence[int],
    draw: Callable[..., np.ndarray],
    *parts: np.ndarray,
) -> np.ndarray:
    """What `draw(stream(seed, *key, step), *parts)` draws for each step and seed, (steps, seeds, n).

    `draw` also takes `ManyGenerators`. `parts` (steps, seeds, n): what each draw is given.
    """
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    if _few((steps, seeds)):
        every = generators(seeds, key, steps)
        drawn = np.array([draw(one, *own) for one, *own in zip(every, *flat, strict=True)])
    else:
        many = ManyGenerators(_starts(seeds, key, steps))
        drawn = draw(many, *flat)
        for place in np.flatnonzero(many.repeats):
            step, seed = divmod(int(place), len(seeds))
            drawn[place] = draw(stream(seeds[seed], *key, steps[step]), *(part[place] for part in flat))
    return drawn.reshape(len(steps), len(seeds), -1)


def _few(axes: Sequence[Sequence[int]]) -> bool:
    """Whether the streams of these (steps, seeds, ...) are started one by one."""
    return math.prod(map(len, axes)) < FEW or max(axes[1]) >= 2**32


def _starts(seeds: Sequence[int], key: Sequence[int | str], steps: Sequence[int], *rest: Sequence[int]) -> np.ndarray:
    """Where Philox starts in the streams of `generators`, uint64 (2, N). Seeds are below 2^32."""
    numbers = [np.asarray(axis, np.uint32) for axis in (steps, seeds, *rest)]
    step, own, *others = (grid.ravel() for grid in np.meshgrid(*numbers, indexing="ij"))
    same = [word(part) if isinstance(part, str) else part for part in key]
    before = [np.full_like(own, part) for part in ([0] * (_POOL - 1) + same)]  # a seed is its first word of four
    return _philox_keys(np.array([own, *before, step, *others]))


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

"""Columns of texts and of digests that take a few bytes beside what they say, for datasets of 10^8 images."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

PIECE_ROWS = 2**16  # texts that are Python objects at a time
DIGEST_BYTES = 32  # of a sha256


class Texts(Sequence[str]):
    """A column of texts in Arrow's memory or in a mapped file, where each takes 4 bytes beside its letters.

    A list of Python strings takes 60 bytes more for each.
    """

    __hash__ = None  # type: ignore[assignment]  # equal to a list of the same texts

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """The same texts. An iterator is read piece by piece."""
        if isinstance(texts, Texts):
            return texts
        rest = iter(texts)
        pieces = iter(lambda: list(islice(rest, PIECE_ROWS)), [])
        return cls(pa.chunked_array([pa.array(piece, pa.string()) for piece in pieces], pa.string()))

    @classmethod
    def joined(cls, parts: Iterable["Texts"]) -> "Texts":
        """The texts of all `parts`, one after the other, without a copy."""
        return cls(pa.chunked_array([chunk for part in parts for chunk in part.column.iterchunks()], pa.string()))

    @property
    def column(self) -> pa.ChunkedArray:
        """The texts as an Arrow column."""
        return self._column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return self._column[int(place)].as_py()

    def __iter__(self) -> Iterator[str]:
        for chunk in self._column.iterchunks():
            for start in range(0, len(chunk), PIECE_ROWS):
                yield from chunk.slice(start, PIECE_ROWS).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def take(self, places: Iterable[int]) -> "Texts":
        """The texts at `places`. Arrow's own `take` would copy the whole column first."""
        return Texts.of(self[place] for place in places)

    def numbered(self) -> tuple[np.ndarray, "Texts"]:
        """(For each text its place among the distinct ones, int32 (n,); the distinct texts, by first appearance)."""
        # Distinct texts come as one array, and more than 2 GiB of letters fit only a large one.
        coded = self._column.cast(pa.large_string()).dictionary_encode().combine_chunks()
        return coded.indices.to_numpy(), Texts(pa.chunked_array([coded.dictionary]))

    def order(self) -> np.ndarray:
        """The places of the texts in ascending order, uint64 (n,); equal texts keep their order."""
        import pyarrow.compute as pc  # takes 0.1 s to import, and every stage imports this module

        order: np.ndarray = pc.sort_indices(self._column).to_numpy()
        return order


def first_repeat(texts: Texts, places: np.ndarray | None = None) -> tuple[int, int] | None:
    """The first text that is there again: (its place, its second place); None if all differ, or all at `places`.

    In 16 bytes of memory a text: equal texts have equal hashes, and only where hashes are equal texts are compared.
    """
    order = range(len(texts)) if places is None else places
    read = texts if places is None else (texts[place] for place in places)
    hashes = np.fromiter(map(hash, read), np.int64, len(order))
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    del ordered
    seen: dict[str, int] = {}
    for i in np.flatnonzero(np.isin(hashes, twice)).tolist() if twice.size else ():
        place = int(order[i])
        before = seen.setdefault(texts[place], place)
        if before != place:
            return before, place
    return None


class Digests:
    """The sha256 of each of n images, as far as `known`: bool (n,). It takes 33 bytes an image."""

    def __init__(self, size: int) -> None:
        self._values = np.zeros((size, DIGEST_BYTES), np.uint8)
        self.known = np.zeros(size, bool)

    def __setitem__(self, place: int, digest: str) -> None:
        """Keeps the digest of the image at `place`, given in hex."""
        self._values[place] = np.frombuffer(bytes.fromhex(digest), np.uint8)
        self.known[place] = True

    def texts(self, places: np.ndarray) -> list[str]:
        """The digests at `places`, in hex."""
        return [line.tobytes().hex() for line in self._values[places]]

    def copies(self) -> list[list[int]]:
        """The images that are equal byte by byte: lists of two or more places, by the first of each.

        In 24 bytes of memory an image: only where the first 8 bytes are equal whole digests are compared.
        """
        starts = self._values[:, :8].copy().view(np.int64)[:, 0]
        ordered = np.sort(starts[self.known])
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        del ordered
        alike: dict[bytes, list[int]] = defaultdict(list)
        for place in np.flatnonzero(self.known & np.isin(starts, twice)).tolist() if twice.size else ():
            alike[self._values[place].tobytes()].append(place)
        return [places for places in alike.values() if len(places) > 1]

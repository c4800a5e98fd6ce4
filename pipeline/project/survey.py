"""Looks at every image of a collection: size, mode, orientation, whether it can be read, and copies."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from h2t.cache.machine import cores
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.progress import progress
from h2t.pipeline.data.decoding import Properties, properties
from h2t.pipeline.data.texts import Digests
from h2t.pipeline.project.detect import Found

PIECE = 64  # images per task of a thread
HEADER_BYTES = 2**20  # of a file, where pixels are not looked at


@dataclass
class Survey:
    """What was found. Images are addressed by their position in the collection.

    `short_side`: pixels, int32 (n,), 0 for unreadable images. `values`: smallest and largest value of 16-bit and
    floating-point images, by mode. `animated`: images of several frames. `digests`: sha256 of each image that was read
    whole.
    """

    short_side: np.ndarray
    digests: Digests
    modes: Counter[str] = field(default_factory=Counter)
    unreadable: dict[int, str] = field(default_factory=dict)
    turned: int = 0
    animated: int = 0
    values: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def deep(self) -> tuple[float, float] | None:
        """The smallest and largest value of 16-bit and floating-point images; None if there are none."""
        lows, highs = [low for low, _ in self.values.values()], [high for _, high in self.values.values()]
        return (min(lows), max(highs)) if lows else None

    @property
    def readable(self) -> np.ndarray:
        """The short sides of the readable images, in pixels."""
        return self.short_side[self.short_side > 0]

    def add(self, i: int, what: Properties | str, digest: str) -> None:
        """Adds image `i`: its properties, or why it cannot be read."""
        if isinstance(what, str):
            self.unreadable[i] = what
            return
        self.short_side[i] = min(what.width, what.height)
        self.modes[what.mode] += 1
        self.turned += what.turned
        self.animated += what.animated
        if digest:
            self.digests[i] = digest
        if what.high > what.low:
            low, high = self.values.get(what.mode, (what.low, what.high))
            self.values[what.mode] = (min(low, what.low), max(high, what.high))


def _folder(module: Any, options: Any) -> Path | None:
    """The folder that sources are paths in; None where images lie in Parquet files."""
    if getattr(options, "bytes", None):
        return None
    return Path(module.folder(options) if hasattr(module, "folder") else options.root)


def survey(found: Found, *, headers: bool = False) -> Survey:
    """Reads all images of a collection; with `headers` the beginning of each file, without digests."""
    module = plugins.load("datasets", found.dataset)
    options = build(module.Options, "prepare.options", found.options)
    read, root = module.reader(options), _folder(module, options)
    sources = found.collection.source
    result = Survey(np.zeros(len(sources), np.int32), Digests(len(sources)))

    def look(i: int) -> tuple[Properties | str, str]:
        """(what image i holds, or why it cannot be read; its sha256)."""
        try:
            if headers and root is not None:
                path = root / sources[i]
                if path.is_file() and path.stat().st_size > HEADER_BYTES:  # a pipe would wait for ever
                    with path.open("rb") as file, suppress(ValueError):  # some formats keep their header at the end
                        return properties(file.read(HEADER_BYTES), headers=True), ""
            data = read(sources[i])
            return properties(data, headers=headers), "" if headers else hashlib.sha256(data).hexdigest()
        except FileNotFoundError:
            return "is missing", ""
        except OSError as error:
            return f"cannot be read ({error.strerror or error})", ""
        except (ValueError, UserError) as error:
            return str(error), ""

    def piece(first: int) -> list[tuple[Properties | str, str]]:
        return [look(i) for i in range(first, min(first + PIECE, len(sources)))]

    starts = range(0, len(sources), PIECE)
    bar = progress(None, "looking at images", unit="image", total=len(sources))
    with ThreadPoolExecutor(cores()) as pool, bar:
        for first, seen in zip(starts, pool.map(piece, starts), strict=True):
            for i, (what, digest) in enumerate(seen, first):
                result.add(i, what, digest)
            bar.update(len(seen))
    return result

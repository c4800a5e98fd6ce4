"""The images of a dataset: what it lists, and their batches, decoded and checked against the recorded digests.

The augmentation of an image depends only on (seed, source, view).
"""

import copy
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from h2t.cache.machine import cores
from h2t.cache.memory import available_memory
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.views import Transform as Transform  # datasets take it from here
from h2t.pipeline.data.views import augmented, check_size, decoder, for_evaluation, normalised

if TYPE_CHECKING:
    import torch  # imported where it is used: datasets state their options without it

KEEP_DECODED_BYTES = 1024**3  # decoded images kept in memory, at most a quarter of the available memory
AT_ONCE = 8  # images per task of a decoding thread: for small images, handing over a task costs more than decoding


@dataclass(frozen=True)
class Collection:
    """The images of a dataset as lists of equal length, in the dataset's own order.

    `label` is the index into `classes`, in the dataset's own numbering. `split` is train, val or test. `group` names
    what an image belongs to (a patient, a camera); a group is never divided among splits. `notes` are lines for the
    user, about files that were left out, for example. `source` and `group` may be `data.texts.Texts`, which hold many
    images in less memory than a list. `read` holds the sha256 of tables and lists at URLs, by URL.
    """

    classes: list[str]
    source: Sequence[str]
    label: list[int]
    split: list[str]
    group: Sequence[str] | None = None
    notes: list[str] = field(default_factory=list)
    read: dict[str, str] = field(default_factory=dict)


class BadImage(UserError):
    """An image that cannot be used: its `source` and the `reason` in words.

    `prepare` writes reasons to skipped.parquet, so a reworded reason changes its output.
    """

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(
            f"image {source!r}: {reason}; repair or remove the file and prepare again, "
            "or leave out bad images with prepare.bad_images=skip"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return BadImage, (self.source, self.reason)


class Images:
    """The images of a sample table as normalised batches. Images are addressed by sample number.

    `read` returns the bytes of a source, and `decode` decodes them. Small collections are decoded once and kept. If
    `read` has an attribute `at_once`, that many images are read at the same time, as a server's answers take time.
    `expected` holds the sha256 of each image in hex; the bytes are compared with it before every decoding. It is None
    while no digests exist. `origin`, the dataset's name and options, allows a copy to be opened in another process.
    """

    def __init__(
        self,
        sources: Sequence[str],
        expected: Sequence[str] | None,
        read: Callable[[str], bytes],
        decode: Callable[[bytes], np.ndarray],
        transform: Transform,
        origin: tuple[str, Section] | None = None,
    ) -> None:
        self._origin = origin
        self._rotation = 0.0
        self.sources = sources
        self._expected = expected
        self.transform = transform
        self._read = read
        self._decode = decode
        self._decoded: dict[int, np.ndarray] = {}
        self._room = min(KEEP_DECODED_BYTES, available_memory() // 4)
        waiting = getattr(read, "at_once", 0)
        self._threads = ThreadPoolExecutor(waiting or cores(), "decode")
        self._per_task = 1 if waiting else AT_ONCE
        self._decoders = threading.BoundedSemaphore(cores())  # a decoded image may be large

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is None:
            raise TypeError("images without an origin cannot be opened in another process")
        return _reopen, (*self._origin, self.sources, self._expected, self.transform), {"_rotation": self._rotation}

    def __copy__(self) -> "Images":
        """The same open images. What is decoded is kept once for each copy, as a transform may decode differently."""
        other = object.__new__(Images)
        other.__dict__.update(self.__dict__, _decoded={})
        return other

    def prepared_for(self, transform: Transform) -> "Images":
        """The same images with another transform, that of a backbone."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def turned(self, rotation: float) -> "Images":
        """The same images, with augmented views also rotated by up to `rotation` degrees."""
        turned = copy.copy(self)
        turned._rotation = rotation
        return turned

    def array(self, sample: int) -> np.ndarray:
        """The decoded image of `sample`, uint8 (H, W, 3). Raises BadImage, and UserError if its bytes have changed."""
        image = self._decoded.get(sample)
        if image is None:
            image = self._load(sample)[1]
            if self._room >= image.nbytes:
                self._room -= image.nbytes
                self._decoded[sample] = image
        return image

    def digest(self, sample: int) -> str:
        """sha256 of the encoded image, in hex. Raises BadImage if the image cannot be decoded or used."""
        return hashlib.sha256(self._load(sample)[0]).hexdigest()

    def digests(self, samples: Sequence[int] | np.ndarray) -> Iterator[str | BadImage]:
        """Yields each sample's digest in order, or the error of a bad image. Reads several images at once."""

        def check(sample: int) -> str | BadImage:
            try:
                return self.digest(sample)
            except BadImage as bad:
                return bad

        for first in range(0, len(samples), 256):  # limits the memory for waiting tasks
            yield from self._threads.map(check, samples[first : first + 256])

    def _load(self, sample: int) -> tuple[bytes, np.ndarray]:
        source = self.sources[sample]
        try:
            data = self._read(source)
            self._check(sample, data)
            with self._decoders:
                image = self._decode(data)
            check_size(image, self.transform)
        except FileNotFoundError:
            raise BadImage(source, "is missing") from None
        except OSError as error:
            raise BadImage(source, f"cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise BadImage(source, str(error)) from None
        return data, image

    def _check(self, sample: int, data: bytes) -> None:
        """Raises UserError if `data` are not the bytes of `sample` that were prepared."""
        if self._expected is None:
            return
        source, expected, actual = self.sources[sample], self._expected[sample], hashlib.sha256(data).hexdigest()
        if actual != expected:
            raise UserError(
                f"image {source!r}: has changed since it was prepared: its sha256 must be {expected[:12]}; "
                f"got {actual[:12]}; restore the image or prepare again (dvc repro or h2t prepare)"
            )

    def _view(self, sample: int, key: Sequence[int | str] | None) -> np.ndarray:
        image = self.array(sample)
        if key is None:
            return for_evaluation(image, self.transform)
        return augmented(image, self.transform, self.draws(sample, key), self._rotation)

    def draws(self, sample: int, key: Sequence[int | str]) -> np.random.Generator:
        """The random stream of one view: `key` is (seed, view)."""
        seed, *view = key
        return stream(int(seed), "view", self.sources[sample], *view)

    @property
    def only_crops(self) -> bool:
        """Whether augmented views are random crops and flips, nothing else."""
        return self.transform.area is None and not self.transform.jitter and not self._rotation

    def pixels(
        self, samples: Sequence[int], keys: Sequence[Sequence[int | str] | None], into: np.ndarray | None = None
    ) -> np.ndarray:
        """The views of `samples`, uint8 (B, size, size, 3), in `into` if given; keys and errors as for `batch`."""
        shape = (len(samples), self.transform.size, self.transform.size, 3)
        views = np.empty(shape, np.uint8) if into is None else into

        def fill(piece: range) -> None:
            for i in piece:
                views[i] = self._view(samples[i], keys[i])

        pieces = range(len(samples))
        for _ in self._threads.map(fill, [pieces[i : i + self._per_task] for i in pieces[:: self._per_task]]):
            pass  # raises the errors of the threads
        return views

    def batch(self, samples: Sequence[int], keys: Sequence[Sequence[int | str] | None]) -> "torch.Tensor":
        """Normalised float32 (B, 3, size, size). The key None gives the evaluation view, (seed, view) an augmented one.

        Raises BadImage, and UserError if an image has changed.
        """
        import torch

        return normalised(torch.from_numpy(self.pixels(samples, keys)), self.transform)


def open_images(
    dataset: Any, options: Section, sources: Sequence[str], expected: Sequence[str] | None, transform: Transform
) -> Images:
    """The images of `sources`, read and decoded by the plug-in `dataset`; `expected` holds their digests, if known."""
    origin = (dataset.__name__.rpartition(".")[2], options)
    decode = getattr(dataset, "decode", None) or decoder(transform)
    return Images(sources, expected, dataset.reader(options), decode, transform, origin)


def _reopen(
    name: str, options: Section, sources: Sequence[str], expected: Sequence[str] | None, transform: Transform
) -> Images:
    return open_images(plugins.load("datasets", name), options, sources, expected, transform)

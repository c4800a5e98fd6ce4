"""Images as arrays: the evaluation transform, and augmentation from named random streams.

Arrays are uint8 (H, W, 3) until a batch is normalised. The augmentation of an image depends only on (seed, source,
view), so it does not change with the number of workers or with the other images.
"""

import copy
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from PIL import Image

from h2t.cache.memory import available_memory
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.many_streams import ManyStreams
from h2t.pipeline.base.params import Index, NonNegative, Positive, Ratio, Real, Section, Side, at_most
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.decoding import MAX_PIXELS, decode
from h2t.pipeline.data.network_input import Fit, Input, Interpolation

if TYPE_CHECKING:
    import torch  # imported where it is used: datasets state their options without it

KEEP_DECODED_BYTES = 1024**3  # decoded images kept in memory, at most a quarter of the available memory
AT_ONCE = 8  # images per task of a decoding thread: for small images, handing over a task costs more than decoding


def _rising_pair(value: list[float]) -> list[float]:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError("must be two shares above 0, the smaller one first")
    return value


def _low_and_high(value: list[float]) -> list[float]:
    if len(value) != 2 or not value[0] < value[1]:
        raise ValueError("must be two pixel values, the smaller one first")
    return value


class Transform(Section):
    """How a dataset's images become network input. Sizes are in pixels.

    Evaluation: resize the short side to `resize` (if set), then crop the centre to `size`. Augmentation: resize in the
    same way, pad each side by `padding` zeros and crop `size` at a random place; or, with `area`, crop a random share
    of the image between the two given and resize it to `size`. Then flip horizontally and jitter colours, if set.
    Finally, in both cases, scale to [0, 1], subtract `mean` and divide by `std`.
    """

    size: Side
    """Side of the network's input, in pixels."""
    resize: Side | None = None
    """Length of the short side before the crop, in pixels; null leaves the image as it is."""
    padding: Annotated[Index, at_most(16_384)] = 0
    """Zeros around the image before a random crop of training images, in pixels."""
    area: Annotated[list[Ratio], pydantic.AfterValidator(_rising_pair)] | None = None
    """Smallest and largest share of a training image in a random resized crop; null crops without resizing."""
    flip: bool = False
    """Mirror training images with probability one half."""
    jitter: Annotated[NonNegative, at_most(1000)] = 0.0
    """Strength of random brightness, contrast and saturation in training images; 0 is none."""
    mean: Annotated[list[Real], pydantic.Field(min_length=3, max_length=3)]
    """Mean of each colour channel, subtracted after scaling to [0, 1]."""
    std: Annotated[list[Positive], pydantic.Field(min_length=3, max_length=3)]
    """Standard deviation of each colour channel, which the result is divided by."""
    interpolation: Interpolation = "bilinear"
    """Filter that images are resized with."""
    fit: Fit | None = None
    """How images are brought to size, see the backbones' section `input`; null is centre with other rounding."""
    exif: Literal["apply", "ignore"] = "ignore"
    """Turn images as their EXIF orientation says, or take the pixels as they are stored."""
    range: Annotated[list[Real], pydantic.AfterValidator(_low_and_high)] | None = None
    """Pixel values of 16-bit and floating-point images that become black and white, such as [0, 4095] for 12 bits; null
    keeps the high byte of 16 bits and refuses floating point."""

    @pydantic.model_serializer(mode="wrap")
    def _without_later_defaults(self, write: Any) -> dict[str, Any]:
        """Leaves out the keys below at their defaults: records made before these keys existed stay equal."""
        values: dict[str, Any] = write(self)
        return {k: v for k, v in values.items() if k not in LATER or v != type(self).model_fields[k].default}


#: Keys of Transform that version 0.1.0 did not have.
LATER = ("interpolation", "fit", "exif", "range")


ROUNDING = 1e-6  # 224 / 0.875 must be 256, also if the share is a rounded fraction


def transform_for(dataset: Transform, stated: Input) -> Transform:
    """The transform of a backbone: the dataset's, with the keys that are `stated`.

    The dataset's augmentation (padding, area, flip, jitter) stays.
    """
    values: dict[str, Any] = stated.model_dump(exclude_none=True)
    crop = values.pop("crop", None)
    new = dataset.model_dump() | values
    if crop is not None:
        new["resize"] = int(new["size"] / crop + ROUNDING)
    if crop is not None or stated.interpolation is not None:
        new.setdefault("fit", "centre")
    return Transform.model_validate(new)


@dataclass(frozen=True)
class Collection:
    """The images of a dataset as lists of equal length, in the dataset's own order.

    `label` is the index into `classes`, in the dataset's own numbering. `split` is train, val or test. `group` names
    what an image belongs to (a patient, a camera); a group is never divided among splits. `notes` are lines for the
    user, about files that were left out, for example. `source` may be `data.texts.Texts`, which hold many images in
    less memory than a list. `read` holds the sha256 of tables and lists at URLs, by URL.
    """

    classes: list[str]
    source: Sequence[str]
    label: list[int]
    split: list[str]
    group: list[str] | None = None
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


def decoder(transform: Transform) -> Callable[[bytes], np.ndarray]:
    """`decode` with the EXIF and range settings of `transform`."""
    return partial(decode, exif=transform.exif == "apply", levels=transform.range)


def _check_size(image: np.ndarray, transform: Transform) -> None:
    """Raises ValueError if the image is too small or too narrow for the evaluation view."""
    height, width = image.shape[:2]
    if transform.resize is None and min(height, width) < transform.size:
        raise ValueError(f"{width}x{height} pixels are less than transform.size {transform.size}; set transform.resize")
    side = transform.resize or 0
    if side * side * max(height, width) > MAX_PIXELS * min(height, width):
        raise ValueError(f"{width}x{height} pixels are too long a strip to be resized")


def _resized(image: np.ndarray, transform: Transform) -> np.ndarray:
    """The image with its short side resized to `resize` pixels, or both sides to squash it, if that is set."""
    if transform.resize is None:
        return image
    picture = Image.fromarray(image)
    wanted, short = transform.resize, min(picture.size)
    if transform.fit == "squash":
        width = height = wanted
    elif transform.fit is None:
        scale = wanted / short
        width, height = (max(transform.size, round(side * scale)) for side in picture.size)
    else:  # as torchvision, timm and transformers round
        width, height = (int(wanted * side / short) for side in picture.size)
    return np.asarray(picture.resize((width, height), _filter(transform)))


def _filter(transform: Transform) -> Image.Resampling:
    return Image.Resampling[transform.interpolation.upper()]


def for_evaluation(image: np.ndarray, transform: Transform) -> np.ndarray:
    """The evaluation view (view 0), uint8 (size, size, 3)."""
    size = transform.size
    image = _resized(image, transform)
    height, width = image.shape[:2]
    if transform.fit == "centre_floor":
        top, left = (height - size) // 2, (width - size) // 2
    else:
        top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def augmented(image: np.ndarray, transform: Transform, draws: np.random.Generator, rotation: float = 0.0) -> np.ndarray:
    """One augmented view, uint8 (size, size, 3), drawn from `draws` and rotated by up to `rotation` degrees.

    As by default in torchvision, rotation takes the nearest pixel and leaves empty corners black.
    """
    size = transform.size
    if transform.area is not None:
        image = _random_resized_crop(image, transform, transform.area, draws)
        flipped = _flipped(transform, draws)
    else:
        image = padded(image, transform)
        top, left, flipped = crop_and_flip(image.shape, transform, draws)
        image = image[top : top + size, left : left + size]
    if flipped:
        image = image[:, ::-1]
    if rotation:
        image = np.asarray(Image.fromarray(image).rotate(draws.uniform(-rotation, rotation)))
    if transform.jitter:
        image = _jittered(image, transform.jitter, draws)
    return image


def padded(image: np.ndarray, transform: Transform) -> np.ndarray:
    """The image that random crops are taken from: resized, with zeros around it; uint8 (H, W, 3)."""
    pad = transform.padding
    image = _resized(image, transform)
    return np.pad(image, ((pad, pad), (pad, pad), (0, 0))) if pad else image


def crop_and_flip(
    shape: tuple[int, ...], transform: Transform, draws: np.random.Generator | ManyStreams
) -> tuple[Any, Any, Any]:
    """Top and left of a random crop of a padded image of `shape` (H, W, 3), and whether the crop is mirrored.

    Single values, or arrays (N,) from N streams at once.
    """
    top = draws.integers(shape[0] - transform.size + 1)
    left = draws.integers(shape[1] - transform.size + 1)
    return top, left, _flipped(transform, draws)


def _flipped(transform: Transform, draws: np.random.Generator | ManyStreams) -> Any:
    return transform.flip and draws.random() < 0.5


def _random_resized_crop(
    image: np.ndarray, transform: Transform, area: list[float], draws: np.random.Generator
) -> np.ndarray:
    height, width = image.shape[:2]
    for _ in range(10):
        wanted = height * width * draws.uniform(area[0], area[1])
        aspect = np.exp(draws.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(wanted * aspect)), round(np.sqrt(wanted / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(height, width)
    top, left = int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1))
    crop = Image.fromarray(image[top : top + h, left : left + w])
    return np.asarray(crop.resize((transform.size, transform.size), _filter(transform)))


def _jittered(image: np.ndarray, strength: float, draws: np.random.Generator) -> np.ndarray:
    import torch
    from torchvision.transforms.v2 import functional

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: Pillow's own array is read-only
    for change in draws.permutation(3):
        factor = draws.uniform(max(0.0, 1 - strength), 1 + strength)
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[change]
        x = adjust(x, factor)
    return x.permute(1, 2, 0).numpy()


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
        self._threads = ThreadPoolExecutor(waiting or len(os.sched_getaffinity(0)), "decode")
        self._per_task = 1 if waiting else AT_ONCE
        self._decoders = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))  # a decoded image may be large

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
            _check_size(image, self.transform)
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


def normalised(views: "torch.Tensor", transform: Transform) -> "torch.Tensor":
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) on the same device, scaled to [0, 1] and normalised."""
    import torch

    # In place, and in the final layout from the start: the same bits as out of place, in a quarter of the time.
    x = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    return x.div_(255).sub_(mean).div_(std)


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

"""Images as arrays: decoding, the evaluation transform, and augmentation from named streams.

Arrays are uint8 (H, W, 3) until a batch is normalised. The augmentation of an image depends on (seed, source, view)
alone, so neither the number of workers nor any other image changes it.
"""

import copy
import hashlib
import io
import itertools
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pydantic
import torch
from PIL import Image, UnidentifiedImageError

from h2t.cache.memory import available_memory
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Index, NonNegative, Positive, Ratio, Real, Section, Side, at_most
from h2t.pipeline.base.seeds import stream

KEEP_DECODED_BYTES = 1024**3  # of decoded images stay in memory, or a quarter of what is available
AT_ONCE = 8  # images that a thread decodes in one go: for small ones, handing them over costs more than the work
#: What is opened; MPO comes as JPEG. Pillow knows more, some by other programs: for EPS it starts Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # larger images are refused unread: Pillow's own limit against decompression bombs


def _rising_pair(value: list[float]) -> list[float]:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError("must be two rising shares above 0")
    return value


class Transform(Section):
    """How a dataset's images become network input: a float tensor (3, size, size), scaled to [0, 1], then normalised.

    Evaluation: resize the short side to `resize` (if given), centre crop to `size`. Augmentation: either a random crop
    of `size` from the image, resized likewise and padded by `padding` zeros, or, with `area`, a random resized crop of
    that share of the image; then a horizontal flip and colour jitter, if set.
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


@dataclass(frozen=True)
class Collection:
    """What a dataset plug-in finds: parallel lists over images, in the dataset's own order.

    `split` is train, val or test; `label` indexes `classes`, in the dataset's native numbering.
    """

    classes: list[str]
    source: list[str]
    label: list[int]
    split: list[str]


class BadImage(UserError):
    """An image that cannot be used, with its `source` and, in words, the `reason`."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        self.reason = reason
        super().__init__(
            f"image {source!r}: {reason}; mend or remove the file and prepare again, "
            "or leave such images out with prepare.bad_images=skip"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return BadImage, (self.source, self.reason)


def decode(data: bytes) -> np.ndarray:
    """An encoded image as uint8 (H, W, 3), by the rules of the published codes (`convert("RGB")` of Pillow).

    Grey is repeated, a palette looked up, transparency dropped, CMYK converted without colour profile, 16-bit values
    keep their high byte; of an animation the first frame counts; an EXIF orientation is not applied. Raises ValueError
    for whatever is no image, is truncated, has more than `MAX_PIXELS` pixels or has no fixed range of values.
    """
    if not data:
        raise ValueError("is empty, 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            if image.mode == "F":
                raise ValueError("has floating-point pixels, whose range is not known")
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 255
                high = np.clip(np.asarray(image), 0, 65535) >> 8
                return np.repeat(high.astype(np.uint8)[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("is in no known image format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None


def _check_size(image: np.ndarray, transform: Transform) -> None:
    """Raises ValueError for an image that the evaluation view cannot be cut from."""
    height, width = image.shape[:2]
    if transform.resize is None and min(height, width) < transform.size:
        raise ValueError(f"{width}x{height} pixels are less than transform.size {transform.size}; set transform.resize")
    side = transform.resize or 0
    if side * side * max(height, width) > MAX_PIXELS * min(height, width):
        raise ValueError(f"{width}x{height} pixels are too long a strip to be resized")


def _resized(image: np.ndarray, transform: Transform) -> np.ndarray:
    """The image with its short side at `resize`, if that is given."""
    if transform.resize is None:
        return image
    picture = Image.fromarray(image)
    scale = transform.resize / min(picture.size)
    width, height = (max(transform.size, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def for_evaluation(image: np.ndarray, transform: Transform) -> np.ndarray:
    """The evaluation view (view 0), uint8 (size, size, 3)."""
    size = transform.size
    image = _resized(image, transform)
    height, width = image.shape[:2]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def augmented(image: np.ndarray, transform: Transform, draws: np.random.Generator, rotation: float = 0.0) -> np.ndarray:
    """One augmented view, uint8 (size, size, 3), from the stream `draws`, turned by up to `rotation` degrees.

    Corners that turning lays bare are black, and pixels are those of the nearest neighbour, torchvision's defaults.
    """
    size = transform.size
    if transform.area is not None:
        image = _random_resized_crop(image, size, transform.area, draws)
    else:
        pad = transform.padding
        image = _resized(image, transform)
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0))) if pad else image
        top = int(draws.integers(image.shape[0] - size + 1))
        left = int(draws.integers(image.shape[1] - size + 1))
        image = image[top : top + size, left : left + size]
    if transform.flip and draws.random() < 0.5:
        image = image[:, ::-1]
    if rotation:
        image = np.asarray(Image.fromarray(image).rotate(draws.uniform(-rotation, rotation)))
    if transform.jitter:
        image = _jittered(image, transform.jitter, draws)
    return image


def _random_resized_crop(image: np.ndarray, size: int, area: list[float], draws: np.random.Generator) -> np.ndarray:
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
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


def _jittered(image: np.ndarray, strength: float, draws: np.random.Generator) -> np.ndarray:
    from torchvision.transforms.v2 import functional

    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # a copy: Pillow's own array is read-only
    for change in draws.permutation(3):
        factor = draws.uniform(max(0.0, 1 - strength), 1 + strength)
        adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)[change]
        x = adjust(x, factor)
    return x.permute(1, 2, 0).numpy()


class Images:
    """The images of a sample table, by sample number, as normalised batches.

    `read` gives the bytes of a source and `decoder` turns them into an array. Small collections are decoded once.
    `expected` holds the sha256 of every image in hex; bytes are compared with it each time before they are decoded.
    None is for images that nothing is known of yet. `origin`, the dataset's name and options, lets a copy be opened in
    another process.
    """

    def __init__(
        self,
        sources: Sequence[str],
        expected: Sequence[str] | None,
        read: Callable[[str], bytes],
        decoder: Callable[[bytes], np.ndarray],
        transform: Transform,
        origin: tuple[str, Section] | None = None,
    ) -> None:
        self._origin = origin
        self._rotation = 0.0
        self.sources = sources
        self._expected = expected
        self.transform = transform
        self._read = read
        self._decoder = decoder
        self._decoded: dict[int, np.ndarray] = {}
        self._room = min(KEEP_DECODED_BYTES, available_memory() // 4)
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "decode")

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is None:
            raise TypeError("images of no dataset cannot be opened in another process")
        return _reopen, (*self._origin, self.sources, self._expected, self.transform), {"_rotation": self._rotation}

    def turned(self, rotation: float) -> "Images":
        """The same images, augmented views of which are also turned by up to `rotation` degrees."""
        found = copy.copy(self)
        found._rotation = rotation
        return found

    def array(self, sample: int) -> np.ndarray:
        """The decoded image of `sample`, uint8 (H, W, 3). Raises BadImage, and UserError if its bytes have changed."""
        found = self._decoded.get(sample)
        if found is None:
            found = self._load(sample)[1]
            if self._room >= found.nbytes:
                self._room -= found.nbytes
                self._decoded[sample] = found
        return found

    def digest(self, sample: int) -> str:
        """sha256 of the encoded image. Raises BadImage unless it also decodes to an image that can be used."""
        return hashlib.sha256(self._load(sample)[0]).hexdigest()

    def digests(self, samples: Sequence[int]) -> Iterator[str | BadImage]:
        """The digest of each sample in order, or what is wrong with it; several are read at once."""

        def check(sample: int) -> str | BadImage:
            try:
                return self.digest(sample)
            except BadImage as bad:
                return bad

        for first in range(0, len(samples), 256):  # a bound on what waits in memory
            yield from self._threads.map(check, samples[first : first + 256])

    def _load(self, sample: int) -> tuple[bytes, np.ndarray]:
        source = self.sources[sample]
        try:
            data = self._read(source)
            self._check(sample, data)
            image = self._decoder(data)
            _check_size(image, self.transform)
        except FileNotFoundError:
            raise BadImage(source, "is missing") from None
        except OSError as error:
            raise BadImage(source, f"cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise BadImage(source, str(error)) from None
        return data, image

    def _check(self, sample: int, data: bytes) -> None:
        """Raises UserError unless `data` are the bytes that are expected of `sample`."""
        if self._expected is None:
            return
        source, expected, found = self.sources[sample], self._expected[sample], hashlib.sha256(data).hexdigest()
        if found != expected:
            raise UserError(
                f"image {source!r}: has changed since it was prepared, its sha256 must be {expected[:12]}; "
                f"got {found[:12]}; put the old image back, or prepare again (dvc repro or h2t prepare)"
            )

    def _view(self, sample: int, key: Sequence[int | str] | None) -> np.ndarray:
        image = self.array(sample)
        if key is None:
            return for_evaluation(image, self.transform)
        seed, *rest = key
        draws = stream(int(seed), "view", self.sources[sample], *rest)
        return augmented(image, self.transform, draws, self._rotation)

    def _views(self, wanted: Sequence[tuple[int, Sequence[int | str] | None]]) -> list[np.ndarray]:
        return [self._view(sample, key) for sample, key in wanted]

    def batch(self, samples: Sequence[int], keys: Sequence[Sequence[int | str] | None]) -> torch.Tensor:
        """Normalised float32 (B, 3, size, size). A key of None is the evaluation view, (seed, view) augmented."""
        wanted = list(zip(samples, keys, strict=True))
        pieces = [wanted[i : i + AT_ONCE] for i in range(0, len(wanted), AT_ONCE)]
        views = itertools.chain.from_iterable(self._threads.map(self._views, pieces))
        return normalised(np.stack(list(views)), self.transform)


def normalised(images: np.ndarray, transform: Transform) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), scaled to [0, 1] and normalised."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    return ((x - mean) / std).contiguous()


def open_images(
    dataset: Any, options: Section, sources: Sequence[str], expected: Sequence[str] | None, transform: Transform
) -> Images:
    """The images of `sources`, of which `expected` are the digests, as the plug-in `dataset` reads and decodes them."""
    origin = (dataset.__name__.rpartition(".")[2], options)
    return Images(sources, expected, dataset.reader(options), getattr(dataset, "decode", decode), transform, origin)


def _reopen(
    name: str, options: Section, sources: Sequence[str], expected: Sequence[str] | None, transform: Transform
) -> Images:
    return open_images(plugins.load("datasets", name), options, sources, expected, transform)

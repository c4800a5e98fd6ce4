"""Decodes image files: to uint8 (H, W, 3), or only as far as their properties need."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: Formats that are opened (MPO counts as JPEG). Pillow's others are refused; for EPS, say, it would start Ghostscript.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP")
ANIMATIONS = ("AVIF", "GIF", "PNG", "WEBP")  # formats whose frames follow each other; MPO's are views of one photo
ORIENTATION = 0x0112  # the EXIF tag
SAMPLE_FORMAT, SIGNED = 339, 2  # the tag of TIFF, and its value for signed whole numbers
MAX_PIXELS = 89_478_485  # larger images are refused before decoding; Pillow's limit against decompression bombs


def endings() -> set[str]:
    """The endings that files of `FORMATS` have, such as .jpg, in lower case."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}


def decode(data: bytes, *, exif: bool = False, levels: Sequence[float] | None = None) -> np.ndarray:
    """Decodes an image file to uint8 (H, W, 3), as the published codes do (Pillow's `convert("RGB")`).

    Grey values are repeated, palettes looked up, transparency is dropped, CMYK is converted without a colour profile,
    animations give their first frame. 16-bit grey values keep their high byte, unless `levels` gives the values that
    become black and white. With `exif` the image is turned as its EXIF orientation says. Raises ValueError for data
    that is not an image, is truncated, has more than `MAX_PIXELS` pixels or several pages, and, without
    `levels`, for floating-point pixels and whole numbers of more than 16 bits.
    """
    with _opened(data) as image:
        upright = _turned(image) if exif else image
        if upright.mode == "F" or upright.mode.startswith("I"):  # Pillow would clip these to 255
            return np.repeat(_eight_bits(_values(upright, image), levels)[..., None], 3, axis=2)
        return np.asarray(upright.convert("RGB"))


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image in `data`, not yet decoded. Raises ValueError for data that is none, also for errors in the block."""
    if not data:
        raise ValueError("is empty, 0 bytes")
    if data[128:132] == b"DICM":
        raise ValueError("is a DICOM file; convert it to a 16-bit PNG and set prepare.options.transform.range")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"has {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
            if image.format == "TIFF" and (pages := getattr(image, "n_frames", 1)) > 1:
                raise ValueError(f"is a TIFF of {pages} pages; save each page that you need as a file of its own")
            yield image
    except UnidentifiedImageError:
        raise ValueError("is in no known image format") from None
    except Image.DecompressionBombError:
        raise ValueError(f"has more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"cannot be decoded ({error})") from None


@dataclass(frozen=True, slots=True)
class Properties:
    """What an image file holds: size in pixels, Pillow's mode, whether EXIF turns it; `low` and `high`, the smallest
    and largest value where values have 16 bits or floating point and were read, else 0. `animated`: it has several
    frames, of which `decode` gives the first; False where only the beginning was read.
    """

    width: int
    height: int
    mode: str
    turned: bool
    low: float = 0.0
    high: float = 0.0
    animated: bool = False


def properties(data: bytes, *, headers: bool = False) -> Properties:
    """The properties of an image; with `headers` its pixels are not decoded. Raises ValueError like `decode`.

    JPEG files are decoded at an eighth of their size, which reads all their bytes in a fraction of the time.
    """
    with _opened(data) as image:
        width, height, mode = image.width, image.height, image.mode
        turned = _orientation(image) not in (0, 1)  # looked at first: loading a TIFF turns it, whatever is asked for
        low = high = 0.0
        animated = False
        if not headers:
            animated = image.format in ANIMATIONS and bool(getattr(image, "is_animated", False))
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
            if mode == "F" or mode.startswith("I"):
                values = _values(image, image)
                low, high = float(values.min()), float(values.max())
        return Properties(width, height, mode, turned, low, high, animated)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 0 if there is none."""
    try:
        return int(image.getexif().get(ORIENTATION, 0))
    except (OSError, SyntaxError, EOFError, struct.error, ValueError, LookupError, TypeError, AttributeError):
        return 0


def _turned(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says. Damaged EXIF data turns nothing."""
    image.load()  # errors of the pixels are not errors of EXIF
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, EOFError, struct.error, ValueError, LookupError, TypeError, AttributeError):
        return image


def _values(image: Image.Image, opened: Image.Image) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floating point, (H, W), of what was `opened` and perhaps turned.

    Raises ValueError for values that Pillow cannot hold: unsigned ones beyond 31 bits become negative in it.
    """
    values = np.asarray(image)
    unsigned = opened.format == "TIFF" and SIGNED not in getattr(opened, "tag_v2", {}).get(SAMPLE_FORMAT, ())
    if image.mode == "I" and unsigned and values.min() < 0:
        raise ValueError(f"has unsigned values beyond {2**31 - 1}; convert it to 16 bits")
    return values


def _eight_bits(values: np.ndarray, levels: Sequence[float] | None) -> np.ndarray:
    """Grey values of 16 or 32 bits, or floating point, (H, W) -> uint8 (H, W)."""
    if levels is not None:
        low, high = levels
        scaled = (values.astype(np.float64) - low) / (high - low)
        if not np.isfinite(scaled).all():
            raise ValueError("has pixels that are NaN or infinite")
        return (255 * np.clip(scaled, 0, 1)).round().astype(np.uint8)
    if values.dtype.kind == "f":
        raise ValueError("has floating-point pixels; set prepare.options.transform.range to [lowest, highest] value")
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(
            f"has values from {values.min()} to {values.max()}, not 0 to 65535; "
            "set prepare.options.transform.range to [lowest, highest] value"
        )
    return (values >> 8).astype(np.uint8)

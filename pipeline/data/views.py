"""Views: how a decoded image becomes network input, for evaluation or augmented from a named random stream.

Arrays are uint8 (H, W, 3) until a batch is normalised. Every augmented view has a stream of its own, so it does not
change with the number of workers or with the other images.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from PIL import Image

from h2t.pipeline.base.many_streams import ManyStreams
from h2t.pipeline.base.params import Index, NonNegative, Positive, Ratio, Real, Section, Side, at_most
from h2t.pipeline.data.decoding import MAX_PIXELS, decode
from h2t.pipeline.data.network_input import Fit, Input, Interpolation

if TYPE_CHECKING:
    import torch  # imported where it is used: datasets state their options without it


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


def decoder(transform: Transform) -> Callable[[bytes], np.ndarray]:
    """`decode` with the EXIF and range settings of `transform`."""
    return partial(decode, exif=transform.exif == "apply", levels=transform.range)


def check_size(image: np.ndarray, transform: Transform) -> None:
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


def normalised(
    views: "torch.Tensor", transform: Transform, layout: "torch.memory_format | None" = None
) -> "torch.Tensor":
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) on the same device, scaled to [0, 1] and normalised.

    `layout`: of the result in memory, by default contiguous.
    """
    import torch

    # In place, and in the final layout from the start: the same bits as out of place, in a quarter of the time.
    x = views.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout or torch.contiguous_format)
    mean, std = (_filled(values, x.device) for values in (transform.mean, transform.std))
    return x.div_(255).sub_(mean).div_(std)


def _filled(values: Sequence[float], device: "torch.device") -> "torch.Tensor":
    """`values` as float32 (1, C, 1, 1), made on the device: a copy from the host would wait until a GPU is idle."""
    import torch

    return torch.cat([torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=device) for value in values], 1)

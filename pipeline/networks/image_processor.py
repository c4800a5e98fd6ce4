"""What an image processor of Hugging Face does, as an input of a network, and the proof that both do the same.

A processor may do more than resize, crop and normalise: change the order of the colours, pad, cut into patches. So the
stated input and the processor are both run on two pictures.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pydantic
import torch
from PIL import Image

from h2t.pipeline.data.network_input import Fit, Input, Interpolation, unlike_ours
from h2t.pipeline.data.views import Transform, for_evaluation, normalised, transform_for

#: Pillow's numbers 0 to 5.
FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
LEVIT = 224 / 256  # share that the crop of LeViT keeps; its processor states it in its code alone
SHAPES = ((400, 560), (860, 700))  # height and width of the pictures, in pixels
MEAN_DIFFERENCE = 0.5 / 255  # of the value range; resizing without rounding to 256 levels differs by half of it


def of_processor(processor: Any, side: int) -> Input:
    """The input that does what `processor` does; `side`: in pixels, where it states none.

    Raises UserError if there is no such input.
    """
    name = type(processor).__name__
    pictures = [_picture(*shape) for shape in SHAPES]
    try:
        expected = [_processed(processor, picture) for picture in pictures]
    except Exception as error:  # noqa: BLE001 - of any kind; some want boxes, text or an external program
        raise unlike_ours(name, f"it cannot process an image alone ({type(error).__name__})") from None
    if expected[0].dim() != 3 or len(expected[0]) != 3:
        raise unlike_ours(name, f"they become an array {tuple(expected[0].shape)}")
    nearest = f"by its shape {tuple(expected[0].shape)}"
    for stated in _candidates(processor, side):
        found = [_ours(picture, stated) for picture in pictures]
        if all(a.shape == b.shape for a, b in zip(found, expected, strict=True)):
            scale = torch.tensor(stated.std)[:, None, None]
            off = max(float(((a - b) * scale).abs().mean()) for a, b in zip(found, expected, strict=True))
            if off <= MEAN_DIFFERENCE:
                return stated
            nearest = f"by {off:.0%} of the value range"
    raise unlike_ours(name, f"the nearest input differs {nearest}")


def _candidates(processor: Any, side: int) -> Iterator[Input]:
    """What the processor states; then with the mean and standard deviation that it has, as with the crop of LeViT.

    Crops of an odd rest are rounded down by most processors, by some of transformers 4 to the nearest pixel.
    """
    centres: tuple[Fit, ...] = ("centre_floor", "centre")
    for share, centre, measured in product((1.0, LEVIT), centres, (False, True)):
        try:
            yield _stated(processor, side, share, centre, measured)
        except (pydantic.ValidationError, ZeroDivisionError):  # a crop above 1, for example
            continue


def _stated(processor: Any, side: int, share: float, centre: Fit, measured: bool) -> Input:
    def sizes(name: str) -> dict[str, int]:
        given: Any = getattr(processor, name, None) or {}
        found = {key: getattr(given, key, None) or dict(given).get(key) for key in ("height", "shortest_edge")}
        return {key: int(value) for key, value in found.items() if value is not None}

    resize, crop = sizes("size"), sizes("crop_size")
    resample = getattr(processor, "resample", None)
    filter_number = 3 if resample is None else int(getattr(resample, "value", resample))
    short, height = resize.get("shortest_edge"), resize.get("height", side)
    fit: Fit
    share_kept = getattr(processor, "crop_pct", None)
    if short is not None and (share_kept or (short >= 384 and hasattr(processor, "crop_pct"))):
        final, kept = short, float(share_kept or 1) if short < 384 else 1.0  # ConvNeXT: the size is that of the crop
        fit = centre if short < 384 else "squash"
    elif getattr(processor, "do_center_crop", False) and crop:
        final = crop.get("height", side)
        kept, fit = final / (short or height), centre if short else "squash"
    else:
        final, kept, fit = short or height, 1.0, centre if short else "squash"
    mean, std = _levels(processor) if measured else _normal(processor)
    return Input(size=final, mean=mean, std=std, interpolation=FILTERS[filter_number], crop=kept * share, fit=fit)


def _normal(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation as the processor states them."""
    values = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    mean, std = (list(map(float, v)) if isinstance(v, list | tuple) else None for v in values)
    if not getattr(processor, "do_normalize", True) or mean is None or std is None:
        return [0.0] * 3, [1.0] * 3
    return mean, std


def _levels(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that follow from what becomes of black and white, to six digits."""
    shape = (*SHAPES[0], 3)
    black, white = (
        _processed(processor, np.full(shape, level, np.uint8)).flatten(1).median(1).values for level in (0, 255)
    )
    std = [float(f"{1 / v:.6g}") for v in (white - black).tolist()]
    return [float(f"{-b * s:.6g}") + 0.0 for b, s in zip(black.tolist(), std, strict=True)], std


def _processed(processor: Any, picture: np.ndarray) -> torch.Tensor:
    """What the network would get for a picture, uint8 (H, W, 3), mostly float32 (3, S, S)."""
    values = processor(images=Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    return torch.as_tensor(np.asarray(values[0])).float()


def _ours(picture: np.ndarray, stated: Input) -> torch.Tensor:
    """The same by our own transform, float32 (3, S, S)."""
    transform = transform_for(Transform(size=1, mean=[0.0] * 3, std=[1.0] * 3), stated)
    return normalised(torch.from_numpy(for_evaluation(picture, transform)[None].copy()), transform)[0]


def _picture(height: int, width: int) -> np.ndarray:
    """A picture whose places, colours and scales can be told apart: waves, others in each channel."""
    y, x = np.mgrid[:height, :width] / 100
    waves = [
        np.sin(2 * x + y + c) + 0.7 * np.sin((7 + 2 * c) * x) * np.cos((5 + c) * y + c) + 0.3 * np.sin(150 * x + 99 * y)
        for c in range(3)
    ]
    ramp = [0.3 * c + y / y.max() * 0.5 - x / x.max() * 0.3 for c in range(3)]
    values = np.stack([w + r for w, r in zip(waves, ramp, strict=True)], 2)
    low, high = values.min(), values.max()
    return np.asarray((values - low) / (high - low) * 255, np.uint8)

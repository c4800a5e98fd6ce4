"""Turns what a network gives last (maps or token sequences) into the maps (B, C, H, W) that are cached.

Networks give NCHW maps, NHWC maps, or tokens (B, T, C): first the prefix tokens (class token, registers), then the
patches, row by row.
"""

import math
from typing import Literal

import torch

from h2t.pipeline.base.errors import UserError

Features = Literal["map", "tokens", "cls"]


def as_maps(
    values: torch.Tensor, channels: int, image: tuple[int, int], prefix: int | None, features: Features
) -> torch.Tensor:
    """The chosen features of a batch: `map` (B, C, H, W), `tokens` (B, C, T, 1), prefix first, or `cls` (B, C, 1, 1).

    `values`: NCHW, NHWC or tokens. `image`: height and width of the images. `prefix`: number of prefix tokens; None if
    it is unknown. Raises UserError if the network has no such features.
    """
    if values.dim() == 4:
        maps = values if values.shape[1] == channels else values.permute(0, 3, 1, 2)
        if maps.shape[1] != channels:
            raise UserError(f"maps: one axis must have {channels} channels; got {tuple(values.shape)}")
        if features == "cls":
            raise _no_class_token()
        return maps.flatten(2).unsqueeze(-1) if features == "tokens" else maps
    if values.dim() != 3 or values.shape[2] != channels:
        raise UserError(
            f"features: must be maps or tokens of {channels} channels; got shape {tuple(values.shape)}; "
            "choose another network"
        )
    tokens = values.mT  # (B, C, T)
    count = tokens.shape[2]
    if prefix is None:
        prefix = next((p for p in range(count) if grid(count - p, image) is not None), None)
    if features == "tokens":
        return tokens.unsqueeze(-1)
    if features == "cls":
        if not prefix:
            raise _no_class_token()
        return tokens[:, :, :1, None]
    shape = grid(count - prefix, image) if prefix is not None else None
    if shape is None or prefix is None:
        raise UserError(
            f"options.features: {count} tokens of images of {image[0]} x {image[1]} pixels are no grid of patches; "
            "use tokens"
        )
    return tokens[:, :, prefix:].unflatten(2, shape)


def grid(patches: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of a grid of so many `patches` with the proportions of the image, or None."""
    height, width = image
    rows = round(math.sqrt(patches * height / width))
    if rows < 1 or patches % rows:
        return None
    columns = patches // rows
    # Both counts are the side over the patch size, rounded in one direction, so each is off by less than one patch.
    return (rows, columns) if abs(rows * width - columns * height) < max(height, width) else None


def _no_class_token() -> UserError:
    return UserError("options.features: cls needs a network with a class token, and this one has none; use map")

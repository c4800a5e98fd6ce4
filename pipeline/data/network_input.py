"""What a network takes as its input, which belongs to the backbone and not to the dataset."""

from typing import Annotated, Any, Literal

import pydantic

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Positive, Ratio, Real, Section, Side, above

Colours = Annotated[list[Real], pydantic.Field(min_length=3, max_length=3)]
PositiveColours = Annotated[list[Positive], pydantic.Field(min_length=3, max_length=3)]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Fit = Literal["centre", "centre_floor", "squash"]


class Input(Section):
    """Section `backbones.NAME.input`. A key that is left out is that of the network's own configuration.

    A network that states no input has the dataset's transform, in which these keys replace `size`, `mean` and `std`.
    """

    size: Side | None = None
    """Side of the network's input, in pixels."""
    mean: Colours | None = None
    """Mean of each colour channel, subtracted after scaling to [0, 1]."""
    std: PositiveColours | None = None
    """Standard deviation of each colour channel, which the result is divided by."""
    interpolation: Interpolation | None = None
    """Filter of resizing, always with antialias, as Pillow does it."""
    crop: Annotated[Ratio, above(0)] | None = None
    """Share of the resized image's short side that the centre crop keeps: 0.875 of 256 pixels is 224."""
    fit: Fit | None = None
    """`centre` resizes the short side and crops (`centre_floor`: odd margins down); `squash` resizes both sides."""


def chosen(stated: Input, given: Input) -> Input:
    """The input that a network `stated`, in which the keys that are `given` replace others."""
    return stated.model_copy(update=given.model_dump(exclude_none=True))


def of_network(plugin: Any, options: Section, given: Input) -> Input:
    """The input of the plug-in's network, in which the keys that are `given` replace others.

    Nothing is asked of a network that states none, or if all keys are given. Raises UserError for a network that wants
    its images prepared in another way (`unlike_ours`).
    """
    if not hasattr(plugin, "input") or len(given.model_dump(exclude_none=True)) == len(Input.model_fields):
        return given
    return chosen(plugin.input(options), given)


def unlike_ours(model: str, way: str) -> UserError:
    """The refusal of an input that cannot be stated here. `way`: how the images of `model` are prepared."""
    return UserError(
        f"options.model: images of {model} are prepared in a way that h2t has not: {way}; state all of size, mean, "
        "std, interpolation, crop and fit in backbones.NAME.input, or choose another network"
    )

"""The default transforms of the datasets: those of the published codes (LDAM-DRW, MiSLAS, GCL, RIDE, H2T), and OWN."""

from collections.abc import Mapping
from typing import Any

import pydantic

from h2t.pipeline.base.params import Section
from h2t.pipeline.data.images import Transform

#: For CIFAR-10 and CIFAR-100.
CIFAR = Transform(size=32, padding=4, flip=True, mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])

#: For ImageNet-LT and Places-LT, with the colour jitter of MiSLAS.
IMAGENET = Transform(
    size=224,
    resize=256,
    area=[0.08, 1.0],
    flip=True,
    jitter=0.4,
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)

#: For iNaturalist 2018: the same with the mean and standard deviation of its own images.
INATURALIST = IMAGENET.model_copy(update={"mean": [0.466, 0.471, 0.380], "std": [0.195, 0.194, 0.192]})

#: For images of one's own: as for ImageNet, and photos are turned as their EXIF orientation says.
OWN = IMAGENET.model_copy(update={"exif": "apply"})


def transform(options: Any) -> Transform:
    """The transform in the options of a dataset: its default, unless the user gave another."""
    stated: Transform = options.transform
    return stated


class OwnImages(Section):
    """Options of datasets for images of one's own. Keys that `transform` leaves out have the dataset's defaults."""

    transform: Transform = OWN
    """Size, augmentation and normalisation; a key that is left out has its value of the default."""

    @pydantic.field_validator("transform", mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        default = cls.model_fields["transform"].default
        return {**default.model_dump(), **given} if isinstance(given, Mapping) else given

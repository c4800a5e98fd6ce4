"""iNaturalist 2018: 437,513 training images in 8,142 species (1,000 to 2 each), 24,426 for testing; by list files.

Source: Van Horn et al., "The iNaturalist Species Classification and Detection Dataset", CVPR 2018. The lists have lines
such as `train_val2018/Aves/2761/<id>.jpg 2761`. As in the literature, the published validation list (3 images per
species) is the test set.
"""

from h2t.pipeline.data import list_files
from h2t.pipeline.data.images import Transform
from h2t.pipeline.data.list_files import inputs, load, reader
from h2t.pipeline.data.transforms import INATURALIST, transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "inputs", "load", "reader", "transform"]


class Options(list_files.Options):
    """No validation list is published; `prepare.validation_per_class` can hold out training images instead."""

    train: str = "iNaturalist18_train.txt"
    test: str | None = "iNaturalist18_val.txt"
    transform: Transform = INATURALIST

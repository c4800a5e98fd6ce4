"""List files of one's own: an image per line, `relative/path label`; labels are words or whole numbers.

The ImageNet-LT, Places-LT and iNaturalist plug-ins read the same files with whole-number labels from 0 on. A file with
commas, quotes or a header is a `table`.
"""

from h2t.pipeline.data import labels, list_files
from h2t.pipeline.data.images import Collection, Transform
from h2t.pipeline.data.list_files import inputs, reader
from h2t.pipeline.data.transforms import OWN, OwnImages, transform

NUMBER = 2026112601  # other results, another number: docs/numbers.md

__all__ = ["Options", "inputs", "load", "reader", "transform"]


class Options(OwnImages, list_files.Options):
    transform: Transform = OWN


def load(options: Options) -> Collection:
    """All images of the lists, in their order. Raises UserError that names the file and the line."""
    source, text, split, read = list_files.read_lists(options)
    classes, label = labels.numbered(text)
    return Collection(classes, source, label, split, read=read)

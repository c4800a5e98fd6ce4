"""Dataset plug-ins. A file defines:

class Options(Section)                      its keys under prepare.options
def transform(options) -> Transform         image size, augmentation, normalisation
def load(options) -> Collection             every image: source, label, split
def inputs(options) -> {option: path}       the files and folders that load and reader read, for DVC to watch; left out
                                            where there are none, or where published digests fix their content
def reader(options) -> (source -> bytes)    the bytes of one image; their sha256 is the row's digest
def decode(bytes) -> uint8 (H, W, 3)        only where the bytes are no image file
"""

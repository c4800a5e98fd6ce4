"""Dataset plug-ins. Each file defines:

class Options(Section)                      the keys under prepare.options
def transform(options) -> Transform         image size, augmentation, normalisation
def load(options) -> Collection             all images: source, label, split
def inputs(options) -> {option: path}       optional: the files and folders that load and reader read, for DVC to watch;
                                            not needed if published digests fix their content
def reader(options) -> (source -> bytes)    the bytes of one image; their sha256 is the sample's digest
def decode(bytes) -> uint8 (H, W, 3)        optional: only if the bytes are not an image file
"""

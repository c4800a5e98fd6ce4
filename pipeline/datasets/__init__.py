"""Dataset plug-ins. A file defines:

class Options(Section)                      its keys under prepare.options
def transform(options) -> Transform         image size, augmentation, normalisation
def load(options) -> Collection             every image: source, label, split
def reader(options) -> (source -> bytes)    the bytes of one image; their sha256 is the row's digest
def decode(bytes) -> uint8 (H, W, 3)        only where the bytes are no image file
"""

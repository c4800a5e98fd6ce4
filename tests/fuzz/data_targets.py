"""Targets among the data that people bring: list files and images."""

import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz import mutation
from fuzz.oracle import Finding
from fuzz.target import Parse, Target
from image_builders import encoded
from PIL import Image

from h2t.pipeline.base.params import build
from h2t.pipeline.data import decoding
from h2t.pipeline.data.images import BadImage
from h2t.pipeline.datasets import imagenet_lt

# List files: flags, uint8 (follow links), then the lists of train, val and test, apart by \0.

LISTED = ["train/a/1.png 0", "train/a/2.png 0", "train/b/1.png 1", "val/a/1.png 0", "val/b/x y.png 1"]
HOSTILE = ["../secret.png 0", "/etc/passwd 0", "link.png 0", "out/secret.png 1", "train/a/1.png -1", "a 1.5",
           "a 99999999999999999999",
           "a 4000000000", "a", " 0", "a\u20030", "a ٣", "~root/x 0", "a\\b 0", "a\x0bb 0", "a\x85b 0",
           "x" * 300 + " 0", "a/" * 60 + "b 0",
           "a " + "9" * 400, "train/a/1.png 0 0", "train/./a/1.png 0", "train//a/1.png 0", "pipe 0", "train 0",
           "é.png 0"]  # fmt: skip


def _list_seeds() -> list[bytes]:
    train, rest = "\n".join(LISTED[:3]), "\n".join(LISTED[3:])
    return [f"\0{train}".encode(), f"\0{train}\0\0{rest}".encode(), f"\1{train}\r\n\0{rest}\n".encode()]


def _mutated_list(data: bytes, random: Random) -> bytes:
    text = data[1:].decode()
    flag = data[:1] if random.random() < 0.9 else bytes([random.randrange(4)])
    return flag + mutation.lines(text, random, [*LISTED, *HOSTILE], random.choice(["\n", "\n", "\0", " "])).encode(
        "utf-8", errors="surrogatepass"
    )


def _open_lists(folder: Path) -> Parse:
    root = folder / "images"
    for line in LISTED:
        path = root / line.rpartition(" ")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.png").write_bytes(b"secret")
    (folder / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(folder / "secret.png")
    (root / "out").symlink_to(folder / "outside")

    def parse(data: bytes) -> object:
        flags, lists = data[0] if data else 0, data[1:].split(b"\0")[:3]
        given: dict[str, Any] = {"root": str(root), "lists": str(folder), "test": None, "follow_links": bool(flags & 1)}
        for name, content in zip(("train", "val", "test"), lists, strict=False):
            (folder / f"{name}.txt").write_bytes(content)
            given[name] = f"{name}.txt"
        options = build(imagenet_lt.Options, "prepare.options", given)
        found = imagenet_lt.load(options)
        if not 0 <= min(found.label) <= max(found.label) < len(found.classes) <= len(found.source):
            raise Finding(f"labels {min(found.label)} to {max(found.label)} of {len(found.classes)} classes")
        read = imagenet_lt.reader(options)
        for source in found.source[:4]:
            try:
                content = read(source)
            except OSError:  # becomes a bad image
                continue
            if content == b"secret" and not options.follow_links:
                raise Finding(f"read outside of the root by {source!r}")
        return found

    return parse


# Images.


def _image_seeds() -> list[bytes]:
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
    picture = Image.fromarray(pixels)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        grey = Image.fromarray(pixels[..., 0].astype("<u2") * 9)
        found.append(encoded(grey if mode == "I;16" else picture.convert(mode), "PNG"))
    for kind, extra in (("JPEG", {}), ("JPEG", {"progressive": True}), ("GIF", {}), ("BMP", {}), ("WEBP", {}), ("PPM",
    {}),
                        ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {}), ("EPS", {}), ("TGA", {}), ("ICO",
                        {})):  # fmt: skip
        found.append(encoded(picture, kind, **extra))
    return [*found, encoded(picture.convert("CMYK"), "JPEG")]


def _open_image(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's of odd files; the outcome is what counts
            try:
                found = decoding.decode(data)
            except ValueError as error:
                raise BadImage("x.png", str(error)) from None
        if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or found.size > 3 * decoding.MAX_PIXELS:
            raise Finding(f"no image: {found.dtype} {found.shape}")
        return found

    return parse


TARGETS = [
    Target(
        "lists", "pipeline/data/list_files.py: load", _open_lists, _list_seeds, mutation.mostly(_mutated_list), 8192
    ),
    Target("image", "pipeline/data/decoding.py: decode", _open_image, _image_seeds, mutation.raw, 4096),
]

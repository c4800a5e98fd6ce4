"""Small image files in the folder layouts of the published data sets."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from h2t.pipeline.data.splits import Labelled
from h2t.pipeline.data.texts import Texts

SMALL = {
    "size": 32,
    "resize": 36,
    "area": [0.08, 1.0],
    "flip": True,
    "jitter": 0.4,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


def write_image(path: Path, seed: int = 0, size=(40, 48), **save) -> Path:
    """Smooth random colours, so that JPEG keeps what tells images apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    Image.fromarray(colours).resize(size, Image.Resampling.BILINEAR).save(path, **save)
    return path


def encoded(image: Image.Image, kind: str = "JPEG", **save) -> bytes:
    """The bytes of a file of this kind, such as PNG."""
    out = io.BytesIO()
    image.save(out, kind, **save)
    return out.getvalue()


def labelled(label: np.ndarray) -> Labelled:
    """Training images with these labels, of classes that are named by their numbers."""
    classes = [str(j) for j in range(label.max() + 1)]
    return Labelled(classes, Texts.of([]), label, np.full(len(label), "train", object))


def write_list(path: Path, entries) -> Path:
    path.write_text("".join(f"{source} {label}\n" for source, label in entries), encoding="utf-8")
    return path


def make_tree(root: Path, paths: dict[str, int]) -> list[tuple[str, int]]:
    """Writes an image for every path; returns the lines of a list file."""
    for number, path in enumerate(paths):
        write_image(root / path, number)
    return list(paths.items())


def make_imagenet_lt(root: Path, counts=(3, 6, 2), test=2, val=1) -> dict:
    """A miniature ImageNet-LT; returns the dataset's options."""
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361"][: len(counts)]
    train = {f"train/{w}/{w}_{i}.JPEG": j for j, w in enumerate(wnids) for i in range(counts[j])}
    held = {f"train/{w}/{w}_9{i}.JPEG": j for j, w in enumerate(wnids) for i in range(val)}
    tests = {f"val/{w}/ILSVRC2012_val_{j}{i:07d}.JPEG": j for j, w in enumerate(wnids) for i in range(test)}
    write_list(root / "ImageNet_LT_train.txt", make_tree(root, train))
    write_list(root / "ImageNet_LT_test.txt", make_tree(root, tests))
    write_list(root / "ImageNet_LT_val.txt", make_tree(root, held))
    return {"root": str(root), "val": "ImageNet_LT_val.txt", "transform": SMALL}


def make_places_lt(root: Path, style: str) -> dict:
    """A miniature Places-LT in the style of MiSLAS (`data_256`) or of classifier-balancing (`train`)."""
    if style == "data_256":
        folders = ["data_256/a/airfield", "data_256/b/bow_window/indoor"]
        tests = {f"val_256/Places365_val_0000000{i}.jpg": i % 2 for i in range(4)}
    else:
        folders = ["train/airfield", "train/bow_window-indoor"]
        tests = {f"val/{f.split('/')[1]}/Places365_val_{i}.jpg": j for j, f in enumerate(folders) for i in range(2)}
    train = {f"{f}/0000000{i}.jpg": j for j, f in enumerate(folders) for i in range(4 - j)}
    write_list(root / "Places_LT_train.txt", make_tree(root, train))
    write_list(root / "Places_LT_test.txt", make_tree(root, tests))
    return {"root": str(root), "transform": SMALL}


def make_inaturalist18(root: Path) -> dict:
    train = {f"train_val2018/{k}/{j}/{i}a{j}.jpg": j for j, k in enumerate(["Aves", "Fungi"]) for i in range(3 + j)}
    tests = {f"train_val2018/{k}/{j}/{i}b{j}.jpg": j for j, k in enumerate(["Aves", "Fungi"]) for i in range(3)}
    write_list(root / "iNaturalist18_train.txt", make_tree(root, train))
    write_list(root / "iNaturalist18_val.txt", make_tree(root, tests))
    return {"root": str(root), "transform": SMALL}


def make_image_folder(root: Path) -> dict:
    paths = [f"train/{c}/{i}.png" for c, n in (("cat", 2), ("dog", 4)) for i in range(n)]
    make_tree(root, dict.fromkeys([*paths, "train/dog/more/deep.jpg", "test/cat/t.webp", "test/dog/t.bmp"], 0))
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.hidden").mkdir(exist_ok=True)
    return {"root": str(root), "test": "test", "transform": SMALL}

"""Six collections of one's own images, and the way from each to a classifier, outside of the repository.

    python tests/own_data.py [NAME ...] [--at FOLDER] [--epochs N]

Builds the wheel, installs it into a new environment and, for each collection, types: h2t init, dvc repro, h2t export,
h2t predict. Compares the images in the result with those in the collection. Prints a line for each collection: seconds
by the clock and of the processor, lines typed.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from image_builders import encoded
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE = 40
COUNTS = {"Rotkehlchen": 60, "tit, great": 30, "wren": 16, "owl": 9, "kōkako": 5}


def picture(kind: int, seed: int) -> Image.Image:
    """A striped picture whose colour and stripes tell its class, with noise."""
    draws = np.random.default_rng([kind, seed])
    stripes = np.sin(np.arange(SIDE) * (0.3 + 0.25 * kind) + draws.uniform(0, 6))
    base = 128 + 60 * np.stack([stripes * np.cos(kind), stripes * np.sin(kind), stripes], -1)
    pixels = base[:, None, :] + draws.normal(0, 25, (SIDE, SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def sort(root: Path, counts: dict[str, int]) -> int:
    """A folder for each class; returns the number of images."""
    for kind, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03}.jpg").write_bytes(encoded(picture(kind, i)))
    return sum(counts.values())


def rows(counts: dict[str, int]) -> list[tuple[str, str, Image.Image]]:
    """(file name, class, picture) of a flat collection, classes mixed."""
    made = [(n, name, picture(kind, n)) for kind, (name, c) in enumerate(counts.items()) for n in range(c)]
    order = np.random.default_rng(0).permutation(len(made))
    return [(f"IMG_{i:04}.JPG", made[j][1], made[j][2]) for i, j in enumerate(order)]


def write_table(path: Path, lines: list[list[str]], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", **more) as file:  # type: ignore[call-overload]
        csv.writer(file).writerows(lines)


def skewed(root: Path) -> int:
    return sort(root, COUNTS)


def metadata(root: Path) -> int:
    flat = rows(COUNTS)
    write_table(root / "metadata.csv", [["file_name", "species"], *([f, c] for f, c, _ in flat)])
    for name, _, image in flat:
        (root / name).write_bytes(encoded(image))
    return len(flat)


def sites(root: Path) -> int:
    """As a spreadsheet saves it: a byte order mark, semicolons, CRLF; five images from each of 24 cameras."""
    flat = rows(COUNTS)
    lines = [["Image", "Label", "Site"], *([f"img\\{f}", c, f"S{i // 5:02}"] for i, (f, c, _) in enumerate(flat))]
    text = "\r\n".join(";".join(f'"{v}"' if "," in v else v for v in line) for line in lines)
    (root / "img").mkdir(parents=True)
    (root / "observations.csv").write_text(text, encoding="utf-8-sig", newline="")
    for name, _, image in flat:
        (root / "img" / name).write_bytes(encoded(image))
    return len(flat)


def parquet(root: Path) -> int:
    flat = rows(COUNTS)
    (root / "data").mkdir(parents=True)
    for name, part in (
        ("train-00000-of-00002", flat[:60]),
        ("train-00001-of-00002", flat[60:100]),
        ("test-00000-of-00001", flat[100:]),
    ):
        images = [{"bytes": encoded(image), "path": f} for f, _, image in part]
        pq.write_table(pa.table({"image": images, "label": [c for _, c, _ in part]}), root / "data" / f"{name}.parquet")
    return len(flat)


def rare(root: Path) -> int:
    return sort(root, {**COUNTS, "dodo": 1, "moa": 1, "kea": 2})


def messy(root: Path) -> int:
    """Returns the images that can be used: copies, an unreadable file and a text beside them are none."""
    count = sort(root, COUNTS)
    owl, wren = root / "owl", root / "wren"
    (owl / "000 (1).jpg").write_bytes((owl / "000.jpg").read_bytes())  # a copy
    (wren / "also.jpg").write_bytes((owl / "001.jpg").read_bytes())  # under two labels: both go
    (owl / "broken.jpg").write_bytes((owl / "002.jpg").read_bytes()[:-300])
    (owl / "empty.png").write_bytes(b"")
    (owl / "notes.txt").write_text("no image")
    turned = Image.Exif()
    turned[0x0112] = 6
    (wren / "turned.jpg").write_bytes(encoded(picture(2, 900), exif=turned))
    (wren / "press.jpg").write_bytes(encoded(picture(2, 901).convert("CMYK")))
    (wren / "été 東京.png").write_bytes(encoded(picture(2, 902), "PNG"))
    deep = np.asarray(picture(2, 903).convert("L")).astype(np.uint16) * 16
    (wren / "twelve bits.png").write_bytes(encoded(Image.fromarray(deep), "PNG"))
    Path(os.fsdecode(os.fsencode(wren) + b"/caf\xe9.jpg")).write_bytes(encoded(picture(2, 904)))
    return count + 5 - 1


#: Name -> (maker, which returns the number of usable images; what is typed after the first `h2t init` was refused).
COLLECTIONS: dict[str, tuple[Callable[[Path], int], list[str]]] = {
    "skewed": (skewed, []),
    "metadata": (metadata, []),
    "sites": (sites, []),
    "parquet": (parquet, []),
    "rare": (rare, []),
    "messy": (messy, ["mv ../messy.images/wren/caf*.jpg ../messy.images/wren/cafe.jpg"]),
}
#: What `h2t predict` is given in the folder of the images, where that is not the folder itself.
PREDICTED = {"metadata": "/metadata.csv", "sites": "/observations.csv", "parquet": "/data/*.parquet"}
READABLE = {"messy": 3}  # images more than the usable ones that can be classified: a copy, and two under two labels


def environment(folder: Path) -> Path:
    """A new environment with the wheel of this tree; returns its folder of programs."""
    wheels, venv = folder / "wheels", folder / "venv"
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "-w", wheels, ROOT], check=True)
    wheel = next(wheels.glob("h2t-*.whl"))
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin/pip", "install", "--quiet", f"{wheel}[pipeline]"], check=True)
    return venv / "bin"


def walk(name: str, folder: Path, programs: Path, epochs: int | None) -> dict[str, object]:
    """Makes a collection and types the commands; returns what it took. Raises SystemExit if one fails."""
    make, mended = COLLECTIONS[name]
    images, project = folder / f"{name}.images", folder / f"{name}.project"
    usable = make(images)
    project.mkdir()
    init = f"h2t init --data {images}"
    typed = [
        *([f"! {init}", *mended] if mended else []),
        init,
        *([f"sed -i 's/epochs: 60/epochs: {epochs}/; s/passes: [0-9]*/passes: 2/' params.yaml"] if epochs else []),
        "dvc repro",
        "h2t export data/train_classifier/dr data/extract/resnet20 data/train_backbone/resnet20 model \\\n"
        "  --ratio 0.3 --seed 0",
        f"h2t predict model {images}{PREDICTED.get(name, '')} --out classes.csv",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"PATH": f"{programs}{os.pathsep}{env['PATH']}", "DVC_NO_ANALYTICS": "true"}
    log, seconds, cpu = folder / f"{name}.log", {}, {}
    for line in typed:
        started, used = time.monotonic(), _cpu_of_children()
        with log.open("a", encoding="utf-8") as out:
            out.write(f"$ {line}\n")
            out.flush()
            done = subprocess.run(["bash", "-c", line], cwd=project, env=env, stdout=out, stderr=out)
        command = " ".join(line.split()[:2])
        seconds[command] = round(time.monotonic() - started, 1)
        cpu[command] = round(_cpu_of_children() - used, 1)
        bad_images_left = name == "messy" and line.startswith("h2t predict")  # exit 1 says that some were skipped
        if done.returncode and not bad_images_left:
            sys.exit("\n".join([*log.read_text(encoding="utf-8").splitlines()[-20:], f"failed: {name}: {line}"]))
    samples = pq.read_table(project / "data/prepare/samples.parquet")
    if samples.num_rows != usable:
        sys.exit(f"{name}: {samples.num_rows} samples of {usable} usable images; see {log}")
    with (project / "classes.csv").open(encoding="utf-8") as file:
        classified = sum(1 for _ in csv.DictReader(file))
    if classified != usable + READABLE.get(name, 0):
        sys.exit(f"{name}: {classified} predictions for {usable} usable images; see {log}")
    for made in ("data/report/index.html", "data/report/results.md", "model/model.safetensors", "model/README.md"):
        if not (project / made).is_file():
            sys.exit(f"{name}: no {made}; see {log}")
    lines = [line for line in (project / "params.yaml").read_text(encoding="utf-8").splitlines() if line.strip()]
    return {"name": name, "images": usable, "typed": len(typed), "params": len(lines), "seconds": seconds, "cpu": cpu}


def _cpu_of_children() -> float:
    """Processor seconds of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COLLECTIONS)}; by default all")
    parser.add_argument("--at", type=Path, help="a folder that is kept; by default a temporary one")
    parser.add_argument("--epochs", type=int, help="of the backbone, for a quick walk; and two batch-norm passes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="own-data-") as temporary:
        folder = (given.at or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        programs = folder / "venv/bin"
        programs = programs if programs.is_dir() else environment(folder)
        for name in given.names or COLLECTIONS:
            sys.stdout.write(f"{json.dumps(walk(name, folder, programs, given.epochs))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Types the blocks of docs/tutorial.md in an empty folder: `python tests/tutorial.py` writes their output and pictures.

Shell blocks are typed in bash, one after the other, Python blocks are run in the folder where the shell is. The output
of a block is the `text` block after it.
"""

import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
from PIL import Image
from printed import ROOT

PAGE = ROOT / "docs" / "tutorial.md"
PHOTOS, ACCURACY = (ROOT / "docs" / "images" / name for name in ("tutorial-photos.png", "tutorial-accuracy.svg"))
BLOCK = re.compile(r"^```(sh|python|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SHOWN, SIDE, STEP, BAR = (
    8,
    32,
    36,
    220,
)  # images of a class in the picture; pixels of one, with its gap, of the longest bar


def typed(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(code, what it printed) of each block, in order. Raises CalledProcessError for a block that fails."""
    here, file = folder, folder / ".block.py"
    for language, code in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if language == "text":
            continue
        place = folder / ".here"
        file.write_text(code)
        program = ["bash", "-ec", f"{code}\npwd > {place}"] if language == "sh" else [sys.executable, file]
        done = subprocess.run(program, cwd=here, env=dict(environment), capture_output=True, text=True, timeout=1800)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, code, done.stdout, done.stderr)
        here = Path(place.read_text().strip()) if language == "sh" else here
        yield code, done.stdout.replace(str(folder.resolve()), "~").replace(str(folder), "~")


def printed(page: str) -> dict[str, str]:
    """The outputs that the page shows: code -> text."""
    blocks = BLOCK.findall(page)
    return {code: text for (_, code), (kind, text) in itertools.pairwise(blocks) if kind == "text"}


def with_outputs(page: str, outputs: Mapping[str, str]) -> str:
    """The page with the outputs of its blocks."""
    code = ""

    def replaced(match: re.Match[str]) -> str:
        nonlocal code
        if match[1] != "text":
            code = match[2]
            return match[0]
        return f"```text\n{outputs[code].rstrip()}\n```"

    return BLOCK.sub(replaced, page)


def photos_picture(photos: Path) -> bytes:
    """A row of images for each class, and a bar for their number, as PNG."""
    folders = sorted(photos.iterdir(), key=lambda folder: -len(list(folder.iterdir())))
    largest = len(list(folders[0].iterdir()))
    sheet = Image.new("L", (SHOWN * STEP + BAR, len(folders) * STEP), 255)
    for row, folder in enumerate(folders):
        files = sorted(folder.iterdir())
        for column, path in enumerate(files[:SHOWN]):
            sheet.paste(Image.open(path).resize((SIDE, SIDE)), (column * STEP, row * STEP))
        left, top = SHOWN * STEP, row * STEP + SIDE // 4
        sheet.paste(96, (left, top, left + round(BAR * len(files) / largest), top + SIDE // 2))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def accuracy_picture(project: Path) -> str:
    """Accuracy of each class on test images, without H2T and with it, as SVG."""
    from matplotlib.figure import Figure

    from benchmarks.pictures import svg

    evaluated = project / "data/evaluate/dr"
    names = json.loads((project / "data/prepare/classes.json").read_text())["classes"]
    reported = json.loads((evaluated / "metrics.json").read_text())["with_h2t"]
    table = pd.read_parquet(evaluated / "per_class.parquet")
    heads = pd.read_parquet(project / "data/train_classifier/dr/heads.parquet")
    table = table[(table["split"] == "test") & (table["statistics"] == reported["statistics"])].merge(
        heads, on="number"
    )
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    axis = figure.subplots()
    ratio = reported["ratio"]
    shown = ((0.0, "#888888", "without H2T", -0.12), (ratio, "#2166ac", f"with H2T, ratio {ratio:g}", 0.12))
    for wanted, colour, label, shift in shown:
        means = table[table["ratio"] == wanted].groupby("class")["accuracy"].mean().dropna()
        axis.plot(means.index + shift, means, "o", color=colour, label=label)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylim(-3, 103)
    axis.set_ylabel("test accuracy (%)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return svg(figure)


def main() -> None:
    from pipeline_builders import environment

    with tempfile.TemporaryDirectory(prefix="tutorial-") as temporary:
        folder = Path(temporary)
        outputs = dict(typed(folder, environment()))
        PAGE.write_text(with_outputs(PAGE.read_text(encoding="utf-8"), outputs), encoding="utf-8")
        PHOTOS.write_bytes(photos_picture(folder / "photos"))
        ACCURACY.write_text(accuracy_picture(folder / "project"), encoding="utf-8")


if __name__ == "__main__":
    main()

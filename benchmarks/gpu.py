"""What only a GPU can show, in pieces; each leaves benchmarks/results/gpu-PIECE.json with the device's name.

    make gpu                                                      # all pieces
    python -m benchmarks.gpu stack stage2                         # some
    python -m benchmarks.gpu table6 --paper --only ce_mixup --parquet train.parquet test.parquet

`--paper` hands what follows to benchmarks.paper. With `--tiny --device cpu` every piece runs in small, which shows that
it works and nothing else. A piece that misses its bound says so, and the command ends with exit code 1.

tests     tests/test_gpu.py
extract   extraction beside the bare forward pass, ResNet-50 and ViT-B/16 (its class token) on as many images of 224
          pixels as ImageNet-LT has, in bf16: at least 0.95 of its rate
stack     55 heads of 2048 channels and 1000 classes in one stack: at most 4 times one head; share of memory bandwidth
stage2    55 heads, 10 epochs of ImageNet-LT's 115,846 images, pooled: at most 60 s
maps      heads on whole maps with a learned pool (GeM), 256 channels of 7x7
table6    Table 6 of the paper, imbalance ratio 100
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, errors_in_one_line, machine, save
from benchmarks.synthetic import write_synthetic
from h2t.cache.reader import open_cache
from h2t.pipeline.base import device as devices
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.setting import Optimiser
from h2t.pipeline.project.stacks import RATIOS, SEEDS, feed_of, settings, stack_on, streams_of

ROOT = Path(__file__).parent.parent
TRAIN_IMAGES = 115_846  # of ImageNet-LT
OF_BARE, OVER_ONE_HEAD, STAGE2_SECONDS = 0.95, 4.0, 60.0
NEEDS = {
    "tests": ("pytest", "yaml"),
    "extract": ("torchvision", "PIL", "timm"),
    "table6": ("torchvision", "PIL", "sklearn"),
}


@dataclass(frozen=True)
class Setting:
    """How the pieces run: where data may lie, and what benchmarks.paper is told."""

    device: str
    tiny: bool
    data: Path
    paper: tuple[str, ...]

    def call(self, *arguments: str) -> None:
        """Runs a module of ours with this Python. Raises UserError if it fails."""
        command = [sys.executable, "-m", *arguments]
        if subprocess.run(command, cwd=ROOT).returncode:
            raise UserError(f"failed: python {' '.join(command[1:])}")

    def benchmark(self, module: str, *arguments: str) -> dict[str, Any]:
        """What a benchmark wrote as JSON."""
        out = self.data / f"{module}.json"
        tiny = ["--tiny"] if self.tiny else []
        given = ["--device", self.device, "--data", str(self.data / module), "--out", str(out), *tiny, *arguments]
        self.call(f"benchmarks.{module}", *given)
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def tests(at: Setting) -> dict[str, Any]:
    """The tests that are skipped without a GPU."""
    at.call("pytest", "-q", "tests/test_gpu.py")
    return {"passed": True, "skipped": at.device == "cpu"}


def extract(at: Setting) -> dict[str, Any]:
    """Images per second of extraction and of the forward pass alone, by network."""
    vit = ("--features", "cls", "--model", "test_vit" if at.tiny else "vit_base_patch16_224")
    networks = {"ResNet-50": ("--arch", "resnet20" if at.tiny else "resnet50"), "ViT-B/16": vit}
    size = ("--size", "32") if at.tiny else ("--size", "224", "--images", "131072")
    precision = "float32" if at.tiny else "bf16"  # which some processors compute by emulation
    common = (*size, "--precision", precision, "--rounds", "2")
    found = {name: at.benchmark("bench_extract", *network, *common) for name, network in networks.items()}
    holds = all(one["of_bare"]["median"] >= OF_BARE for one in found.values())
    return {"networks": found, "bound": f"of_bare >= {OF_BARE}", "holds": holds}


def stack(at: Setting) -> dict[str, Any]:
    """A step of 55 heads beside a step of one, and how much of the memory's bandwidth it uses.

    A step has to move each head's weights at least seven times: read by the forward pass, gradient written and read,
    momentum read and written, weights read and written.
    """
    channels, classes = (16, 10) if at.tiny else (2048, 1000)
    sizes = ("--channels", str(channels), "--classes", str(classes), "--steps", "50")
    found = at.benchmark("bench_stack", *sizes, "--rounds", "3")
    moved = 7 * 4 * found["heads"] * (channels + 1) * classes
    rate = moved / (found["ms_per_step"]["stack"] / 1000)
    peak = bandwidth(devices.choose(at.device), 2**20 if at.tiny else 2**30)
    ratio = found["stack_over_one_head"]["median"]
    return {
        **found,
        "bandwidth": {"copy_bytes_per_s": peak, "step_bytes_per_s": rate, "share": rate / peak},
        "bound": f"stack_over_one_head <= {OVER_ONE_HEAD}",
        "holds": ratio <= OVER_ONE_HEAD,
    }


def stage2(at: Setting) -> dict[str, Any]:
    """Stage II of ImageNet-LT's size on pooled features."""
    rows, channels, classes, epochs = (400, 16, 10, 2) if at.tiny else (TRAIN_IMAGES * 20 // 19, 2048, 1000, 10)
    found = heads_on(at, "stage2", rows, (channels, 1, 1), classes, "gap", epochs)
    return {**found, "bound": f"seconds <= {STAGE2_SECONDS:g}", "holds": found["seconds"] <= STAGE2_SECONDS}


def maps(at: Setting) -> dict[str, Any]:
    """Heads whose pool has parameters, so that whole maps are fused at every step."""
    rows, shape, classes, epochs = (200, (8, 3, 3), 10, 1) if at.tiny else (20_000, (256, 7, 7), 100, 2)
    return heads_on(at, "maps", rows, shape, classes, "gem", epochs)


def table6(at: Setting) -> dict[str, Any]:
    """The paper's table, into benchmarks/results/paper.json."""
    out = at.data / "paper.json" if at.tiny else RESULTS / "paper.json"
    given = ["--set", f"device={at.device}", "--data", str(at.data / "paper"), "--out", str(out), *at.paper]
    at.call("benchmarks.paper", "6-100", *given)
    rows = json.loads(out.read_text(encoding="utf-8"))
    return {"rows": [r for r in rows if r["table"] == "6-100"]}


PIECES: dict[str, Callable[[Setting], dict[str, Any]]] = {
    piece.__name__: piece for piece in (tests, extract, stack, stage2, maps, table6)
}


def heads_on(
    at: Setting, name: str, rows: int, shape: tuple[int, int, int], classes: int, pool: str, epochs: int
) -> dict[str, Any]:
    """Seconds to train 55 heads of DR (4 where tiny or on maps) on random features that lie on the device."""
    chosen = devices.choose(at.device)
    folder = at.data / name
    if not (folder / "cache.json").is_file():
        write_synthetic(folder, rows, shape, classes=classes)
    few = at.tiny or pool != "gap"
    ratios, seeds = ([0.0, 0.3], SEEDS[:2]) if few else (RATIOS, SEEDS)
    with open_cache(folder) as cache:
        streams = streams_of(cache, seeds)
        feed = feed_of(streams, cache, "device", chosen, pooled=pool == "gap")
    heads = settings(ratios, seeds)
    trained = stack_on(feed, heads, pool)
    started = time.perf_counter()
    trained.train(Optimiser(epochs=epochs), name, lambda epoch, losses: None)
    finite = all(bool(t.isfinite().all()) for t in trained.state.values())  # waits for the device
    seconds = time.perf_counter() - started
    return {
        "heads": len(heads),
        "rows": streams.samples,
        "shape": list(shape),
        "classes": classes,
        "pool": pool,
        "epochs": epochs,
        "steps": epochs * streams.steps,
        "seconds": seconds,
        "finite": finite,
    }


def bandwidth(chosen: torch.device, size: int) -> float:
    """Bytes per second, read and written, of copying `size` bytes on the device."""
    source = torch.zeros(size // 4, device=chosen)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        times.append(time.perf_counter() - started)
    return 2 * size / min(times[1:])


def missing(pieces: list[str]) -> dict[str, list[str]]:
    """Piece -> the modules that it needs and that are not installed."""
    lacking = {p: [m for m in NEEDS.get(p, ()) if importlib.util.find_spec(m) is None] for p in pieces}
    return {p: modules for p, modules in lacking.items() if modules}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"by default all: {', '.join(PIECES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="seconds: does it work, not how fast")
    parser.add_argument("--data", type=Path, help="a folder with 27 GB of room; by default a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument("--paper", nargs=argparse.REMAINDER, default=[], help="options of benchmarks.paper")
    options = parser.parse_args(given)
    pieces = options.pieces or list(PIECES)
    unknown = [p for p in pieces if p not in PIECES]
    if unknown:
        parser.error(f"piece: must be one of {', '.join(PIECES)}; got {unknown[0]!r}")
    lacking = missing(pieces)
    if lacking:
        each = "; ".join(f"{piece} needs {', '.join(modules)}" for piece, modules in lacking.items())
        raise SystemExit(f"error: packages are missing: {each}; run make, or install them with pip")
    with errors_in_one_line():
        chosen = devices.choose(options.device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu"
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data or Path(scratch)
        at = Setting(options.device, options.tiny, folder.resolve(), tuple(options.paper))
        for piece in pieces:
            print(f"\n== {piece} on {name} ==", flush=True)
            started = time.perf_counter()
            try:
                found = PIECES[piece](at)
            except UserError as error:
                found = {"error": str(error).replace(str(ROOT), ".").replace(str(at.data), "DATA")}
            body = {"piece": piece, "device": name, "tiny": options.tiny, "machine": machine(), **found}
            save(options.out / f"gpu-{piece}.json", {**body, "wall_s": time.perf_counter() - started})
            good = "error" not in found and (options.tiny or found.get("holds", True))
            print(
                f"{piece}: {found.get('error') or found.get('bound') or 'done'}: {'yes' if good else 'NO'}", flush=True
            )
            if not good:
                failed.append(piece)
    if failed:
        raise SystemExit(f"failed, or missed its bound: {', '.join(failed)}")


if __name__ == "__main__":
    main()

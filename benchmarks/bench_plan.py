"""`h2t plan` against real runs at three sizes, by rates measured in the same process: are they within 20 %?

    python -m benchmarks.bench_plan --data DIR
    python -m benchmarks.bench_plan --data DIR --arch resnet50 --images 100,200,400 --filled 8000,16000,32000

Compared are extraction of `--images`, and verify, pooling and an epoch of caches that repeat extracted maps, `--filled`
images each: sizes at which each takes a second or more. By processor time on a CPU (`--clock wall` for elapsed time),
since other programs on the machine lengthen elapsed time at random. Caches are predicted in bytes and files, too.
"""

import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.measure import arguments, machine, save, table
from h2t.cache.memory import available_memory
from h2t.cache.reader import open_cache
from h2t.pipeline.base import device as devices
from h2t.pipeline.project.plan import Machine, plan
from h2t.pipeline.project.rehearsal import LONG_REPEATS, TEST_SHARE, Stage, rehearse
from h2t.pipeline.project.stacks import BATCH
from h2t.pipeline.stages import extract
from h2t.pipeline.stages.train_backbone import Params as Entry

IMAGES, TINY_IMAGES = "2000,4000,8000", "60,90,120"
FILLED, TINY_FILLED = "100000,200000,400000", "400,600,900"
WANTED = 0.2  # largest relative difference


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_plan", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--images", help=f"three sizes of extraction, {IMAGES} by default")
    parser.add_argument("--filled", help=f"three sizes of the other steps, {FILLED} by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    options = parser.parse_args(given)
    images, filled = (
        [int(n) for n in text.split(",")]
        for text in (
            options.images or (TINY_IMAGES if options.tiny else IMAGES),
            options.filled or (TINY_FILLED if options.tiny else FILLED),
        )
    )
    about, device = machine(), devices.choose(options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    place = options.data / "plan"
    shutil.rmtree(place, ignore_errors=True)
    params, entry = extract.Params(batchnorm=["stage1"], batch_size=16), Entry(arch=options.arch)
    (place / "rehearsal").mkdir(parents=True)
    small = {"seconds": 0.2, "filled": 2**20} if options.tiny else {}
    known = rehearse(place / "rehearsal", entry, params, device, clock=clock, **small)
    here = Machine(available_memory(), shutil.disk_usage(place).free)
    stage = Stage(place, entry, params, device, clock)
    results: list[dict[str, Any]] = []
    for size in images:
        planned = plan(size, 1, known, here)
        cache, seconds = stage.extract(size)
        with open_cache(cache) as made:
            real = {"extract": seconds, "bytes": made.spec.value_bytes, "files": len(made.commit.files) + 1}
        sizes = {"bytes": planned["bytes"]["maps"], "files": planned["files"]["maps"]}
        results.append(_compared(size, {"extract": planned["seconds"]["extract"], **sizes}, real))
        if size != images[-1]:
            shutil.rmtree(cache)
    for size in filled:
        planned = plan(size, 1, known, here)
        whole = stage.filled(cache, size)
        checked = min(stage.verify(whole) for _ in range(LONG_REPEATS))
        copy, pooling = min((stage.pool(whole) for _ in range(LONG_REPEATS)), key=lambda made: made[1])
        epoch = stage.epoch(copy, [-(-(size - size // TEST_SHARE) // BATCH)])[0]
        said = {**planned["seconds"], "epoch": planned["epoch"]["seconds"]}
        results.append(_compared(size, said, {"verify": checked, "pool": pooling, "epoch": epoch}))
        shutil.rmtree(whole)
        shutil.rmtree(copy)
    shutil.rmtree(place)
    names = list(dict.fromkeys(name for line in results for name in line["ratio"]))
    ratios = {name: [line["ratio"][name] for line in results if name in line["ratio"]] for name in names}
    worst = {name: float(np.max(np.abs(np.array(of) - 1))) for name, of in ratios.items()}
    body = {
        "benchmark": "plan",
        "tiny": options.tiny,
        "machine": about,
        "case": {"arch": options.arch, "clock": options.clock, "device": device.type},
        "measured": known.as_dict(),
        "results": results,
        "promises": {"largest_difference": worst, "allowed": WANTED, "within": max(worst.values()) <= WANTED},
    }
    save(options.out, body)
    lines = [
        [f"{line['images']:,}", name, f"{line['planned'][name]:.3g}", f"{line['real'][name]:.3g}", f"{ratio:.2f}"]
        for line in results
        for name, ratio in line["ratio"].items()
    ]
    print(table(["images", "what", "planned", "real", "planned / real"], lines))
    print("largest differences: " + ", ".join(f"{name} {100 * of:.0f} %" for name, of in worst.items()))
    if not options.tiny and max(worst.values()) > WANTED:
        raise SystemExit(f"bench_plan: planned and real differ by more than {WANTED:.0%}")


def _compared(images: int, planned: dict[str, float], real: dict[str, float]) -> dict[str, Any]:
    planned = {name: planned[name] for name in real}
    return {"images": images, "planned": planned, "real": real, "ratio": {k: planned[k] / real[k] for k in real}}


if __name__ == "__main__":
    main()

"""`h2t plan` against real runs at three sizes, by rates measured in the same process: are they within 20 %?

    python -m benchmarks.bench_plan --data DIR
    python -m benchmarks.bench_plan --data DIR --arch resnet50 --images 64,128,256

Compared are extraction, verify, pooling and an epoch, by processor time on a CPU (`--clock wall` for elapsed time),
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
from h2t.pipeline.project.rehearsal import BATCH, REPEATS, TEST_SHARE, Stage, rehearse
from h2t.pipeline.stages import extract
from h2t.pipeline.stages.train_backbone import Params as Entry

SIZES, TINY_SIZES = "4000,8000,16000", "60,90,120"
WANTED = 0.2  # largest relative difference


def main(given: Sequence[str] | None = None) -> None:
    parser = arguments("bench_plan", __doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--arch", default="resnet20")
    parser.add_argument("--images", help=f"three sizes, {SIZES} by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    options = parser.parse_args(given)
    sizes = [int(n) for n in (options.images or (TINY_SIZES if options.tiny else SIZES)).split(",")]
    about, device = machine(), devices.choose(options.device)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    place = options.data / "plan"
    shutil.rmtree(place, ignore_errors=True)
    params, entry = extract.Params(batchnorm=["stage1"], batch_size=16), Entry(arch=options.arch)
    (place / "rehearsal").mkdir(parents=True)
    known = rehearse(place / "rehearsal", entry, params, device, clock=clock, seconds=0.2 if options.tiny else 3.0)
    here = Machine(available_memory(), shutil.disk_usage(place).free)
    stage = Stage(place, entry, params, device, clock)
    results: list[dict[str, Any]] = []
    for size in sizes:
        planned = plan(size, 1, known, here)
        cache, seconds = stage.extract(size)
        checked = min(stage.verify(cache) for _ in range(REPEATS))
        copy, _ = stage.pool(cache)
        pooling = min(stage.pool(cache)[1] for _ in range(REPEATS))
        steps = -(-(size - size // TEST_SHARE) // BATCH)
        epoch = stage.epoch(copy, max(steps, 50)).of(steps)
        with open_cache(cache) as made:
            files, found = len(made.commit.files) + 1, made.spec.value_bytes
        real = {"extract": seconds, "verify": checked, "pool": pooling, "epoch": epoch, "bytes": found, "files": files}
        said = {**planned["seconds"], "epoch": planned["epoch"]["seconds"]}
        said |= {"bytes": planned["bytes"]["maps"], "files": planned["files"]["maps"]}
        results.append({"images": size, "planned": said, "real": real, "ratio": {k: said[k] / real[k] for k in real}})
        shutil.rmtree(cache)
        shutil.rmtree(copy)
    shutil.rmtree(place)
    ratios = {name: [line["ratio"][name] for line in results] for name in results[0]["ratio"]}
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
        [f"{line['images']:,}", *(f"{line['planned'][k]:.3g} / {line['real'][k]:.3g}" for k in ratios)]
        for line in results
    ]
    print(table(["images", *(f"{name}, planned / real" for name in ratios)], lines))
    print("largest differences: " + ", ".join(f"{name} {100 * of:.0f} %" for name, of in worst.items()))
    if not options.tiny and max(worst.values()) > WANTED:
        raise SystemExit(f"bench_plan: planned and real differ by more than {WANTED:.0%}")


if __name__ == "__main__":
    main()

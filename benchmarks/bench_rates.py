"""Hours and bytes of the presets of frozen networks, from the rate of each network's forward pass on this machine.

    python -m benchmarks.bench_rates                                   # one processor core, float32
    python -m benchmarks.bench_rates --device cuda --precision bf16

Networks have random weights, which changes no time. Images are of the side that the preset states. Extraction takes as
long as its forward passes, within the 5 % that `bench_extract` measures, unless decoding is slower; every image has
one row in these caches.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import RESULTS, machine, save, table
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.precision import computing
from h2t.pipeline.command_line import presets
from h2t.pipeline.data.network_input import chosen
from h2t.pipeline.inspection import settings
from h2t.pipeline.networks.backbone import build_backbone
from h2t.pipeline.stages import train_backbone

#: Preset -> training and test images.
IMAGES = {
    "frozen-imagenet_lt": 115_846 + 50_000,
    "frozen-places_lt": 62_500 + 36_500,
    "frozen-inaturalist18": 437_513 + 24_426,
    "pretrained-own-images": 10_000,  # for orientation
}
PASSES = 3  # timed, after one that is not; the fastest counts


def rate(section: train_backbone.Params, device: torch.device, precision: Any, batch: int) -> dict[str, Any]:
    """Seconds per image of the forward pass, processor time on a CPU; and the shape of a row's map."""
    arch = plugins.load("backbones", section.arch)
    options = params.build(arch.Options, "options", section.options)
    stated = chosen(arch.input(options), section.input)
    backbone = build_backbone(arch, options, stated.size).eval().to(device)
    images = torch.randn(batch, 3, stated.size or 224, stated.size or 224, device=device)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken = []
    for _ in range(PASSES + 1):
        started = clock()
        with torch.no_grad(), computing(device, precision):
            (maps,) = backbone(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - started)
    return {"shape": list(maps.shape[1:]), "pixels": images.shape[-1], "seconds_per_image": min(taken[1:]) / batch}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", help="float32, bf16 or fp16")
    parser.add_argument("--batch", type=int, help="images in a pass; by default 4, on a GPU 128")
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/rates-DEVICE.json")
    options = parser.parse_args(given)
    device = devices.choose(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    batch = options.batch or (128 if device.type == "cuda" else 4)
    known: dict[str, dict[str, Any]] = {}
    lines = []
    for preset, images in IMAGES.items():
        entries = settings.complete(params.load(presets.FOLDER / f"{preset}.yaml"), "backbones")
        for name, entry in entries.items():
            section = params.build(train_backbone.Params, f"backbones.{name}", entry)
            key = f"{section.options} {section.input}"
            if key not in known:
                known[key] = rate(section, device, options.precision, batch)
            bytes_ = 2 * images * int(torch.tensor(known[key]["shape"]).prod())
            hours = images * known[key]["seconds_per_image"] / 3600
            lines.append({"preset": preset, "images": images, "backbone": name, **known[key]})
            lines[-1] |= {"bytes": bytes_, "hours": hours}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one core"
    body = {"machine": machine(), "device": name, "precision": options.precision, "batch": batch, "results": lines}
    save(options.out or RESULTS / f"rates-{device.type}.json", body)
    print(f"{name}, {options.precision}")
    print(shown(lines))


def shown(lines: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    rows = [
        [
            f"`{line['preset']}`",
            line["backbone"],
            "x".join(map(str, line["shape"])),
            f"{line['bytes'] / 1e9:.2f} GB",
            f"{1 / line['seconds_per_image']:.3g}",
            f"{line['hours']:.2g}",
        ]
        for line in lines
    ]
    return table(["preset", "backbone", "row", "cache", "images/s", "hours"], rows)


if __name__ == "__main__":
    main()

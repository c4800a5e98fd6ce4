"""The published stage II of H2T run online, in plain torch: a slow reference for heads trained on cached features.

    python -m benchmarks.online_h2t --data DATA --params PARAMS --seeds 0 1 2 3 4            # about 10 minutes a seed

Two passes of the backbone a step, first a class-balanced batch, then an instance-wise one, every image augmented anew.
The backbone's weights are frozen, yet it is in train mode: each batch is normalised by its own statistics, and the
running statistics, which the test images are read under, move on from those of stage I. Only the classifier is trained;
the last epoch is evaluated. With --ratio 0 there are no donors and one pass a step: DR as published.

--frozen and --unaugmented take an ingredient away: batch norm keeps the statistics of stage I; every image is seen as
it is. With both, heads are those of stage II on a cache with `batchnorm: stage1` and one view.

Source: `train_stage2.py` and the configurations of CIFAR-100-LT in the authors' code (none is published for CIFAR-10).
Samples of a batch and replaced channels are drawn from the same streams as in stage II on a cache, so that a seed here
and the same seed there differ in nothing but their features. Reads DATA/prepare and DATA/train_backbone, writes
DATA/online/ratio-R-seed-S.json (figures, time) and .safetensors (classifier, running statistics), with `-frozen` or
`-unaugmented` in the name; a finished seed is left alone.

With --device cuda the training images are decoded once, stay on the GPU and are cropped there: the same views.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from benchmarks.measure import timed
from h2t.pipeline.base import device, params
from h2t.pipeline.base.outputs import write_run_record
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.classes import class_index, groups
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.resident_images import resident
from h2t.pipeline.data.samples import Samples, load_samples
from h2t.pipeline.evaluation.metrics import answers, summaries
from h2t.pipeline.extraction.batchnorm import current
from h2t.pipeline.heads.fusion import channel_ranks, replaced_channels
from h2t.pipeline.networks.trained import load_backbone, load_head
from h2t.pipeline.samplers import balanced, instance

EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 10, 128, 0.02, 0.9, 5e-4
SWITCHES = ("frozen", "unaugmented")
CPU = torch.device("cpu")
ROOM = 2**31  # bytes of a GPU's memory for decoded training images


@dataclass
class Clock:
    """Seconds by the clock and of the processor, all cores together, by part of a step; a GPU's work is waited for."""

    where: torch.device

    spent: dict[str, dict[str, float]] = field(default_factory=lambda: {"seconds": {}, "cpu": {}})

    def __call__(self, part: str, work: Any) -> Any:
        """The result of `work()`, its time added to `part`."""
        with timed() as spent:
            found = work()
            if self.where.type == "cuda":
                torch.cuda.synchronize(self.where)
        for name, taken in spent.items():
            self.spent[name][part] = self.spent[name].get(part, 0.0) + taken
        return found


def rate(epoch: int) -> float:
    """Half a cosine, set once per epoch, from 0."""
    return 0.5 * RATE * (1 + math.cos(math.pi * epoch / EPOCHS))


def logits(backbone: nn.Module, head: nn.Linear, images: Images, test: np.ndarray) -> np.ndarray:
    """Logits of the test images, unaugmented, under the backbone's running statistics, float32 (n, classes)."""
    backbone.eval()
    found = []
    with torch.no_grad():
        for part in np.split(test, range(BATCH, len(test), BATCH)):
            (maps,) = backbone(images.batch(part.tolist(), [None] * len(part)).to(head.weight.device))
            found.append(head(maps.mean((2, 3))).cpu())
    return torch.cat(found).numpy()


def steps(samples: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, step, size): an epoch has as many items as training samples; its last batch is what is left."""
    for epoch in range(EPOCHS):
        for step in range(-(-samples // BATCH)):
            yield epoch, step, min(BATCH, samples - step * BATCH)


def train(
    samples: Samples,
    images: Images,
    folder: Path,
    ratio: float,
    seed: int,
    *,
    frozen: bool = False,
    unaugmented: bool = False,
    where: torch.device = CPU,
) -> dict[str, Any]:
    """Trains one classifier on the stage-I network in `folder`, on the device `where`.

    Returns figures, time, and `state` (classifier, running statistics; on the CPU).
    """
    backbone, _ = load_backbone(folder)
    backbone.to(where)
    if where.type == "cpu":
        backbone.to(memory_format=torch.channels_last)  # two thirds of the time on a CPU
    stage1 = load_head(folder)
    weight, bias = stage1.state["weight"][0], stage1.state["bias"][0]
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    head.to(where)
    optimiser = torch.optim.SGD(head.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)

    train_samples = samples.of("train")
    labels = samples.labels
    classes = class_index(labels[train_samples], samples.facts["classes"])
    receivers = partial(stream, seed, "receiver", "balanced")
    donors = partial(stream, seed, "donor", "instance")
    replaced = replaced_channels(ratio, weight.shape[1])
    clock = Clock(where)
    views = images
    if where.type == "cuda" and not unaugmented:
        views = clock("decoding", lambda: resident(images, train_samples.tolist(), where, ROOM))

    def pictures(picked: np.ndarray, branch: str, epoch: int, step: int) -> torch.Tensor:
        keys = [None if unaugmented else (seed, "online", branch, epoch, step, i) for i in range(len(picked))]
        return clock("images", lambda: views.batch(picked.tolist(), keys).to(where))

    def maps_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            (maps,) = clock("backbone", lambda: backbone(batch))
        return maps

    def learn(fused: torch.Tensor, target: torch.Tensor) -> float:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(fused.mean((2, 3))), target)
        loss.backward()
        optimiser.step()
        return loss.item()

    backbone.train(not frozen)
    total = 0.0
    started, used = time.perf_counter(), time.process_time()
    for epoch, step, size in steps(len(train_samples)):
        if step == 0:
            optimiser.param_groups[0]["lr"] = rate(epoch)
            total = 0.0
        picked = train_samples[balanced.draw(classes, receivers, epoch, step, BATCH)[:size]]
        fused = maps_of(pictures(picked, "receiver", epoch, step))
        if ratio > 0:
            donated = train_samples[instance.draw(classes, donors, epoch, step, BATCH)]
            donor = maps_of(pictures(donated, "donor", epoch, step))
            ranks = channel_ranks([seed], epoch, [step], [0], fused.shape[1])[0, 0, 0]
            channels = torch.from_numpy(ranks < replaced).to(where)
            fused = torch.where(channels[:, None, None], donor, fused)
        total += size * clock("head", partial(learn, fused, torch.from_numpy(labels[picked]).to(where)))
        if (step + 1) * BATCH >= len(train_samples):
            mean, spent = total / len(train_samples), time.process_time() - used
            print(f"seed {seed}: epoch {epoch + 1} of {EPOCHS}, loss {mean:.4f}, {spent:.0f} CPU s", flush=True)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used

    test = samples.of("test")
    guesses = clock("evaluation", lambda: logits(backbone, head, images, test))
    return {
        "ratio": ratio,
        "seed": seed,
        "frozen": frozen,
        "unaugmented": unaugmented,
        "steps": EPOCHS * -(-len(train_samples) // BATCH),
        "figures": summaries([answers(guesses, labels[test])], labels[test], groups(samples.counts)["paper_index"])[0],
        "loss": total / len(train_samples),
        "seconds": round(seconds, 2),
        "cpu": round(cpu, 2),
        "parts": clock.spent,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "state": {**{f"head.{k}": v.detach().cpu() for k, v in head.state_dict().items()}, **current(backbone)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="its section prepare is read")
    parser.add_argument("--backbone", default="ce_mixup")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    given = parser.parse_args()
    switches = {name: getattr(given, name) for name in SWITCHES}
    variant = "".join(f"-{name}" for name, on in switches.items() if on)
    where = device.choose(given.device)
    samples = load_samples(given.data / "prepare")
    images = samples.images(params.section(params.load(given.params), "prepare"))
    for seed in given.seeds:
        out = given.data / "online" / f"ratio-{given.ratio:g}-seed-{seed}{variant}.json"
        if out.exists():
            print(f"{out}: done before")
            continue
        folder = given.data / "train_backbone" / given.backbone
        found = train(samples, images, folder, given.ratio, seed, **switches, where=where)
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(found.pop("state"), out.with_suffix(".safetensors"))
        write_run_record(out, found)
        print(f"seed {seed}: {found['figures']} in {found['seconds']:.0f} s, {found['cpu']:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()

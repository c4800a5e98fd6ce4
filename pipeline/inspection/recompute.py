"""Checks that a cache holds the maps of given images and a given backbone, by recomputing some rows.

Finds what checksums cannot: weights or images other than those the cache was made from, batch norm in the wrong mode,
a changed transform, another channel order of the images.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from h2t.cache.format.spec import to_float32
from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import guarded_maps
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.data.images import Images
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.data.views import normalised
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.recorded import ingredients
from h2t.pipeline.networks.trained import backbone_facts, load_backbone

#: Allowed deviation of a recomputed value from the stored one, as a share of the largest value in its map. The same
#: device, thread count and versions give the same bits; others may sum in another order and so round differently.
TOLERANCE = {"float32": 1e-3, "float16": 4e-3, "bfloat16": 2e-2}


Wanted = tuple[int, int, tuple[int, int] | None]  # row, its sample, and the key of its view (None for view 0)


@dataclass(frozen=True)
class Recomputed:
    """The result: rows compared, rows with equal bits, the largest deviation (a share, as TOLERANCE), and faults."""

    rows: int
    same_bits: int
    worst: float
    tolerance: float
    faults: list[str]


@torch.no_grad()
def recompute(
    cache: Cache,
    samples: Samples,
    images: Images,
    backbone_dir: Path,
    count: int,
    seed: int,
    device: torch.device,
    part: tuple[int, int] = (1, 1),
) -> Recomputed:
    """Recomputes `count` random rows (all, if there are fewer), drawn with `seed`, and compares them with the cache.

    `part` (K, N): only the rows of part K of N, which together are those that are drawn.

    Raises UserError if the cache was not made from these inputs: a pooled copy, other weights, another transform.
    """
    inputs, spec = ingredients(cache.files, cache.spec), cache.spec
    backbone, identity = load_backbone(backbone_dir)
    samples = samples.with_input(backbone_facts(backbone_dir).input)
    images = images.prepared_for(samples.transform)
    for name, recorded, given in (
        ("backbone", inputs["backbone"].get("weights"), identity["weights"]),
        ("transform", inputs["transform"], samples.facts["transform"]),
    ):
        if recorded != given:
            raise UserError(
                f"{cache.files}: was extracted with another {name} ({recorded}); got {given}; "
                f"give the {name} of this cache, or extract again"
            )
    backbone.to(device)
    chosen = np.sort(stream(seed, "recompute").choice(spec.rows, min(count, spec.rows), replace=False))
    chosen = np.array_split(chosen, part[1])[part[0] - 1]
    known = {
        (line["split"], line["source"]): line
        for line in samples.table.select(["sample", "split", "source", "digest"]).to_pylist()
    }
    wrong: dict[int, str] = {}  # row -> its fault
    todo: dict[str, list[Wanted]] = {}
    entries = dict(zip(chosen.tolist(), cache.lines(chosen).to_pylist(), strict=True))
    for row, entry in entries.items():
        sample = known.get((entry["split"], entry["source"]))
        if sample is None:
            wrong[row] = ": its image is not among the samples"
        elif sample["digest"] != entry["digest"]:
            wrong[row] = ": its image has changed"
        else:
            key = None if entry["view"] == 0 else (inputs["views"]["seed"], entry["view"])
            todo.setdefault(entry["statistics"], []).append((row, sample["sample"], key))
    worst, same_bits = 0.0, 0
    for row, expert, now, stored in _both(cache, backbone, images, todo, device):
        same_bits += int(np.array_equal(now, stored))
        scale = max(float(np.abs(stored).max()), float(np.abs(now).max()), 1e-12)
        off = float(np.abs(now - stored).max()) / scale
        worst = max(worst, off)
        if not off <= TOLERANCE[spec.dtype]:
            wrong[row] = (
                f", expert {expert}: recomputed values are off by {off:.2g} of the largest; "
                f"at most {TOLERANCE[spec.dtype]:g} is allowed"
            )
    faults = [
        f"row {row} ({entry['split']} {entry['source']}, view {entry['view']}, {entry['statistics']}){wrong[row]}"
        for row, entry in entries.items()
        if row in wrong
    ]
    return Recomputed(len(chosen), same_bits // spec.experts, worst, TOLERANCE[spec.dtype], faults)


def _both(
    cache: Cache, backbone: nn.Module, images: Images, todo: Mapping[str, list[Wanted]], device: torch.device
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yields (row, expert, recomputed map, stored map); maps are float32 (C, H, W). `todo`: statistics -> rows."""
    spec = cache.spec
    statistics = batchnorm.from_bytes(cache.statistics)
    size = spec.provenance.get("batch_size", 1)
    last = spec.provenance.get("memory_format") == "channels_last"
    layout = torch.channels_last if last else torch.contiguous_format
    for name, wanted in todo.items():
        batchnorm.use(backbone, statistics[name])
        for part in (wanted[i : i + size] for i in range(0, len(wanted), size)):
            rows, samples, keys = zip(*part, strict=True)
            pixels = torch.from_numpy(images.pixels(samples, keys))
            # Padded to a full batch, as in extraction: at another batch size, libraries may sum in another order. A GPU
            # normalises the images itself, also as in extraction.
            pixels = torch.cat([pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)]).to(device)
            x = normalised(pixels, images.transform, layout)
            for expert, maps in enumerate(guarded_maps(backbone, x, spec.provenance.get("precision", "float32"))):
                now = maps[: len(rows)].cpu().to(getattr(torch, spec.dtype)).to(torch.float32).numpy()
                stored = to_float32(cache.read(rows, expert=expert), spec.dtype)
                for row, mine, theirs in zip(rows, now, stored, strict=True):
                    yield row, expert, mine, theirs

"""Features of images in memory: pooled maps of a frozen backbone, computed as `extract` computes those of a cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from h2t.cache.format.row_index import Part
from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.progress import progress
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.images import BadImage, Images, Transform
from h2t.pipeline.data.samples import Samples
from h2t.pipeline.extraction import batchnorm, forward
from h2t.pipeline.extraction.row_plan import RowPlan
from h2t.pipeline.networks.backbone import Backbone, frozen_part
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import backbone_facts, load_backbone
from h2t.pipeline.stages import train_backbone


@dataclass(frozen=True)
class Extractor:
    """A frozen backbone of one expert on `device`, the transform of its images, and how it is described in files."""

    backbone: Backbone
    transform: Transform
    device: torch.device
    batch_size: int
    about: Mapping[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def features(self, images: Images) -> np.ndarray:
        """What a classifier gets of each image: float32 (n, D), averaged maps after the layers behind the pooling.

        Raises UserError for images that cannot be read and for features that are not finite.
        """
        size = self.transform.size
        (one,) = self.backbone(torch.zeros(1, 3, size, size, device=self.device))
        count = len(images.sources)
        batch = min(int(self.batch_size), count)  # passes are always full: few images in a large one would cost as much
        rows = RowPlan((Part("test", "stage1", 0, count),), *(np.array(n) for n in ([0, count], [0], [1])))
        spec = CacheSpec(
            rows=count,
            maps=(tuple(one.shape[1:]),),
            dtype="float32",
            codec="none",
            chunk_rows=batch,
            shard_rows=batch,
            fingerprint_inputs={},
            provenance={},
        )
        todo = {shard: np.array(spec.shard_range(shard)) for shard in range(spec.shards)}
        statistics = batchnorm.to_bytes({"stage1": batchnorm.current(self.backbone)})
        settings = forward.settings(batch, "float32", self.device)
        images = images.prepared_for(self.transform)
        job = forward.Job(rows, todo, images, Path(), {}, statistics, 0, self.device, spec, settings)
        work = forward.Work(job, self.backbone, self.device, forward.Passes())
        after = frozen_part(self.backbone)
        pooled = []
        try:
            with progress(None, "features", unit="image", total=count) as bar:
                for _, (maps,) in forward.computed(work, todo, bar.update):
                    values = global_average(torch.from_numpy(maps))
                    pooled.append((values if after is None else after(values.to(self.device)).cpu()).numpy())
        except BadImage as bad:
            raise UserError(f"image {bad.source!r}: {bad.reason}; repair it or leave it out") from None
        return np.concatenate(pooled)


def extractor(
    name: str,
    transform: Transform,
    device: torch.device,
    *,
    weights: str = "pretrained",
    options: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    batch_size: int = 64,
) -> Extractor:
    """The backbone `name`, a plug-in or PLUG-IN:MODEL, with `weights`: pretrained, none or a file.

    `transform` is that of the images; what the backbone states, or `given` as its `input`, replaces keys of it. Raises
    UserError for an unknown backbone, weights that do not fit, and a backbone of several experts.
    """
    arch, _, model = name.partition(":")
    values = {
        "arch": arch,
        "options": {**({"model": model} if model else {}), **(options or {})},
        "input": dict(given or {}),
        "weights": None if weights == "none" else weights,
        "frozen": weights == "none",
        "head": "none",
    }
    params = build(train_backbone.Params, f"backbone {name}", values)
    samples = Samples(pa.table({}), {"counts": [1, 1], "transform": transform.model_dump(mode="json")})
    with TemporaryDirectory() as folder:
        run = Run(arch, Path(folder) / "backbone", device)
        train_backbone.run(params, run, samples, Images([], None, lambda s: b"", lambda b: np.empty(0), transform))
        backbone, identity = load_backbone(run.out)
        facts = backbone_facts(run.out)
    if backbone.experts > 1:
        raise UserError(
            f"backbone {name}: must have one expert; got {backbone.experts}; extract a cache with h2t extract instead"
        )
    about = {"backbone": identity["weights"], **{k: v for k, v in identity.items() if k != "weights"}}
    backbone.to(device)
    return Extractor(backbone, samples.with_input(facts.input).transform, device, batch_size, about)

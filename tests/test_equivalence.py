"""Training on the cache equals training online: the backbone run twice per step, under each branch's statistics.

The online loop below shares with the pipeline only its random rows, its images and its channel sets; forward passes,
pooling, fusion, loss and optimiser are written out.
"""

import math

import numpy as np
import pytest
import torch
from pipeline_builders import distance, extracted, fitted
from torch.nn import functional as F

from h2t.cache.reader import open_cache
from h2t.pipeline.extraction.batchnorm import from_bytes, use
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.fusion import channel_ranks
from h2t.pipeline.networks.trained import load_backbone, load_head

BATCH = 32  # of extraction and of stage II alike, so that both run the same forward passes
EPOCHS = 2
RATIOS = [0.0, 0.3, 1.0]


class Online:
    """Maps of any rows from the frozen backbone, at the moment they are asked for."""

    def __init__(self, cache, images, backbone_dir, rounded):
        self.backbone = load_backbone(backbone_dir)[0]
        self.images, self.rounded = images, rounded
        self.statistics = from_bytes(cache.statistics)
        self.rows = cache.rows.to_pylist()
        self.runs = 0

    @torch.no_grad()
    def maps(self, rows, statistics):
        entries = [self.rows[r] for r in rows]
        assert {e["statistics"] for e in entries} == {statistics}
        keys = [None if e["view"] == 0 else (0, e["view"]) for e in entries]
        x = self.images.batch([e["sample"] for e in entries], keys)
        use(self.backbone, self.statistics[statistics])
        self.runs += 1
        full = torch.cat([x, x[-1:].expand(BATCH - len(x), -1, -1, -1)])
        maps = self.backbone(full)[0][: len(x)]
        return maps.half().float() if self.rounded else maps


def train_online(online, streams, stage1, ratio, seed, check=lambda rows, maps: None):
    weight, bias = stage1.state["weight"][0].clone(), stage1.state["bias"][0].clone()
    speed = {"weight": torch.zeros_like(weight), "bias": torch.zeros_like(bias)}
    place = streams.seeds.index(seed)
    for epoch in range(EPOCHS):
        rate = 0.5 * 0.02 * (1 + math.cos(math.pi * epoch / EPOCHS))
        for step in range(streams.steps):
            batch = streams.batch(epoch, step)
            receiver = online.maps(batch.receivers[place], "balanced")
            donor = online.maps(batch.donors[place, 0], "instance")
            check(batch.receivers[place], receiver)
            check(batch.donors[place, 0], donor)
            channels = receiver.shape[1]
            ranks = channel_ranks([seed], epoch, [step], [0], channels)[0, 0, 0]
            chosen = np.flatnonzero(ranks < math.floor(ratio * channels))
            x = receiver.clone()
            x[:, chosen] = donor[:, chosen]
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            loss = F.cross_entropy(F.linear(x.mean((2, 3)), w, b), torch.from_numpy(batch.labels[place]))
            loss.backward()
            for name, value, gradient in (("weight", weight, w.grad), ("bias", bias, b.grad)):
                speed[name] = 0.9 * speed[name] + gradient + 5e-4 * value
                value -= rate * speed[name]
    return {"weight": weight, "bias": bias}


@pytest.mark.parametrize(("dtype", "pooled"), [("float32", False), ("float16", True)])
def test_training_on_the_cache_is_training_online(tmp_path, digits, backbone_dir, dtype, pooled):
    samples, images = digits
    extracted(tmp_path / "c", samples, images, backbone_dir, dtype=dtype, max_views=2, batch_size=BATCH)
    heads = fitted(
        tmp_path / "heads",
        tmp_path / "c",
        backbone_dir,
        pooled=pooled,
        optimiser={"epochs": EPOCHS, "batch_size": BATCH},
        grid={"ratio": RATIOS, "seed": [0, 1]},
    )
    with open_cache(tmp_path / "c") as cache:
        online = Online(cache, images, backbone_dir, rounded=dtype == "float16")
        donors = {"instance": "instance"}
        streams = Streams(cache.rows, samples.facts["classes"], "balanced", donors, [0, 1], BATCH)
        stage1 = load_head(backbone_dir)

        def equals_the_cache(rows, maps):
            assert np.array_equal(cache.read(rows).astype(np.float32), maps.numpy())

        for k, (ratio, seed) in enumerate((r, s) for r in RATIOS for s in (0, 1)):
            expected = train_online(online, streams, stage1, ratio, seed, equals_the_cache)
            for name, value in expected.items():
                assert distance(heads[name][k, 0], value) <= 1e-5
                assert distance(heads[name][k, 0], stage1.state[name][0]) > 1e-4  # it moved
        assert online.runs == len(RATIOS) * 2 * EPOCHS * streams.steps * 2


def test_the_loop_above_tells_other_statistics_apart(tmp_path, backbone_dir, digits_cache):
    """Receivers under the donors' statistics give other heads by far: the check is not blind to them."""
    heads = fitted(tmp_path / "heads", digits_cache, backbone_dir, grid={"ratio": [0.0], "seed": [0]})
    single = fitted(
        tmp_path / "stage1", digits_cache, backbone_dir, batchnorm="stage1", grid={"ratio": [0.0], "seed": [0]}
    )
    assert distance(heads["weight"], single["weight"]) > 1e-3

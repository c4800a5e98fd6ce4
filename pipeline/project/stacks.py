"""Linear heads of host `dr` on a cache, as stage II trains them: what rehearsals and benchmarks time."""

import math
from collections.abc import Sequence

import torch

from h2t.cache.reader import Cache
from h2t.pipeline.base.run import silent
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.head import Head
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed, Tier
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.stack import Stack
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import StageOneHead

RATIOS = [round(0.1 * i, 1) for i in range(11)]
SEEDS = [0, 1, 2, 3, 4]
BATCH = 128
CPU = torch.device("cpu")


def settings(ratios: Sequence[float] = RATIOS, seeds: Sequence[int] = SEEDS) -> list[HeadSetting]:
    """One head for each ratio and seed, with H2T as published."""
    return [HeadSetting(ratio, "instance", "random", seed) for ratio in ratios for seed in seeds]


def streams_of(cache: Cache, seeds: Sequence[int], statistics: str = "stage1") -> Streams:
    """Class-balanced receivers and instance-wise donors, read under the same statistics."""
    classes = cache.spec.provenance["classes"]
    return Streams(cache.index, classes, statistics, {"instance": statistics}, seeds, BATCH)


def feed_of(
    streams: Streams,
    cache: Cache,
    tier: Tier,
    device: torch.device = CPU,
    *,
    pooled: bool = True,
    budget: int = 2**33,
) -> Feed:
    """The features of the batches, whole maps unless `pooled`; `budget`: bytes for streamed ones."""
    reader = FeatureReader(cache, global_average if pooled else None)
    return Feed(streams, reader, Choice(tier, "benchmark"), budget, device, silent)


def head_of(streams: Streams, shape: Sequence[int], experts: int = 1, pool: str = "gap") -> tuple[Head, StageOneHead]:
    """The head for features of `shape`, (C) or (C, H, W), and the random classifier that it starts from."""
    channels, *pixels = shape
    context = Context(torch.from_numpy(streams.index.counts), channels, experts, math.prod(pixels))
    head = build_head(HeadParts("dr", {}, "linear", 1.0, pool, {}, "hosts.bench"), context)
    draws = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(experts, context.classes, channels, generator=draws)
    return head, StageOneHead({"weight": weight, "bias": torch.zeros(experts, context.classes)}, "linear", 1.0)


def stack_on(feed: Feed, heads: Sequence[HeadSetting], pool: str = "gap") -> Stack:
    """The stack of `heads` at its start."""
    head, start = head_of(feed.streams, feed.shape, feed.experts, pool)
    stack = Stack(head, heads, feed)
    stack.start(start)
    return stack

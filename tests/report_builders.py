"""A small evaluated host, through the stages themselves: a cache of random maps, a grid of heads, evaluate."""

import os
from pathlib import Path

import browser
import pytest
from pipeline_builders import make_backbone_dir, make_host, make_stage2_cache

from h2t.cache.reader import open_cache
from h2t.pipeline.base.run import Run
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.stages import evaluate, train_classifier

NASTY = "</script><img src=x onerror=\"console.error('escaped')\">"  # a class name that a page must not run


def make_evaluated(folder: Path, name: str = "dr", *, classes=None, grid=None, seed=0, fitted=False, **host) -> Path:
    """`folder`/evaluate/`name`, as evaluate writes it; returns `folder`/evaluate."""
    names = classes or ["plane", NASTY, "bird & co", "cat"]
    backbone = folder / "train_backbone" / f"b{seed}"
    digest = make_backbone_dir(backbone, classes=len(names), seed=seed)
    counts = [40, 20, 10, 5, *[5] * (len(names) - 4)]
    cache = folder / "extract" / f"b{seed}"
    if not cache.exists():
        make_stage2_cache(
            cache, counts=counts[: len(names)], classes=names, shape=(64, 2, 2), backbone=digest, test=6, val=0
        )
    params = make_host(grid={"ratio": [0.0, 0.3, 0.6], "seed": [0, 1, 2], **(grid or {})}, **host)
    if fitted:
        params = train_classifier.Params(backbone="b", **host)
    with open_cache(cache) as opened:
        heads = folder / "train_classifier" / name
        train_classifier.run(params, Run(name, heads), Residency(), opened, backbone)
        evaluate.run(evaluate.Params(), Run(name, folder / "evaluate" / name), opened, heads, backbone)
    return folder / "evaluate"


def open_browser() -> browser.Browser:
    """A browser. Without one tests are skipped, or fail under CI=true."""
    if browser.find() is None:
        reason = "no Chromium: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return browser.Browser()

"""What the published way would take, reckoned from the records of real runs."""

import json

import numpy as np
import pandas as pd
import pytest
from pipeline_builders import extracted, fitted, make_backbone_dir, make_host, make_samples, make_stage2_cache

from h2t.cache.reader import open_cache
from h2t.pipeline.base.outputs import write_run_record
from h2t.pipeline.base.run import Run
from h2t.pipeline.reporting import files
from h2t.pipeline.reporting.published import different_runs, estimates
from h2t.pipeline.reporting.results import load_result
from h2t.pipeline.stages import evaluate, train_classifier

GRID = {
    "ratio": [0.0, 0.3, 1.0],
    "donor": ["instance", "balanced"],
    "selection": ["random", "first", "mixup", "shuffled"],
    "seed": [0, 1],
}
EPOCHS, BATCH = 2, 16


def test_heads_counted_as_one_run_are_one_head(tmp_path):
    """Of a whole grid: as many different runs as there are different weights."""
    digest = make_backbone_dir(tmp_path / "b", classes=3)
    cache = make_stage2_cache(tmp_path / "c", counts=(30, 20, 9), shape=(64, 2, 2), backbone=digest)
    state = fitted(tmp_path / "h", cache, tmp_path / "b", grid=GRID)
    heads = pd.read_parquet(tmp_path / "h" / "heads.parquet")
    weights = np.round(state["weight"].flatten(1).numpy(), 5)
    different = [len(np.unique(weights[m], axis=0)) for m in (heads.ratio > 0, heads.ratio == 0)]
    assert len(heads) == 48
    assert list(different_runs(heads)) == different == [24, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Digits, extracted, trained and evaluated as `dr`, with the records of both runs in `runs`."""
    home = tmp_path_factory.mktemp("published")
    samples = make_samples(home / "prepare")
    make_backbone_dir(home / "b")
    write_run_record(
        home / "runs/extract/b.json", {"seconds": 9.0, "cpu": 11.0, **vars(extracted(home / "c", *samples, home / "b"))}
    )
    host = make_host(grid={"ratio": [0.0, 0.3], "seed": [0, 1, 2]}, optimiser={"epochs": EPOCHS, "batch_size": BATCH})
    with open_cache(home / "c") as cache:
        trained = train_classifier.run(host, Run("dr", home / "h"), train_classifier.Residency(), cache, home / "b")
        evaluate.run(evaluate.Params(), Run("dr", home / "evaluate/dr"), cache, home / "h", home / "b")
    write_run_record(home / "runs/train_classifier/dr.json", {"seconds": 2.0, "cpu": 1.5, **vars(trained)})
    return home, len(samples[0].of("train"))


def estimated(home):
    return estimates([load_result("dr", home / "evaluate/dr")], files.run_records(home / "runs"))


def test_an_estimate_by_hand(made):
    home, samples = made
    [found] = estimated(home)
    record = json.loads((home / "runs/extract/b.json").read_text())
    steps = EPOCHS * -(-samples // BATCH)
    images = 3 * steps * BATCH * 2 + 3 * steps * BATCH
    assert (found.heads, found.images) == (6, images)
    assert found.theirs["seconds"] == pytest.approx(images / (record["forward_images"] / record["forward_seconds"]))
    assert found.times("seconds") == pytest.approx(found.theirs["seconds"] / 2.0)
    assert found.times("cpu") == pytest.approx(images * record["forward_cpu"] / record["forward_images"] / 1.5)
    assert found.times("seconds", "shared") == pytest.approx(found.theirs["seconds"] / 11.0)


@pytest.mark.parametrize(
    ("record", "change", "expected"),
    [
        ("extract/b", {"kept_shards": 1}, "only the extraction is unknown"),
        ("extract/b", {"taken": 5}, "only the extraction is unknown"),
        ("train_classifier/dr", {"resumed_steps": 3}, "ours is unknown"),
        ("train_classifier/dr", {"cpu": None}, "ours is known by the clock"),
        ("extract/b", {"fingerprint": "f" * 64}, "none"),
        ("extract/b", {"forward_images": 0, "forward_seconds": 0.0}, "none"),
        ("train_classifier/dr", {"steps": 0}, "none"),
    ],
)
def test_what_was_not_measured_is_not_reckoned_with(made, tmp_path, record, change, expected):
    home, _ = made
    for name in ("extract/b", "train_classifier/dr"):
        facts = json.loads((home / f"runs/{name}.json").read_text()) | (change if name == record else {})
        path = tmp_path / "runs" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(facts))
    found = estimates([load_result("dr", home / "evaluate/dr")], files.run_records(tmp_path / "runs"))
    if expected == "none":
        assert found == []
        return
    known = [bool(found[0].times(c, of)) for of in ("ours", "shared") for c in ("seconds", "cpu")]
    assert (
        known
        == {
            "only the extraction is unknown": [True, True, False, False],
            "ours is unknown": [False, False, False, False],
            "ours is known by the clock": [True, False, True, False],
        }[expected]
    )


def test_records_of_an_earlier_version_give_no_estimate(made, tmp_path):
    """They name neither fingerprint nor forward passes."""
    for name in ("extract/b", "train_classifier/dr"):
        (tmp_path / "runs" / name).parent.mkdir(parents=True)
        (tmp_path / f"runs/{name}.json").write_text('{"seconds": 3.0, "rows": 7, "steps": 4}')
    assert estimates([load_result("dr", made[0] / "evaluate/dr")], files.run_records(tmp_path / "runs")) == []

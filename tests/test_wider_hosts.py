"""What hosts may ask for beyond a batch: training features first, a second sampler, progress, a change of receivers."""

import numpy as np
import pytest
import torch
from conformance import CHANNELS, COUNTS, make_host
from pipeline_builders import (
    CPU,
    distance,
    fitted,
    make_backbone_dir,
    make_stack,
    make_stage2_cache,
    make_stage2_rows,
    one_line,
    pooled_copy,
    run_host,
    silent,
    taken,
    trained,
)
from test_streams import column, make_streams

from h2t.cache.reader import open_cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Choice, Feed
from h2t.pipeline.heads.stored import HeadParts, build_head
from h2t.pipeline.networks.classifier import global_average


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_stage2_cache(tmp_path_factory.mktemp("wider") / "c", counts=COUNTS, shape=(CHANNELS, 2, 2))


def test_partners_are_drawn_apart_from_donors_and_read_like_receivers():
    rows = make_stage2_rows(counts=(40, 12, 5), views=2)
    streams = make_streams(rows, partner="instance", batch_size=8)
    assert streams.step_rows == 2 * 4 * 8
    for step in range(streams.steps):
        batch = streams.batch(0, step)
        assert set(column(rows, "statistics", batch.partners.ravel())) == {"balanced"}
        assert set(column(rows, "split", batch.partners.ravel())) == {"train"}
        assert np.array_equal(column(rows, "label", batch.partners), batch.partner_labels)
        donors = column(rows, "sample", batch.donors[:, 0])  # instance-wise, too
        assert not np.array_equal(column(rows, "sample", batch.partners), donors)
    whole = np.concatenate([streams.batch(0, step).partners for step in range(streams.steps)], 1)
    for seed in range(2):
        assert len(set(column(rows, "sample", whole[seed]))) == 57
    usual = make_streams(rows, batch_size=8)
    ours, theirs = streams.batch(1, 2), usual.batch(1, 2)
    assert np.array_equal(ours.receivers, theirs.receivers)
    assert np.array_equal(ours.donors, theirs.donors)
    assert usual.batch(0, 0).partners.size == 0


def test_samples_are_places_in_the_features_that_were_prepared(cache):
    with open_cache(cache) as opened:
        streams = make_streams(opened.rows, class_names=list("abcd"), batch_size=8)
        features = opened.read(streams.receivers.first)
        batch = streams.batch(0, 1)
        assert np.array_equal(features[batch.samples.ravel()], opened.read(batch.receivers.ravel()))


@pytest.mark.parametrize("budget", [1, 20_000])
def test_streaming_reads_partners_too(cache, budget):
    with open_cache(cache) as opened:
        reader = FeatureReader(opened, global_average)
        streams = make_streams(opened.rows, class_names=list("abcd"), partner="reverse")
        feeds = [Feed(streams, reader, Choice(tier, "test"), budget, CPU, silent) for tier in ("memory", "stream")]
        for kept, read in zip(*(feed.steps(1) for feed in feeds), strict=True):
            assert torch.equal(taken(kept.table, kept.batch.partners), taken(read.table, read.batch.partners))


def test_progress_is_the_share_of_finished_epochs(cache, monkeypatch):
    seen = []
    isda = plugins.load("hosts", "isda").Host
    original = isda.batch_loss

    def listening(self, state, batch):
        seen.append(batch.progress)
        return original(self, state, batch)

    monkeypatch.setattr(isda, "batch_loss", listening)
    stack = make_stack(cache, [{}], **make_host("isda").options, batch_size=64)
    trained(stack, epochs=4)
    assert seen == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("name", ["smote", "feature_transfer", "cam_split"])
def test_receivers_are_changed_before_fusion(cache, name):
    """With all channels replaced nothing of the receivers is left, so the host trains like DR."""
    heads = [{"ratio": 0.0}, {"ratio": 1.0}]
    made = make_host(name)
    stack = make_stack(cache, heads, **made.options, batch_size=16, dtype=torch.float64)
    usual = make_stack(cache, heads, **{**made.options, "host": "dr"}, batch_size=16, dtype=torch.float64)
    (ours, _), (theirs, _) = trained(stack), trained(usual)
    assert distance(ours["weight"][1], theirs["weight"][1]) < 1e-12
    assert distance(ours["weight"][0], theirs["weight"][0]) > 1e-6


MIXING = [{"ratio": 0.5, "selection": "mixup"}]


def test_changed_maps_are_pooled_before_each_head_gets_a_copy(cache):
    """To the same bits; feature mixup rounds otherwise, so it keeps maps."""
    heads = [{"ratio": r, "seed": s, "selection": c} for r in (0, 0.5) for s in (0, 1) for c in ("random", "shuffled")]
    made = make_host("cam_split")
    ours, theirs, mixing = (make_stack(cache, h, **made.options, batch_size=16) for h in (heads, heads, MIXING))
    assert (ours._pools, mixing._pools) == (True, False)
    theirs._pools = False
    (pooled, _), (whole, _) = trained(ours), trained(theirs)
    assert all(torch.equal(pooled[name], whole[name]) for name in whole)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A cache of whole maps, a pooled copy, and their backbone."""
    folder = tmp_path_factory.mktemp("project")
    digest = make_backbone_dir(folder / "b", classes=len(COUNTS))
    cache = make_stage2_cache(folder / "c", counts=COUNTS, shape=(64, 2, 2), backbone=digest)
    pooled_copy(folder / "pooled", cache)
    return folder


@pytest.mark.parametrize(
    ("cache", "section", "text"),
    [
        ("c", {"host": "smote", "pool": "attention"}, "hosts.dr.pool: host smote changes features before fusion"),
        ("pooled", {"host": "reslt", "pool": "moments"}, "this host needs whole maps; got a pooled cache"),
        ("pooled", {"host": "cam_split"}, "host cam_split needs whole maps; got a pooled cache"),
        (
            "c",
            {"host": "influence_balanced", "classifier": "cosine"},
            "classifier: host influence_balanced needs a linear",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, project, cache, section, text):
    with one_line(match=rf"(?=hosts\.dr\b).*{text}"):
        run_host(tmp_path / "h", project / cache, project / "b", **section)
    assert not (tmp_path / "h").exists()


def test_a_change_before_fusion_does_not_go_with_layers_behind_the_pool():
    parts = HeadParts("smote", {}, "linear", 1.0, "gap", {}, "hosts.h")
    with pytest.raises(UserError, match=r"hosts\.h\.host: smote changes what its classifier gets before fusion"):
        build_head(parts, Context(torch.tensor(COUNTS), 8, 1), 8, frozen=lambda features: features)


@pytest.mark.parametrize("name", ["oltr", "meta_saug", "cam_split"])
def test_the_stage_trains_it_in_parts_as_at_once(tmp_path, project, name):
    """Each part looks at the training features anew."""
    said = []
    place = (project / "c", project / "b")
    one = fitted(tmp_path / "one", *place, host=name, optimiser={"epochs": 1})
    small = {"say": said.append, "residency": {"stack_bytes": 1}}
    many = fitted(tmp_path / "many", *place, host=name, optimiser={"epochs": 1}, **small)
    assert any("4 classifiers in 4 parts" in line for line in said)
    for key, tensor in one.items():
        assert distance(many[key], tensor) <= 1e-5

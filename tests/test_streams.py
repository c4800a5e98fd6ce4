import numpy as np
import pytest
from pipeline_builders import make_stage2_rows
from scipy.stats import chisquare

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads.batches import Streams, sample_rows
from h2t.pipeline.stages.prepare import Imbalance, long_tailed_counts

LIKELY = 1e-5
DONORS = {"instance": "instance", "balanced": "balanced"}


def make_streams(rows=None, **overrides):
    """`rows`: a row table, or what to override in the default one."""
    rows = make_stage2_rows(**(rows or {})) if rows is None or isinstance(rows, dict) else rows
    classes = len(set(rows["label"].to_pylist()))
    values = {
        "class_names": [str(j) for j in range(classes)],
        "receiver_statistics": "balanced",
        "donor_statistics": DONORS,
        "seeds": [0, 1],
        "batch_size": 4,
    }
    return Streams(rows, **{**values, **overrides})


def column(rows, name, at):
    return np.array(rows[name])[at]


def whole_epoch(streams, epoch=0):
    batches = [streams.batch(epoch, step) for step in range(streams.steps)]
    return (
        np.concatenate([b.receivers for b in batches], 1),
        np.concatenate([b.labels for b in batches], 1),
        np.concatenate([b.donors for b in batches], 2),
    )


@pytest.mark.parametrize("counts", [(1,), (1, 1), (5, 2)])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_an_epoch_has_as_many_items_as_samples(counts, batch_size):
    streams = make_streams(rows={"counts": counts}, batch_size=batch_size)
    sizes = [streams.batch(0, step).labels.shape[1] for step in range(streams.steps)]
    assert sum(sizes) == sum(counts)
    assert len(sizes) == -(-sum(counts) // batch_size)
    assert all(size == batch_size for size in sizes[:-1])
    assert 1 <= sizes[-1] <= batch_size


@pytest.mark.parametrize("batch_size", [1, 3, 4, 5, 15, 16, 17, 100])
def test_instance_donors_are_a_permutation_of_the_samples_each_epoch(batch_size):
    """Also with a partial last batch, which takes what is left."""
    rows = make_stage2_rows(views=2)
    streams = make_streams(rows, batch_size=batch_size)
    for epoch in range(3):
        donors = whole_epoch(streams, epoch)[2]
        for seed in range(2):
            assert sorted(column(rows, "sample", donors[seed, 0])) == sorted(set(column(rows, "sample", donors[0, 0])))
            assert len(set(column(rows, "sample", donors[seed, 0]))) == 16
    assert not np.array_equal(whole_epoch(streams, 0)[2], whole_epoch(streams, 1)[2])


def test_every_branch_reads_its_own_statistics_of_the_training_split_and_labels_are_the_receivers():
    rows = make_stage2_rows(views=(1, 2, 3))
    receivers, labels, donors = whole_epoch(make_streams(rows))
    assert set(column(rows, "split", receivers.ravel())) == {"train"}
    assert set(column(rows, "statistics", receivers.ravel())) == {"balanced"}
    assert set(column(rows, "statistics", donors[:, 0].ravel())) == {"instance"}
    assert set(column(rows, "statistics", donors[:, 1].ravel())) == {"balanced"}
    assert np.array_equal(column(rows, "label", receivers.ravel()), labels.ravel())


def test_any_step_can_be_drawn_without_the_ones_before_it():
    rows = make_stage2_rows(views=2)
    whole = make_streams(rows)
    seen = {(e, s): whole.batch(e, s) for e in range(3) for s in range(whole.steps)}
    for at in [(2, 3), (0, 0), (1, whole.steps - 1)]:
        alone = make_streams(rows).batch(*at)
        for name in ("receivers", "labels", "donors"):
            assert np.array_equal(getattr(alone, name), getattr(seen[at], name))


def test_batches_of_a_window_are_those_of_each_step():
    streams = make_streams(make_stage2_rows(views=2), seeds=list(range(40)), partner="reverse")
    steps = range(1, streams.steps)
    for step, one in zip(steps, streams.batches(2, steps), strict=True):
        alone = streams.batch(2, step)
        assert all(np.array_equal(getattr(one, name), getattr(alone, name)) for name in vars(alone))


def test_batches_of_a_seed_hang_on_no_other_seed_or_donor():
    rows = make_stage2_rows(views=2)
    together = make_streams(rows, seeds=[5, 0, 9]).batch(1, 2)
    alone = make_streams(rows, seeds=[9], donor_statistics={"balanced": "balanced"}).batch(1, 2)
    assert np.array_equal(together.receivers[2], alone.receivers[0])
    assert np.array_equal(together.donors[2, 1], alone.donors[0, 0])
    assert not np.array_equal(together.receivers[0], together.receivers[1])


def test_receivers_and_a_balanced_donor_are_drawn_apart():
    streams = make_streams(rows={"counts": (300, 200)}, batch_size=64)
    receivers, _, donors = whole_epoch(streams)
    assert np.mean(receivers[0] == donors[0, 1]) < 0.05  # by chance 1 in 250


def test_receiver_classes_are_uniform_and_samples_and_views_uniform_within():
    rows = make_stage2_rows(counts=(60, 12, 3), views=(1, 2, 5))
    streams = make_streams(rows, batch_size=16, seeds=[0])
    drawn = [whole_epoch(streams, epoch) for epoch in range(80)]
    labels = np.concatenate([d[1][0] for d in drawn])
    receivers = np.concatenate([d[0][0] for d in drawn])
    assert chisquare(np.bincount(labels, minlength=3)).pvalue > LIKELY
    for label, views in ((0, 60), (1, 24), (2, 15)):
        found = np.unique(receivers[labels == label], return_counts=True)[1]
        assert len(found) == views
        assert chisquare(found).pvalue > LIKELY
    donors = np.concatenate([d[2][0, 0] for d in drawn])
    for view_count, label in ((2, 1), (5, 2)):
        at = donors[column(rows, "label", donors) == label]
        assert chisquare(np.bincount(column(rows, "view", at), minlength=view_count)).pvalue > LIKELY


def test_receivers_and_donors_share_no_view_stream():
    """Were both branches to draw their views from one stream, views would agree at every place."""
    rows = make_stage2_rows(counts=(50,), views=4)
    receivers, _, donors = whole_epoch(make_streams(rows, batch_size=50))
    same = column(rows, "view", receivers[0]) == column(rows, "view", donors[0, 0])
    assert 0 < same.sum() < 30


# Section 1.3 of the reference facts: C100-LT, exact by arithmetic on the counts
@pytest.mark.parametrize(
    ("ratio", "donor_is_head", "donor_more_frequent"), [(50, 0.775, 0.762), (100, 0.823, 0.791), (200, 0.861, 0.814)]
)
def test_pair_statistics_of_the_paper(ratio, donor_is_head, donor_more_frequent):
    counts = np.array(long_tailed_counts(500, 100, Imbalance(profile="exponential", ratio=float(ratio))))
    rows = make_stage2_rows(counts=counts, val=0, test=0)
    streams = make_streams(rows, batch_size=128, seeds=[0], donor_statistics={"instance": "instance"})
    share = counts / counts.sum()
    assert round(share[:36].sum(), 3) == donor_is_head
    more = np.array([share[counts > n].sum() for n in counts]).mean()
    assert round(more, 3) == donor_more_frequent

    epochs = [whole_epoch(streams, e) for e in range(5)]
    labels = np.concatenate([e[1][0] for e in epochs])
    donor_labels = np.concatenate([column(rows, "label", e[2][0, 0]) for e in epochs])
    n = len(labels)
    for epoch in epochs:  # a permutation: exactly this share, in every epoch
        assert np.mean(column(rows, "label", epoch[2][0, 0]) < 36) == pytest.approx(share[:36].sum(), abs=1e-12)
    # Receivers are independent of donors: same class with probability 1 / C, within 5 standard deviations.
    same = np.mean(labels == donor_labels)
    assert abs(same - 0.01) < 5 * np.sqrt(0.01 * 0.99 / n)
    frequent = np.mean(counts[donor_labels] > counts[labels])
    assert abs(frequent - more) < 5 * np.sqrt(more * (1 - more) / n)


def test_steps_of_the_reference():
    for ratio, steps in ((200, 75), (100, 85), (50, 99)):
        counts = long_tailed_counts(500, 100, Imbalance(profile="exponential", ratio=float(ratio)))
        assert -(-sum(counts) // 128) == steps
        streams = make_streams(make_stage2_rows(counts=counts, val=0, test=0), batch_size=128)
        assert streams.steps == steps


def test_sample_rows_groups_views():
    rows = make_stage2_rows(counts=(2, 1), views=(1, 3), test=1, val=0)
    found = sample_rows(rows, "train", "instance")
    assert found.views.tolist() == [1, 1, 3]
    assert found.labels.tolist() == [0, 0, 1]
    for first, views, sample in zip(found.first, found.views, found.samples, strict=True):
        assert set(column(rows, "sample", np.arange(first, first + views))) == {sample}
    assert sample_rows(rows, "test", "stage1").views.tolist() == [1, 1]


def test_missing_statistics_say_what_there_is_and_what_to_do():
    with pytest.raises(UserError) as error:
        sample_rows(make_stage2_rows(), "train", "reverse")
    assert str(error.value) == (
        "cache: has no train rows under 'reverse' statistics (it has: balanced, instance); "
        "add the recipe to extract.batchnorm and extract again"
    )


def test_a_class_without_training_samples_is_refused():
    rows = make_stage2_rows(counts=(2, 0, 1))
    with pytest.raises(UserError, match=r"^class 1: must have at least one training sample"):
        make_streams(rows)


def test_all_rows_are_listed_once_and_every_batch_stays_within():
    rows = make_stage2_rows(views=(1, 2, 3))
    streams = make_streams(rows)
    listed = streams.rows
    assert np.array_equal(listed, np.unique(listed))
    assert set(column(rows, "split", listed)) == {"train"}
    receivers, _, donors = whole_epoch(streams)
    assert set(receivers.ravel()) | set(donors.ravel()) <= set(listed)


def test_samplers_are_loaded_once_and_not_at_every_draw(tmp_path, monkeypatch):
    """A look at the disk for each draw makes Python's table of interned path parts grow over thousands of steps."""
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    plugin = tmp_path / "samplers" / "first.py"
    plugin.parent.mkdir()
    plugin.write_text(
        "import numpy as np\n\ndef draw(index, streams, epoch, step, size):\n    return np.zeros(size, int)\n"
    )
    rows = make_stage2_rows()
    first = min(column(rows, "sample", np.array(rows["split"]) == "train"))
    streams = make_streams(rows, donor_statistics={"first": "instance"})
    plugin.unlink()
    donors = whole_epoch(streams)[2]
    assert set(column(rows, "sample", donors.ravel())) == {first}

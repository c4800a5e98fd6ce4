"""The realised inclusion of every sample over a whole streaming run, against the exact law of both samplers.

The same test refuses two biases of published loaders (scverse/annbatch issues 273 and 271): runs of a class chosen
uniformly whatever their length, and batches that are no multiple of the block that is read. The second includes every
row as often as it should; it is the independence of draws that it breaks.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from pipeline_builders import CPU, make_stage2_cache, silent
from scipy.stats import chi2, chisquare, norm

from h2t.cache.reader import open_cache
from h2t.pipeline.heads.batches import Streams
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.residency import Choice, Feed

COUNTS = np.array([60, 25, 10, 4, 1])
LABELS = np.repeat(np.arange(5), COUNTS)
N = len(LABELS)
EPOCHS, BATCH, SEEDS = 60, 16, 4
LIKELY = 1e-4  # the seeds are fixed, so a test that passes once passes always

BALANCED = 1 / (len(COUNTS) * COUNTS[LABELS])
INSTANCE = np.full(N, 1 / N)


def distance(seen: np.ndarray, law: np.ndarray) -> float:
    """Total variation between the realised frequencies and the law."""
    return float(np.abs(seen / seen.sum() - law).sum() / 2)


def audit(draws: np.ndarray, law: np.ndarray) -> None:
    """Fails unless `draws` (steps, batch) could be independent draws of samples by `law`.

    Inclusion of each sample by chi-square, and its total variation below what such draws exceed once in ten thousand
    times. Then what a loader with the right inclusion can still get wrong: the class counts of single batches, and the
    classes on either side of the cut between two batches.
    """
    seen = np.bincount(draws.ravel(), minlength=N)
    assert chisquare(seen, law * draws.size).pvalue > LIKELY
    share = law * (1 - law) / draws.size
    mean, spread = np.sqrt(2 / np.pi * share).sum() / 2, np.sqrt((1 - 2 / np.pi) * share.sum()) / 2
    assert distance(seen, law) < mean + norm.isf(LIKELY) * spread
    expected = np.bincount(LABELS, law) * draws.shape[1]
    counts = np.stack([np.bincount(LABELS[batch], minlength=len(COUNTS)) for batch in draws])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(draws) * (len(COUNTS) - 1)
    assert chi2.sf(statistic, freedom) > LIKELY
    assert chi2.cdf(statistic, freedom) > LIKELY


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a streaming run handed out: samples of receivers and donors (seeds, items), by the features themselves."""

    def label_maps(maps, rows):
        maps[0][:] = np.array(rows["sample"])[:, None, None, None]

    folder = make_stage2_cache(
        tmp_path_factory.mktemp("draws") / "c", counts=tuple(COUNTS), views=(1, 1, 1, 2, 3), val=0, change=label_maps
    )
    with open_cache(folder) as cache:
        names = cache.spec.provenance["classes"]
        streams = Streams(cache.rows, names, "balanced", {"instance": "instance"}, list(range(SEEDS)), BATCH)
        feed = Feed(streams, FeatureReader(cache, None), Choice("stream", "test"), 100_000, CPU, silent)
        first = int(streams.receivers.samples.min())
        assert (np.sort(streams.receivers.samples) - first == np.arange(N)).all()
        receivers, donors, labels = [], [], []
        for at in feed.steps(EPOCHS):
            x = at.table.take(at.batch.receivers)[:, 0, :, 0, 0, 0].numpy()
            y = at.table.take(at.batch.donors)[:, 0, 0, :, 0, 0, 0].numpy()
            receivers.append(x.astype(np.int64) - first)
            donors.append(y.astype(np.int64) - first)
            labels.append(at.batch.labels)
        assert feed.meter.hits > 0
    return receivers, donors, labels


def whole(batches, seed=None) -> np.ndarray:
    """The batches of full size, of one seed or of all of them, (steps, BATCH)."""
    full = [b for b in batches if b.shape[1] == BATCH]
    return np.concatenate(full if seed is None else [b[seed : seed + 1] for b in full])


def test_receivers_follow_the_class_balanced_law(run):
    receivers, _, labels = run
    audit(whole(receivers), BALANCED)
    for seed in range(SEEDS):
        audit(whole(receivers, seed), BALANCED)
    for samples, given in zip(receivers, labels, strict=True):
        assert (LABELS[samples] == given).all()


def test_donors_follow_the_instance_law(run):
    """Every sample exactly once an epoch: the total variation over a run is 0, and batches are as if shuffled."""
    donors = run[1]
    steps = -(-N // BATCH)
    for epoch in range(EPOCHS):
        items = np.concatenate(donors[epoch * steps : (epoch + 1) * steps], 1)
        assert (np.sort(items, 1) == np.arange(N)).all()
    everything = np.concatenate([d.ravel() for d in donors])
    assert distance(np.bincount(everything, minlength=N), INSTANCE) == 0
    # Which sample comes first in an epoch is a draw of the law as well, independent between epochs and seeds.
    firsts = np.concatenate([donors[epoch * steps][:, 0] for epoch in range(EPOCHS)])
    assert chisquare(np.bincount(LABELS[firsts], minlength=5), COUNTS / N * len(firsts)).pvalue > LIKELY


# --- biased loaders, as published ones are


def by_runs(draws: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """Bias A: a class, then one of its runs on disk uniformly, then a row of the run. Rows of short runs come often."""
    runs = {label: np.split(np.flatnonzero(label == LABELS), [2]) for label in range(5) if COUNTS[label] > 2}
    for _ in range(steps):
        batch = []
        for label in draws.integers(5, size=BATCH):
            parts = runs.get(int(label), [np.flatnonzero(label == LABELS)])
            batch.append(draws.choice(parts[draws.integers(len(parts))]))
        yield np.array(batch)


def by_blocks(draws: np.random.Generator, steps: int, block: int) -> Iterator[np.ndarray]:
    """Bias B: blocks of neighbouring rows of one class, classes in balance, one after the other, cut into batches.

    In the long run every row comes as often as it should; but a batch that is no multiple of the block ends within one,
    and the next batch begins with the rest, so neither the draws of a batch nor the batches are independent.
    """
    starts = np.cumsum(COUNTS) - COUNTS
    labels = draws.integers(5, size=-(-steps * BATCH // block))
    firsts = draws.integers(COUNTS[labels])
    within = (firsts[:, None] + np.arange(block)) % COUNTS[labels][:, None]  # round the end: no row is at an edge
    rows = (starts[labels][:, None] + within).ravel()[: steps * BATCH]
    yield from rows.reshape(steps, BATCH)


def exact(draws: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """The law itself, without any of our code: shows that the audit passes what it should."""
    for _ in range(steps):
        yield draws.choice(N, size=BATCH, p=BALANCED)


@pytest.mark.parametrize("seed", range(6))
def test_the_audit_passes_exact_draws(seed):
    audit(np.stack(list(exact(np.random.default_rng(seed), EPOCHS * 6))), BALANCED)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(by_runs, id="A: runs chosen uniformly"),
        pytest.param(lambda draws, steps: by_blocks(draws, steps, 5), id="B: batch no multiple of the block"),
    ],
)
def test_the_audit_refuses_published_biases(loader, seed):
    with pytest.raises(AssertionError):
        audit(np.stack(list(loader(np.random.default_rng(seed), EPOCHS * 6))), BALANCED)

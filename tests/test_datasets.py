"""Digits and the long-tailed subset; datasets made of files have tests of their own."""

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_builders import make_prepare, make_samples
from sklearn.datasets import load_digits

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.datasets import digits
from h2t.pipeline.stages import prepare
from h2t.pipeline.stages.prepare import Imbalance, long_tailed_counts


def counts(largest, classes, ratio, profile="exponential"):
    return long_tailed_counts(largest, classes, Imbalance(profile=profile, ratio=float(ratio)))


# section 4.1 of the reference facts: classes, n_1, ratio -> N, n_min
@pytest.mark.parametrize(
    ("classes", "largest", "ratio", "total", "smallest"),
    [
        (100, 500, 200, 9502, 2),
        (100, 500, 100, 10847, 5),
        (100, 500, 50, 12608, 10),
        (100, 500, 10, 19573, 50),
        (10, 5000, 200, 11203, 25),
        (10, 5000, 100, 12406, 50),
        (10, 5000, 50, 13996, 100),
        (10, 5000, 10, 20431, 500),
    ],
)
def test_counts_of_the_reference(classes, largest, ratio, total, smallest):
    found = counts(largest, classes, ratio)
    assert (sum(found), min(found), found[0]) == (total, smallest, largest)
    assert found == sorted(found, reverse=True)


def test_counts_by_name():
    assert counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts(100, 4, 10, "step") == [100, 100, 10, 10]
    assert counts(7, 1, 100) == [7]
    assert counts(7, 2, 1) == [7, 7]


def test_digits_are_split_disjointly_and_long_tailed(tmp_path):
    samples, _ = make_samples(tmp_path / "s", test_per_class=40, validation_per_class=14)
    assert samples.counts[0] == 120
    assert samples.counts[-1] == 3
    assert samples.counts == sorted(samples.counts, reverse=True)
    sources = samples.table["source"].to_pylist()
    assert len(set(sources)) == len(sources)
    labels = samples.labels
    assert np.bincount(labels[samples.of("test")]).tolist() == [40] * 10
    assert np.bincount(labels[samples.of("val")]).tolist() == [14] * 10
    assert np.bincount(labels[samples.of("train")]).tolist() == samples.counts
    target = load_digits().target
    for i, source in enumerate(sources):
        assert samples.facts["classes"][labels[i]] == str(target[int(source[-4:])])
    keys = list(zip(*(samples.table[k].to_pylist() for k in ("split", "label", "source")), strict=True))
    assert keys == sorted(keys)
    read = digits.reader(digits.Options())
    for i in range(0, len(sources), 50):
        assert samples.table["digest"][i].as_py() == hashlib.sha256(read(sources[i])).hexdigest()


def test_the_subset_is_the_reference_rule(tmp_path):
    """One legacy RandomState through the classes in order: shuffle in place, keep the first n_j."""
    samples, _ = make_samples(tmp_path / "s", test_per_class=40, validation_per_class=0)
    label = load_digits().target
    held_out = {int(samples.table["source"][int(i)].as_py()[-4:]) for i in samples.of("test")}
    draws = np.random.RandomState(0)
    expected = set()
    members = [np.array([i for i in np.flatnonzero(label == j) if i not in held_out]) for j in range(10)]
    for indices, n in zip(members, counts(min(map(len, members)), 10, 40), strict=True):
        draws.shuffle(indices)
        expected |= set(indices[:n].tolist())
    assert {int(samples.table["source"][int(i)].as_py()[-4:]) for i in samples.of("train")} == expected


def test_prepare_repeats_to_the_byte_and_hangs_on_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare.run(make_prepare(), Run("prepare", tmp_path / name, seed=seed))
    a, b, c = ((tmp_path / n / "samples.parquet").read_bytes() for n in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "classes.json").read_bytes() == (tmp_path / "b" / "classes.json").read_bytes()


def test_class_order_is_stable_and_descending(tmp_path):
    make_samples(tmp_path / "s", imbalance={"profile": "step", "ratio": 10.0})
    facts = json.loads((tmp_path / "s" / "classes.json").read_text())
    assert facts["order"] == list(range(10))  # ties keep the native order
    assert set(facts["groups"]) == {"paper_index", "paper_threshold", "oltr"}


def test_samples_of_another_dataset_are_refused(digits):
    samples, _ = digits
    with pytest.raises(UserError, match="must be 'digits', as the samples were prepared from it; got 'parquet'"):
        samples.images({"dataset": "parquet", "options": {"train": ["x"]}})


def test_samples_prepared_with_another_transform_are_refused(digits):
    samples, _ = digits
    other = dataclasses.replace(
        samples, facts={**samples.facts, "transform": {**samples.facts["transform"], "size": 7}}
    )
    with pytest.raises(
        UserError, match=r"transform\.size: must be 7, as the samples were prepared with it; got 8; prepare"
    ):
        other.images({"dataset": "digits"})


def drop_a_name(folder):
    facts = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps({**facts, "classes": facts["classes"][:-1]}))


def take_other_counts(folder):
    facts = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps({**facts, "counts": [*facts["counts"][:-1], 2]}))


def drop_digests(folder):
    table = pq.read_table(folder / "samples.parquet")
    pq.write_table(table.drop_columns("digest"), folder / "samples.parquet")


def leave_out_a_digest(folder):
    table = pq.read_table(folder / "samples.parquet")
    digests = [None, *table["digest"].to_pylist()[1:]]
    pq.write_table(table.set_column(4, "digest", pa.array(digests, pa.string())), folder / "samples.parquet")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_a_name, "classes.json and samples.parquet do not match"),
        (take_other_counts, "classes.json and samples.parquet do not match"),
        (lambda folder: (folder / "classes.json").write_text("[]"), "classes.json and samples.parquet do not match"),
        (drop_digests, "samples.parquet has other columns than prepare writes"),
        (leave_out_a_digest, "samples.parquet has other columns than prepare writes"),
    ],
)
def test_samples_and_class_facts_of_different_runs_are_refused(tmp_path, damage, says):
    make_samples(tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(UserError, match=f"{says}; run h2t prepare again"):
        load_samples(tmp_path / "s")


def test_digits_are_grey_and_span_the_range():
    images = [digits.decode(digits.reader(digits.Options())(f"digits/{i:04}")) for i in range(20)]
    stack = np.stack(images)
    assert stack.shape == (20, 8, 8, 3)
    assert stack.dtype == np.uint8
    assert (stack[..., 0] == stack[..., 2]).all()
    assert (stack.min(), stack.max()) == (0, 255)

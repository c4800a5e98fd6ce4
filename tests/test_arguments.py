"""What h2t.api and h2t.estimator are given: the right result from every kind of column, one line for all else."""

import datetime
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pipeline_builders import one_line

from h2t import api, arguments
from h2t.cache.reader import open_cache
from h2t.estimator import H2TClassifier
from h2t.features import Features

X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
Y = list("aababb")
NUMBERS = [0, 0, 1, 0, 1, 1]

COLUMNS: dict[str, Callable[[list], object]] = {
    "array": np.array,
    "objects": lambda values: np.array(values, object),
    "arrays of no axis": lambda values: [np.array(value) for value in values],
    "iterator": iter,
    "series": lambda values: pd.Series(values, index=range(9, 15)),
    "categories": pd.Categorical,
    "categories of a series": lambda values: pd.Series(pd.Categorical(values)),
    "index": pd.Index,
    "arrow": pa.array,
    "arrow in chunks": lambda values: pa.chunked_array([values[:2], values[2:]]),
    "arrow by code": lambda values: pa.array(values).dictionary_encode(),
}
NO_COLUMNS: dict[str, tuple[object, str]] = {
    "none": (5, "must be a list of one value for each row; got int"),
    "no axis": (np.array("a"), "must be one column; got shape ()"),
    "two axes": (np.array([Y, Y]).T, "must be one column; got shape (6, 2)"),
    "one column of two axes": (np.array(Y)[:, None], "must be one column; got shape (6, 1)"),
    "table": (pd.DataFrame({"a": Y}), "must be one column; got shape (6, 1)"),
    "text": ("aababb", "must be a list of one value for each row; got str"),
    "bytes": (b"aababb", "must be a list of one value for each row; got bytes"),
    "mapping": (dict(enumerate(Y)), "must be a list of one value for each row; got dict"),
    "set": (set(range(6)), "must be a list of one value for each row; got set"),
    "empty": ([], "must have one value for each of 6 rows; got 0"),
    "short": (Y[1:], "must have one value for each of 6 rows; got 5"),
    "lists": ([*Y[:5], ["b"]], "must be one text or number for each row; row 5 has ['b']"),
    "bytes inside": ([*Y[:5], b"b"], "must be one text or number for each row; row 5 has b'b'"),
    "NUL": ([*Y[:5], "b\0"], r"row 5 has 'b\x00', which no file can hold as text"),
    "half a character": ([*Y[:5], "\ud800"], r"row 5 has '\ud800', which no file can hold as text"),
}


@pytest.mark.parametrize("make", COLUMNS.values(), ids=COLUMNS)
def test_every_kind_of_column_is_read_alike(make, tmp_path):
    sources = [f"image {i}" for i in range(6)]
    split = ["train", "test", "train", "train", "train", "test"]
    api.write_cache(tmp_path / "a", X, Y, split=split, source=sources)
    api.write_cache(tmp_path / "b", X, make(Y), split=make(split), source=make(sources))
    with open_cache(tmp_path / "a") as a, open_cache(tmp_path / "b") as b:
        assert a.spec == b.spec
        assert a.rows.equals(b.rows)
    assert arguments.column("groups", make(Y), 6) == Y


def test_tensors_hold_the_numbers_of_classes():
    assert arguments.column("labels", torch.tensor(NUMBERS), 6) == NUMBERS
    assert arguments.column("labels", list(torch.tensor(NUMBERS)), 6) == NUMBERS


@pytest.mark.parametrize("name", ["labels", "split", "groups", "source"])
@pytest.mark.parametrize(("given", "says"), NO_COLUMNS.values(), ids=NO_COLUMNS)
def test_what_is_no_column_is_one_line(name, given, says, tmp_path):
    with one_line(f"{name}: {says}"):
        if name == "groups":
            api.compare(X, Y, groups=given)
        else:
            api.write_cache(tmp_path / "c", X, **{"labels": Y, name: given})
    assert not (tmp_path / "c").exists()


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "labels that are missing": (lambda _: api.compare(X, [*Y[:5], None]), "labels: must be texts or whole numbers"),
    "labels that are dates": (
        lambda out: api.write_cache(out, X, np.array(["2020-01-01"] * 6, "M8[ns]")),
        "labels must be whole numbers or texts; got dtype datetime64[ns]",
    ),
    "names that are missing": (
        lambda out: api.write_cache(out, X, Y, source=["a", None, *"cdef"]),
        "source: must name each row; row 1 has no name",
    ),
    "names that are equal": (
        lambda out: api.write_cache(out, X, Y, source=Y),
        "source: must be a distinct name for each of 6 rows; got 2",
    ),
    "a sparse tensor": (lambda out: api.write_cache(out, torch.tensor(X).to_sparse(), Y), "features: must be numbers"),
    "features of fewer names": (lambda out: api.write_cache(out, Features(X, ["a"]), Y), "source: must have one value"),
    "no path": (lambda _: api.write_cache(5, X, Y), "out: must be a path; got 5"),
    "an empty path": (lambda _: api.write_cache("", X, Y), "out: must be a path; got an empty text"),
    "a path with NUL": (lambda _: api.load("a\0b"), r"folder: must be a path; got 'a\x00b'"),
    "a long path": (lambda _: api.extract_features("x" * 500), "path: must be a path; got a name of 500 characters"),
    "replace": (lambda out: api.write_cache(out, X, Y, replace="no"), "replace: must be True or False; got 'no'"),
    "a method": (lambda _: api.compare(X, Y, methods="crt"), "methods: must be a list of names of hosts"),
    "methods that are numbers": (lambda _: api.compare(X, Y, methods=[1]), "methods: must be a list of names of hosts"),
    "methods of no axis": (lambda _: api.compare(X, Y, methods=np.array("crt")), "methods: must be a list of names"),
    "two shares": (lambda _: api.compare(X, Y, test=np.array([0.1, 0.2])), "compare.test: must"),
    "no share": (lambda _: api.compare(X, Y, validation=[]), "compare.validation: must"),
    "say": (lambda _: api.compare(X, Y, say="x"), "say: must be a function of a text; got 'x'"),
    "a backbone": (lambda _: api.extract_features([X], backbone=None), "backbone: must be the name of a plug-in"),
    "weights": (lambda _: api.extract_features([X], weights=None), "weights: must be pretrained, none or a file"),
    "options": (lambda _: api.extract_features([X], options=[1]), "options: must be a mapping of keys; got [1]"),
    "input": (lambda _: api.extract_features([X], input=224), "input: must be a mapping of keys; got 224"),
    "a split of images": (
        lambda _: api.extract_features([X], split="test"),
        "split: must be train, val or test",
    ),
    "a label of images": (lambda _: api.extract_features([X], label="y"), "label: must be a column of a table"),
    "a set of images": (lambda _: api.extract_features({"a.png"}), "images: must be a list, which has an order"),
    "masked images": (
        lambda _: api.extract_features(np.ma.masked_equal(np.zeros((1, 8, 8), "u1"), 0)),
        "images: must have a value everywhere",
    ),
    "an image of no axis": (lambda _: api.extract_features(np.array(1)), "images: must be uint8 of shape"),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_one_line(call, says, tmp_path):
    with one_line(says):
        call(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_what_a_comparison_and_a_classifier_are_asked_for(tmp_path):
    x, y = np.concatenate([X, X + 5]), Y * 2
    compared = api.compare(x, y, methods=["crt"], ratios=pd.Series([0.0, 0.25]), seeds=torch.arange(2), epochs=1)
    assert compared.take("crt", ratio=np.float32(0.25), seed=torch.tensor(1)).head.table["seed"].to_pylist() == [1]
    for key, given in (("ratio", [0.25]), ("ratio", pd.NA), ("seed", np.array([0, 1])), ("seed", True), ("seed", {})):
        with one_line(f"{key}: must be a number; got "):
            compared.take("crt", **{key: given})
    with one_line("method: must be one of crt; got ['crt']"):
        compared.take(["crt"])
    one = compared.take("crt")
    for features in (x > 0, x.astype(complex), x.astype(str), x.astype("M8[s]"), np.zeros(12, "f4,f4")):
        with one_line("features: must be numbers; got "):
            one.predict_proba(features)
    for wrong, says in (({"top": "2"}, "top: must be a whole number"), ({"device": 1}, "device: must be auto, cpu")):
        with one_line(says):
            api.predict(one, x, **wrong)
    for wrong in ({"licence": ["MIT"]}, {"use": 5}):
        with one_line(": must be a text; got "):
            one.save(tmp_path / "m", **wrong)


MISSING = {
    "None": [*Y[:5], None],
    "NaN": [*Y[:5], float("nan")],
    "NA": pd.Series([*Y[:5], None], dtype="string"),
    "masked": np.ma.masked_array(NUMBERS, [False] * 5 + [True]),
}


@pytest.mark.parametrize("labels", MISSING.values(), ids=MISSING)
def test_the_estimator_refuses_labels_that_are_missing(labels):
    with pytest.raises(ValueError, match=r"y: must have a label for each row.*row 5 has none"):
        H2TClassifier("ncm").fit(X, labels)


@pytest.mark.parametrize("features", [np.zeros((6, 4), "M8[s]"), [[None] * 4] * 6], ids=["times", "None"])
def test_the_estimator_refuses_features_that_are_no_numbers(features):
    with pytest.raises(ValueError, match="X: must be numbers"):
        H2TClassifier("ncm").fit(features, Y)


def test_dates_stay_dates():
    days = np.array(["2020-01-01", "2020-01-02"], "M8[ns]")
    assert arguments.column("groups", days, 2) == list(days)
    assert arguments.plain(datetime.date(2020, 1, 1)) == datetime.date(2020, 1, 1)

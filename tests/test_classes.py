import numpy as np
import pytest

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.data.classes import GROUPS, by_index, class_index, describe_similar, groups
from h2t.pipeline.stages.prepare import Imbalance, long_tailed_counts


def sizes(group_of):
    return [group_of.count(g) for g in ("head", "medium", "tail")]


def exponential(largest, classes, ratio):
    return long_tailed_counts(largest, classes, Imbalance(profile="exponential", ratio=float(ratio)))


def test_index_of_one_class_with_one_sample():
    index = class_index(np.array([0]), ["a"])
    assert (index.classes, index.samples, index.starts.tolist(), index.counts.tolist()) == (1, 1, [0], [1])


def test_index_of_sorted_labels():
    index = class_index(np.array([0, 0, 0, 1, 2, 2]), ["a", "b", "c"])
    assert index.starts.tolist() == [0, 3, 4]
    assert index.counts.tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("labels", "names", "empty"), [([0, 2], "abc", "class b"), ([0, 1], "abc", "class c"), ([], "a", "class a")]
)
def test_an_empty_class_is_named(labels, names, empty):
    with pytest.raises(UserError) as error:
        class_index(np.array(labels, np.int64), list(names))
    assert str(error.value).startswith(empty)
    assert "\n" not in str(error.value)


# classes, largest, ratio, paper_threshold sizes, (medium, tail) sizes of oltr: section 4.1 of the reference facts
@pytest.mark.parametrize(
    ("classes", "largest", "ratio", "threshold", "oltr"),
    [
        (100, 500, 200, [30, 30, 40], [31, 39]),
        (100, 500, 100, [35, 34, 31], [35, 30]),
        (100, 500, 50, [41, 40, 19], [41, 18]),
        (100, 500, 10, [69, 31, 0], [31, 0]),
        (10, 5000, 200, [7, 3, 0], [3, 0]),
        (10, 5000, 100, [8, 2, 0], [2, 0]),
        (10, 5000, 50, [9, 1, 0], [1, 0]),
        (10, 5000, 10, [10, 0, 0], [0, 0]),
    ],
)
def test_groups_of_the_reference(classes, largest, ratio, threshold, oltr):
    found = groups(exponential(largest, classes, ratio))
    assert sizes(found["paper_threshold"]) == threshold
    assert sizes(found["oltr"])[1:] == oltr
    assert sizes(found["paper_index"]) == ([36, 35, 29] if classes == 100 else [3, 4, 3])


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(1000, [390, 445, 165]), (8142, [842, 3701, 3599]), (365, [131, 157, 77]), (20, [6, 8, 6]), (1, [0, 0, 1])],
)
def test_paper_index(classes, expected):
    assert sizes(groups([1] * classes)["paper_index"]) == expected


@pytest.mark.parametrize(
    ("classes", "expected"),
    [(1, [0, 0, 1]), (2, [1, 1, 0]), (3, [1, 1, 1]), (10, [3, 4, 3]), (100, [36, 35, 29]), (365, [131, 157, 77]),
     (1000, [390, 445, 165]), (8142, [842, 3701, 3599])],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 20, 21, 100, 101])
def test_every_class_has_one_group_in_order_and_equal_counts_share_it(classes, expected, count):
    """All counts equal: by index as ever, by threshold all in one group."""
    found = groups([count] * classes)
    assert sizes(found["paper_index"]) == expected
    for name in found:
        places = [GROUPS.index(g) for g in found[name]]
        assert len(places) == classes
        assert places == sorted(places)
    assert len(set(found["paper_threshold"])) == len(set(found["oltr"])) == 1


def test_the_edges_of_the_thresholds():
    counts = [101, 100, 21, 20, 19]
    assert groups(counts)["paper_threshold"] == ["head", "medium", "medium", "tail", "tail"]
    assert groups(counts)["oltr"] == ["head", "medium", "medium", "medium", "tail"]


def test_by_index_may_leave_groups_empty():
    assert by_index(3, 0, 3) == ["medium"] * 3
    assert by_index(3, 3, 3) == ["head"] * 3
    assert by_index(2, 0, 0) == ["tail"] * 2


def test_similar_names_are_told_apart_in_the_line_on_them():
    names = ["cat", "owl", "Cat", "caf\u00e9", "cafe\u0301", " owl"]
    (line,) = describe_similar(names)
    said = "'cat' and 'Cat'; 'owl' and ' owl'; 'caf\\xe9' and 'cafe\\u0301'; each is a class of its own"
    assert said in line
    assert describe_similar(["cat", "dog"]) == []
    assert "; and 2 more; each" in describe_similar([f"{c}{j}" for j in range(5) for c in "aA"])[0]

import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_builders import (
    accepted,
    evaluated,
    fitted,
    make_backbone_dir,
    make_stage2_cache,
    python,
    write_params,
)
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, recall_score
from torch.nn import functional as F

from h2t.cache.reader import open_cache
from h2t.pipeline.data.classes import groups
from h2t.pipeline.evaluation import scoring
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.networks.trained import load_head
from h2t.pipeline.stages import evaluate

FIGURES = ("top1", "head", "medium", "tail", "ece")
ALL = (*FIGURES, "balanced_accuracy", "macro_f1", "top5", "nll", "temperature", "ece_scaled")
KEYS = {*ALL, *(f"{f}_std" for f in ALL), "chosen", "ratio", "heads", "statistics", "groups"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache, heads, backbone, state of the heads)."""
    folder = tmp_path_factory.mktemp("evaluate")
    digest = make_backbone_dir(folder / "b", classes=10)
    counts = (30, 20, 14, 10, 8, 6, 5, 4, 3, 2)
    cache = make_stage2_cache(folder / "c", counts=counts, shape=(64, 2, 2), val=3, test=7, backbone=digest)
    state = fitted(folder / "h", cache, folder / "b", grid={"ratio": [0.0, 0.3, 0.8], "seed": [0, 4]})
    return cache, folder / "h", folder / "b", state


def slow_figures(made, split, statistics, weight, bias, group_of):
    """Figures by hand: scikit-learn on logits of one head."""
    with open_cache(made[0]) as cache:
        rows = sample_rows(cache.rows, split, statistics)
        features = torch.from_numpy(cache.read(rows.first)).mean((2, 3))
    logits = F.linear(features, weight, bias)
    guesses, recall = logits.argmax(1).numpy(), None
    recall = 100 * recall_score(rows.labels, guesses, average=None, labels=range(10), zero_division=0)
    named = {g: recall[[k == g for k in group_of]].mean() for g in ("head", "medium", "tail")}
    return {"top1": 100 * accuracy_score(rows.labels, guesses), **named}


def test_metrics_have_exactly_the_contracts_keys(tmp_path, made):
    metrics = evaluated(tmp_path / "e", *made[:3])
    assert set(metrics) == {"stage1", "without_h2t", "with_h2t", "difference"}
    assert set(metrics["difference"]) == set(FIGURES)
    for figure, apart in metrics["difference"].items():
        assert set(apart) == {"mean", "low", "high", "verdict", "covers", "seeds"}
        assert apart["mean"] == pytest.approx(metrics["with_h2t"][figure] - metrics["without_h2t"][figure])
        assert apart["low"] < apart["mean"] < apart["high"]
        assert (apart["verdict"], apart["covers"], apart["seeds"]) == (None, ["seeds", "images"], 2)
    for entry in (metrics[row] for row in ("stage1", "without_h2t", "with_h2t")):
        assert set(entry) == KEYS
        assert all(0 <= entry[f] <= 100 for f in FIGURES)
    assert (metrics["stage1"]["ratio"], metrics["stage1"]["heads"]) == (None, 1)
    assert metrics["stage1"]["statistics"] == "stage1"
    assert metrics["stage1"]["top1_std"] is None
    assert (metrics["without_h2t"]["ratio"], metrics["without_h2t"]["heads"]) == (0.0, 2)
    assert metrics["without_h2t"]["statistics"] == metrics["with_h2t"]["statistics"] == "mixture"
    assert metrics["with_h2t"]["ratio"] in (0.3, 0.8)


def test_every_setting_is_compared_with_ratio_0_with_stage_i_and_with_the_usual_donors(tmp_path, made):
    cache, _, backbone, _ = made
    grid = {"ratio": [0.0, 0.3], "donor": ["instance", "balanced"], "seed": [0, 1, 2]}
    fitted(tmp_path / "h", cache, backbone, grid=grid)
    metrics = evaluated(tmp_path / "e", cache, tmp_path / "h", backbone)
    table = pd.read_parquet(tmp_path / "e" / "differences.parquet")
    top1 = table[table.figure == "top1"]
    assert sorted(zip(top1.ratio, top1.donor, top1.against, strict=True)) == [
        (0.0, "instance", "stage1"),
        (0.3, "balanced", "stage1"),
        (0.3, "balanced", "standard"),
        (0.3, "balanced", "without_h2t"),
        (0.3, "instance", "stage1"),
        (0.3, "instance", "without_h2t"),
    ]
    heads = pd.read_parquet(tmp_path / "e" / "heads.parquet")
    heads = heads[(heads.split == "test") & heads.statistics.isin(["mixture", "stage1"])]
    for line in table.itertuples():
        mine = heads[(heads.ratio == line.ratio) & (heads.donor == line.donor)]
        other = {
            "stage1": heads[heads.number == -1],
            "without_h2t": heads[(heads.ratio == 0) & (heads.donor == "instance")],
            "standard": heads[(heads.ratio == 0.3) & (heads.donor == "instance")],
        }[line.against]
        assert line.mean == pytest.approx(mine[line.figure].mean() - other[line.figure].mean())
        assert line.low < line.mean < line.high
        assert (list(line.covers), line.seeds) == (["seeds", "images"], 3)
        assert pd.isna(line.verdict) == (line.figure == "ece")  # 70 test images are too few for a verdict on it
    usual = table[(table.donor == "instance") & (table.against == "without_h2t")].set_index("figure")
    assert {f: d["low"] for f, d in metrics["difference"].items()} == usual.low.to_dict()


def test_figures_by_hand(tmp_path, made):
    """Last-epoch heads on the test rows under the recipe's statistics; the stage-I head on its own."""
    metrics = evaluated(tmp_path / "e", *made[:3])
    group_of = groups([30, 20, 14, 10, 8, 6, 5, 4, 3, 2])["paper_index"]
    state = made[3]
    lines = pd.read_parquet(made[1] / "heads.parquet")
    for key in ("without_h2t", "with_h2t"):
        numbers = lines[lines.ratio == metrics[key]["ratio"]].number
        each = [
            slow_figures(made, "test", "mixture", state["weight"][n, 0], state["bias"][n, 0], group_of) for n in numbers
        ]
        for figure in ("top1", "head", "medium", "tail"):
            values = [e[figure] for e in each]
            assert metrics[key][figure] == pytest.approx(np.mean(values))
            assert metrics[key][f"{figure}_std"] == pytest.approx(np.std(values, ddof=1))
    first = load_head(made[2]).state
    expected = slow_figures(made, "test", "stage1", first["weight"][0], first["bias"][0], group_of)
    for figure, value in expected.items():
        assert metrics["stage1"][figure] == pytest.approx(value)


def test_the_ratio_is_chosen_on_validation_rows(tmp_path, made):
    metrics = evaluated(tmp_path / "e", *made[:3])
    lines = pd.read_parquet(tmp_path / "e" / "heads.parquet")
    lines = lines[(lines.split == "val") & (lines.statistics == "mixture") & (lines.ratio > 0)]
    means = lines.groupby("ratio").top1.mean()
    assert metrics["with_h2t"]["ratio"] == means.idxmax()  # the smallest of equals


def figure(ratio, split, top1, seed=0, donor="instance", selection="random"):
    return {"ratio": ratio, "split": split, "top1": top1, "seed": seed, "donor": donor, "selection": selection}


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ([], None),
        ([figure(0.0, "val", 90)], None),
        ([figure(0.3, "val", 50), figure(0.6, "val", 60), figure(0.3, "test", 99)], 0.6),
        ([figure(0.6, "val", 50), figure(0.3, "val", 50)], 0.3),
        (
            [
                figure(0.3, "val", 90, 0),
                figure(0.3, "val", 10, 1),
                figure(0.6, "val", 55, 0),
                figure(0.6, "val", 55, 1),
            ],
            0.6,
        ),
        ([figure(0.9, "val", 99, donor="balanced"), figure(0.2, "val", 1)], 0.2),
        ([figure(0.9, "val", 99, selection="first"), figure(0.2, "val", 1)], 0.2),
        ([figure(0.3, "test", 1), figure(0.6, "test", 99)], 0.3),
        ([figure(0.6, "test", 99)], None),
    ],
)
def test_the_reported_ratio(figures, expected):
    """Best mean validation top-1, the smaller of equals; without a validation split `evaluate.ratio`, here 0.3."""
    assert evaluate.reported_ratio(figures, 0.3) == expected


def test_empty_groups_and_one_seed_are_null(tmp_path, made):
    cache, _, backbone, _ = made
    fitted(tmp_path / "h", cache, backbone, grid={"ratio": [0.0], "seed": [0]})
    metrics = evaluated(tmp_path / "e", cache, tmp_path / "h", backbone, groups=[10, 10])
    assert metrics["with_h2t"] is None
    entry = metrics["without_h2t"]
    assert entry["groups"] == [10, 10]
    assert (entry["medium"], entry["tail"]) == (None, None)
    assert entry["head"] is not None
    assert all(entry[f"{f}_std"] is None for f in FIGURES)


def test_predictions_and_confusion_agree_with_the_figures(tmp_path, made):
    metrics = evaluated(tmp_path / "e", *made[:3])
    guesses = pd.read_parquet(tmp_path / "e" / "predictions.parquet")
    counts = pd.read_parquet(tmp_path / "e" / "confusion.parquet")
    assert set(guesses.number) == set(counts.number)
    assert -1 in set(guesses.number)
    for number, part in guesses.groupby("number"):
        matrix = counts[counts.number == number]
        assert matrix["count"].sum() == len(part) == 70
        right = (part.label == part.predicted).mean()
        assert matrix[matrix.true == matrix.predicted]["count"].sum() / 70 == pytest.approx(right)
        assert part.confidence.between(0.1, 1).all()
        if number == -1:
            assert 100 * right == pytest.approx(metrics["stage1"]["top1"])


def test_per_class_carries_every_group_definition(tmp_path, made):
    evaluated(tmp_path / "e", *made[:3])
    table = pq.read_table(tmp_path / "e" / "per_class.parquet")
    assert {"paper_index", "paper_threshold", "oltr", "accuracy", "count", "class", "number"} <= set(table.column_names)


def test_the_same_inputs_give_the_same_bytes(tmp_path, made):
    for name in "ab":
        evaluated(tmp_path / name, *made[:3])
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def no_nan(path):
    """The JSON in `path`; NaN and infinities, which are none, fail."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{path.name} holds {word}"))


def test_one_head_and_classes_without_test_rows_through_the_commands(tmp_path):
    """Four classes: head [0], medium [1, 2], tail [3]. Class 2 has no test row, nor has the whole tail."""
    digest = make_backbone_dir(tmp_path / "b", classes=4)
    options = {"counts": (9, 5, 2, 1), "shape": (64, 1, 1), "test": (6, 5, 0, 0), "val": 0, "backbone": digest}
    cache = make_stage2_cache(tmp_path / "c", **options)
    fitted(tmp_path / "h", cache, tmp_path / "b", grid={"ratio": [0.3], "seed": [0]})
    out, page = tmp_path / "e" / "dr", tmp_path / "r"
    params = ("--params", write_params(tmp_path / "params.yaml"), "--device", "cpu")
    accepted("evaluate", "dr", cache, tmp_path / "h", tmp_path / "b", out, *params)
    accepted("report", tmp_path / "e", page, *params)

    metrics, table = no_nan(out / "metrics.json"), pq.read_table(out / "per_class.parquet").to_pandas()
    assert no_nan(page / "metrics.json") == {"dr": metrics}
    no_nan(out / "about.json")
    assert metrics["without_h2t"] is None
    for key, number in (("stage1", -1), ("with_h2t", 0)):
        entry = metrics[key]
        assert entry["tail"] is None
        assert [entry[f"{f}_std"] for f in FIGURES] == [None] * 5
        mine = table[(table.number == number) & (table.statistics == entry["statistics"])].sort_values("class")
        right = mine.accuracy.tolist()
        assert np.isnan(right[2:]).all()
        assert (entry["head"], entry["medium"]) == (right[0], right[1])
        assert entry["top1"] == pytest.approx((6 * right[0] + 5 * right[1]) / 11)
    assert pq.read_table(out / "per_class.parquet")["accuracy"].null_count == len(table) // 2
    heads = pq.read_table(out / "heads.parquet")
    assert heads["tail"].null_count == len(heads)
    seen = pd.read_parquet(out / "confusion.parquet")
    assert set(seen.true) == {0, 1}

    text = (page / "results.md").read_text().partition("## All figures")[2].partition("Percent;")[0]
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| dr")]
    assert [line[6] for line in lines] == ["–", "–", "–"]  # host, head, ratio, top1, head, medium, tail, ece
    assert lines[1][2:] == ["–"] * 6  # without H2T
    assert lines[2][3] == f"{metrics['with_h2t']['top1']:.2f}"  # one seed: no ±
    for path in (page / "results.md", *sorted((page / "plots").iterdir())):
        assert "nan" not in path.read_text().lower(), path.name


def test_of_equal_logits_the_first_class_counts_in_every_table(tmp_path, made):
    """Heads and stage I without weights: every logit is 0, every class as good as any other."""
    cache, heads, backbone, _ = made
    for source, target in ((heads, tmp_path / "h"), (backbone, tmp_path / "b")):
        target.mkdir()
        for path in source.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
    state = load_file(heads / "heads.safetensors")
    save_file({k: torch.zeros_like(t) for k, t in state.items()}, tmp_path / "h" / "heads.safetensors", {"h2t": "{}"})
    metrics = evaluated(tmp_path / "e", cache, tmp_path / "h", backbone)
    with_h2t = metrics["with_h2t"]
    assert [with_h2t[f] for f in ("top1", "medium", "tail", "top1_std")] == [10.0, 0.0, 0.0, 0.0]
    assert with_h2t["head"] == pytest.approx(100 / 3)  # class 0 of three
    assert with_h2t["ece"] == pytest.approx(0.0, abs=1e-9)  # confidence 1/10, accuracy 1/10
    guesses = pd.read_parquet(tmp_path / "e" / "predictions.parquet")
    confusions = pd.read_parquet(tmp_path / "e" / "confusion.parquet")
    assert set(guesses[guesses.number >= 0].predicted) == {0}
    assert set(confusions[confusions.number >= 0].predicted) == {0}
    assert set(pd.read_parquet(tmp_path / "e" / "embedding.parquet").with_h2t) == {0}


def test_a_block_has_eight_rows_where_memory_is():
    """Each block reads the weights of all classifiers: two thousand took three times as long in blocks of four rows."""
    rows = np.arange(20)
    assert [len(block) for block in scoring._blocks(rows, 2**20)] == [8, 8, 4]
    assert [len(block) for block in scoring._blocks(rows, 2**18)] == [16, 4]
    assert [len(block) for block in scoring._blocks(rows, 2**40)] == [1] * 20


PEAK = """
import sys
from pathlib import Path
import sklearn.manifold
from benchmarks.measure import own_memory
from h2t.cache.reader import open_cache
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation import scoring
from h2t.pipeline.stages import evaluate

scoring.BLOCK_BYTES = 8 * 2**20
folder = Path(sys.argv[1])
with open_cache(folder / "c") as cache:
    before = own_memory("VmRSS")
    evaluate.run(evaluate.Params(), Run("dr", folder / "e", say=print), cache, folder / "h", folder / "b")
print(own_memory("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("images", "grid"),
    [
        ({"val": 0, "test": 2}, {"ratio": [0.0, 0.2, 0.3, 0.4], "seed": list(range(10))}),
        ({"val": 20, "test": 2}, {"ratio": [0.3], "seed": [0]}),
    ],
    ids=["many heads", "many validation images"],
)
def test_memory_does_not_grow_by_the_logits_of_all_heads_nor_by_float64_ones(tmp_path, warm_programs, images, grid):
    """Two times 40 heads x 1,200 images x 600 classes are 230 MB; thousands of classes would not fit anywhere.

    12,000 validation images x 600 classes are 29 MB, and 58 MB in float64, of which a few copies would be made.
    """
    digest = make_backbone_dir(tmp_path / "b", classes=600)
    cache = make_stage2_cache(
        tmp_path / "c",
        **{"counts": [2] * 600, "shape": (64, 1, 1), "shard_rows": 4096, "backbone": digest},
        **{"train": ("stage1",), "evaluation": ("stage1",), **images},
    )
    settings = {"batchnorm": "stage1", "optimiser": {"epochs": 1, "batch_size": 600}}
    fitted(tmp_path / "h", cache, tmp_path / "b", grid=grid, **settings)
    (tmp_path / "peak.py").write_text(PEAK)
    said = python(tmp_path / "peak.py", tmp_path, program=warm_programs / "warm_python")
    assert int(said.split()[-1]) < 200e6

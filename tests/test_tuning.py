"""Constants of a host as lists: trained together, chosen on validation images or in cross-validation, never on test."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_builders import (
    CPU,
    accepted,
    distance,
    evaluated,
    fitted,
    make_backbone_dir,
    make_host,
    make_prepare,
    make_stack,
    make_stage2_cache,
    refused,
    run_host,
    silent,
    trained,
    write_params,
)
from report_builders import make_evaluated
from safetensors.torch import load_file
from torch.nn import functional as F

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.evaluation import temperature
from h2t.pipeline.evaluation.choice import choose
from h2t.pipeline.evaluation.folds import folds_of, load_folds
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.start import backbone_head
from h2t.pipeline.models.model import load_model
from h2t.pipeline.models.predict import open_model
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.reporting.chosen import said
from h2t.pipeline.reporting.results import load_result

COUNTS = (30, 20, 14, 10, 8, 6, 5, 4, 2, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache with validation rows, cache without, backbone, its digest); the classes overlap."""
    folder = tmp_path_factory.mktemp("tuning")
    digest = make_backbone_dir(folder / "b", classes=10)

    def apart(maps, rows):
        labels = rows["label"].to_numpy()
        maps[0][np.arange(len(labels)), labels] += 1.5

    options = {"counts": COUNTS, "shape": (64, 2, 2), "backbone": digest, "change": apart, "shard_rows": 256}
    return (
        make_stage2_cache(folder / "c", val=5, test=7, **options),
        make_stage2_cache(folder / "without", val=0, test=7, **options),
        folder / "b",
        digest,
    )


def metrics_of(out, cache, backbone_dir, **section):
    """The metrics of a host that is trained into `out`/h and evaluated into `out`/e."""
    run_host(out / "h", cache, backbone_dir, **section)
    return evaluated(out / "e", cache, out / "h", backbone_dir)


def table(path):
    return pq.ParquetFile(path).read().to_pylist()


# --- trained together


def test_heads_with_rates_of_their_own_are_those_trained_alone(made):
    """Three learning rates and two weight decays in one stack."""
    own = [
        (("lr", 0.05), ("weight_decay", 0.0)),
        (("lr", 0.05), ("weight_decay", 0.01)),
        (("lr", 0.2), ("weight_decay", 0.01)),
        (("lr", 0.01), ("weight_decay", 0.0)),
    ]
    grid = [{"ratio": r, "seed": s, "constants": c} for c in own for r in (0.0, 0.3) for s in (0, 1)]
    together, losses = trained(make_stack(made[0], grid, dtype=torch.float64), lr=0.1)
    for k, setting in enumerate(grid):
        plain = {key: value for key, value in setting.items() if key != "constants"}
        alone, lost = trained(make_stack(made[0], [plain], dtype=torch.float64), **dict(setting["constants"]))
        for name in together:
            assert distance(together[name][k], alone[name][0]) < 1e-12
        assert torch.allclose(torch.stack(losses)[:, k], torch.stack(lost)[:, 0], rtol=1e-10)


@pytest.mark.parametrize(
    ("host", "keys", "constant"),
    [("balanced_softmax", {}, "tau"), ("mislas", {}, "smooth_head"), ("gcl", {"classifier": "cosine"}, "margin")],
)
def test_heads_of_a_constant_are_those_of_a_host_that_has_it(tmp_path, made, host, keys, constant):
    cache, _, backbone, _ = made
    if host == "gcl":
        backbone = tmp_path / "cosine"
        make_backbone_dir(backbone, classes=10, classifier="cosine", scale=8.0)
    values, ratios = [0.2, 0.6], [0.0, 0.3]
    grid = {"ratio": ratios, "seed": [0, 1], "loss": {constant: values}, "lr": [0.02, 0.1]}
    both = fitted(tmp_path / "both", cache, backbone, host=host, grid=grid, **keys)
    lines = table(tmp_path / "both/heads.parquet")
    assert len(lines) == 16
    for value in values:
        for lr in (0.02, 0.1):
            name = f"{value} {lr}"
            more = {**keys, "loss": {constant: value}, "optimiser": {"lr": lr}}
            own = fitted(tmp_path / name, cache, backbone, host=host, grid={"ratio": ratios}, **more)
            places = [h["number"] for h in lines if (h[f"loss.{constant}"], h["lr"]) == (value, lr)]
            for key, tensor in own.items():
                assert distance(both[key][places], tensor) < 1e-5
    history = table(tmp_path / "both/history.parquet")
    assert {h["lr"] for h in history if h["epoch"] == 0} == {0.02, 0.1}


def test_what_evaluate_computes_has_each_heads_own_constants(tmp_path, made):
    """NCM's features are another function of the maps for each value, so its classifiers cannot share one."""
    lists = {"features": ["raw", "l2"]}
    metrics_of(tmp_path / "all", made[0], made[2], host="ncm", grid={"loss": lists})
    together = {
        h["loss.features"]: h["top1"]
        for h in table(tmp_path / "all/e/heads.parquet")
        if h["split"] == "test" and h["statistics"] == "mixture" and h["number"] >= 0
    }
    for value in lists["features"]:
        alone = metrics_of(tmp_path / value, made[0], made[2], host="ncm", loss={"features": value})
        assert together[value] == alone["without_h2t"]["top1"]


def test_classifiers_with_other_parameters_cannot_be_stored_together(tmp_path, made):
    with pytest.raises(UserError, match=r"centre is None with one value and .* make an entry of hosts for each value"):
        metrics_of(tmp_path, made[0], made[2], host="ncm", grid={"loss": {"features": ["raw", "centred_l2"]}})


# --- chosen on validation images


def test_constants_are_chosen_on_validation_images_for_each_ratio(tmp_path, made):
    grid = {"ratio": [0.0, 0.3, 0.6], "seed": [0, 1], "lr": [0.001, 0.02, 0.3]}
    metrics = metrics_of(tmp_path, made[0], made[2], **make_host(grid=grid).model_dump(exclude_unset=True))
    lines = [h for h in table(tmp_path / "e/heads.parquet") if h["statistics"] == "mixture" and h["number"] >= 0]
    best = {}
    for ratio in (0.0, 0.3, 0.6):
        means = {
            lr: np.mean([h["top1"] for h in lines if (h["split"], h["ratio"], h["lr"]) == ("val", ratio, lr)])
            for lr in grid["lr"]
        }
        best[ratio] = max(means, key=means.get)
        kept = {h["lr"] for h in lines if h["ratio"] == ratio and h["tuned"]}
        assert kept == {best[ratio]}
    for row in ("without_h2t", "with_h2t"):
        entry = metrics[row]
        chosen = entry["chosen"]
        assert chosen["by"] == "validation images"
        assert chosen["values"]["lr"] == best[entry["ratio"]]
        assert chosen["tried"]["lr"] == grid["lr"]
        mine = [h for h in lines if (h["split"], h["ratio"], h["lr"]) == ("test", entry["ratio"], best[entry["ratio"]])]
        assert entry["top1"] == pytest.approx(np.mean([h["top1"] for h in mine]))
    assert metrics["with_h2t"]["chosen"]["tried"]["ratio"] == [0.3, 0.6]
    assert metrics["stage1"]["chosen"] is None
    result = load_result("one", tmp_path / "e")
    assert len(result.heads) == 3 * 2  # the report's curve has one classifier for each ratio and seed
    assert result.at(0.6).lr.tolist() == [best[0.6]] * 2


def test_test_images_choose_nothing(tmp_path, made):
    """Other test maps change the figures, not the choice."""

    def scrambled(maps, rows):
        labels = rows["label"].to_numpy().copy()
        maps[0][np.arange(len(labels)), labels] += 1.5
        test = np.flatnonzero(np.array(rows["split"].to_pylist()) == "test")
        maps[0][test] = maps[0][test[::-1]]

    options = {"counts": COUNTS, "shape": (64, 2, 2), "backbone": made[3], "shard_rows": 256, "val": 5, "test": 7}
    other = make_stage2_cache(tmp_path / "c", change=scrambled, **options)
    grid = {"ratio": [0.0, 0.3, 0.6], "seed": [0], "lr": [0.001, 0.02, 0.3]}
    host = make_host(grid=grid).model_dump(exclude_unset=True)
    found = [metrics_of(tmp_path / str(i), cache, made[2], **host) for i, cache in enumerate((made[0], other))]
    for row in ("without_h2t", "with_h2t"):
        assert found[0][row]["chosen"] == found[1][row]["chosen"]
        assert found[0][row]["top1"] != found[1][row]["top1"]
        assert found[0][row]["temperature"] == found[1][row]["temperature"]


def test_of_equal_values_the_first_is_taken_and_a_missing_basis_is_an_error():
    usual = {"ratio": 0.0, "donor": "instance", "selection": "random"}
    lines = [{**usual, "loss.tau": tau, "top1": top1} for tau, top1 in ((0.5, 60), (1.0, 60), (2.0, 50))]
    chosen = choose("hosts.x.grid", lines, ["loss.tau"], lines, "validation images")
    assert [chosen.keeps(h) for h in lines] == [True, False, False]
    with pytest.raises(UserError, match="needs validation images or cross-validation"):
        choose("hosts.x.grid", lines, ["loss.tau"], [], None)


@pytest.mark.parametrize(
    ("name", "value", "tried", "edge"),
    [
        ("lr", 0.3, [0.1, 0.3], True),
        ("lr", 0.1, [0.1, 0.3], True),
        ("lr", 0.2, [0.1, 0.2, 0.3], False),
        ("weight_decay", 0.0, [0.0, 0.1], False),
        ("ratio", 0.1, [0.1, 0.3], False),
        ("ratio", 0.3, [0.1, 0.3], True),
        ("ratio", 1.0, [0.1, 1.0], False),
        ("loss.weights", "balanced", ["balanced", "instance"], False),
    ],
)
def test_a_choice_at_an_edge_is_said(name, value, tried, edge):
    ratio = value if name == "ratio" else 0.0
    lines = [
        {"number": i, "ratio": 0.0, "donor": "instance", "selection": "random", name: v, "top1": 100 * (v == value)}
        for i, v in enumerate(tried)
    ]
    names = [] if name == "ratio" else [name]
    chosen = choose("x", lines, names, lines, "validation images")
    entry = chosen.as_dict({**lines[tried.index(value)], "ratio": ratio}, lines)
    assert entry["at_edge"] == ([name] if edge else [])
    assert ("tried: one beyond may be better" in said(entry)) == edge
    assert said(entry).endswith("chosen on validation images")


# --- cross-validation


@pytest.mark.parametrize("folds", [2, 3, 5, 12])
def test_folds_spread_every_class_and_keep_a_sample_of_each_to_train_on(made, folds):
    with open_cache(made[1]) as cache:
        samples = sample_rows(cache.rows, "train", "balanced")
        fold = folds_of(samples, folds)
        assert np.array_equal(fold, folds_of(sample_rows(cache.rows, "train", "instance"), folds))
    assert np.ptp(np.bincount(fold[fold >= 0], minlength=folds)) <= 2  # one more for the samples that stay
    for label, count in enumerate(COUNTS):
        sizes = np.bincount(fold[(samples.labels == label) & (fold >= 0)], minlength=folds)
        assert sizes.max() < count
        assert sizes.sum() == (count if count > 1 else 0)
        assert count == 1 or np.ptp(sizes) <= 1


def test_accuracy_in_cross_validation_by_hand(tmp_path, made):
    """Nearest class means of the other folds' samples, by NumPy; classes count alike, the class of one sample not."""
    from sklearn.neighbors import NearestCentroid

    metrics = metrics_of(tmp_path, made[1], made[2], host="ncm", folds=4, grid={"loss": {"features": ["l2", "raw"]}})
    found = load_folds(tmp_path / "h")
    assert (found.folds, found.left_out) == (4, [9])
    with open_cache(made[1]) as cache:
        samples = sample_rows(cache.rows, "train", "instance")  # what NCM reads
        x = FeatureReader(cache, global_average).read(samples.first)[0].numpy().astype(np.float64)
    fold, guesses = folds_of(samples, 4), np.full(len(x), -1)
    for number in range(4):
        held = fold == number
        guesses[held] = NearestCentroid().fit(x[~held], samples.labels[~held]).predict(x[held])
    right = [np.mean(guesses[samples.labels == label] == label) for label in range(9)]
    assert found.accuracy[1] == pytest.approx(100 * np.mean(right))
    chosen = metrics["without_h2t"]["chosen"]
    assert chosen["by"] == "4 folds"
    assert chosen["left_out"] == ["class 9"]
    assert chosen["values"]["loss.features"] == ("raw" if found.accuracy[1] > found.accuracy[0] else "l2")
    assert "chosen by cross-validation in 4 folds without class 9, of which there is one training image" in said(chosen)


def test_ratio_and_rate_are_chosen_in_cross_validation_and_trained_on_all_samples(tmp_path, made):
    grid = {"ratio": [0.0, 0.3, 0.6], "seed": [5, 1], "lr": [0.001, 0.05]}
    host = make_host(grid=grid, host="dr").model_dump(exclude_unset=True)
    metrics = metrics_of(tmp_path, made[1], made[2], **host, folds=3)
    found = load_folds(tmp_path / "h")
    lines = {h["number"]: h for h in table(tmp_path / "h/heads.parquet")}
    assert {lines[n]["seed"] for n in found.accuracy} == {5}  # folds are trained with the first seed
    assert len(found.accuracy) == 6
    for row, ratios in (("without_h2t", [0.0]), ("with_h2t", [0.3, 0.6])):
        of_row = {n: a for n, a in found.accuracy.items() if lines[n]["ratio"] in ratios}
        best = lines[max(of_row, key=of_row.get)]
        assert metrics[row]["heads"] == 2
        assert (metrics[row]["ratio"], metrics[row]["chosen"]["values"]["lr"]) == (best["ratio"], best["lr"])
    plain = metrics_of(tmp_path / "plain", made[1], made[2], **{**host, "grid": {**host["grid"], "lr": [0.05]}})
    assert plain["with_h2t"]["chosen"] is None  # without folds, evaluate.ratio decides
    states = [load_file(folder / "h/heads.safetensors") for folder in (tmp_path, tmp_path / "plain")]
    half = len(lines) // 2
    assert distance(states[0]["weight"][half:], states[1]["weight"]) < 1e-6
    assert not list(tmp_path.glob(".*"))  # nothing unfinished is left


def test_a_probe_of_a_fold_does_not_know_what_is_held_out(tmp_path, made):
    from h2t.pipeline.networks import probe
    from h2t.pipeline.networks.weights import load_weights, save_weights

    backbone = tmp_path / "b"
    backbone.mkdir()
    (backbone / "backbone.safetensors").write_bytes((made[2] / "backbone.safetensors").read_bytes())
    _, about = load_weights(made[2] / "head.safetensors")
    about |= {"head": "probe", "probe": {"l2": 1e-3, "scale": 25.0, "iterations": 1000}, "classifier": "none"}
    save_weights(backbone / "head.safetensors", {}, about)
    statistics = {"train": ("stage1",), "evaluation": ("stage1",)}
    options = {"counts": (9, 6, 4), "shape": (8, 1, 1), "backbone": made[3], "val": 0, **statistics}
    cache = make_stage2_cache(tmp_path / "c", **options)
    with open_cache(cache) as opened:
        samples = sample_rows(opened.rows, "train", "stage1")
        x = FeatureReader(opened, global_average).read(samples.first)[0]
        held = folds_of(samples, 3) == 1
        rows = opened.rows.filter(np.isin(opened.rows["sample"].to_numpy(), samples.samples[~held]))
        found = backbone_head(opened, backbone, "linear", CPU, silent, rows)
    expected = probe.fit(x[~held], torch.from_numpy(samples.labels[~held]), 3, probe.Probe(), "linear")
    for name, tensor in expected.items():
        assert torch.equal(found.state[name], tensor)


# --- temperature


@pytest.mark.parametrize("true", [0.3, 1.0, 4.0])
def test_the_temperature_is_where_cross_entropy_is_smallest(true):
    draws = torch.Generator().manual_seed(1)
    logits = torch.randn(20_000, 5, generator=draws) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=draws)[:, 0]
    found = temperature.fit(logits * true, labels.numpy())
    assert found == pytest.approx(true, rel=0.05)

    def loss(t):
        return float(F.cross_entropy(logits.double() * true / t, labels))

    assert loss(found) <= min(loss(found * (1 + d)) for d in (-0.01, 0.01))
    weights = np.where(labels.numpy() == 0, 5.0, 1.0)
    repeated = torch.cat([torch.arange(len(labels)), *[torch.nonzero(labels == 0)[:, 0]] * 4])
    often = temperature.fit(logits[repeated] * true, labels[repeated].numpy())
    assert temperature.fit(logits * true, labels.numpy(), weights) == pytest.approx(often, rel=1e-3)


@pytest.mark.parametrize(("right", "expected"), [(True, temperature.LEAST), (False, temperature.LARGEST)])
def test_the_temperature_stays_within_its_bounds(right, expected):
    logits = torch.eye(4) * 9
    labels = np.arange(4) if right else (np.arange(4) + 1) % 4
    found = temperature.fit(logits, labels)
    assert temperature.LEAST <= found <= temperature.LARGEST
    assert found == pytest.approx(expected, rel=0.01) or right  # where all are right, small temperatures are equal
    assert found < 0.3 or not right


@pytest.mark.parametrize("folds", [None, 3])
def test_the_temperature_is_that_of_held_out_samples(tmp_path, made, folds):
    host = make_host(grid={"ratio": [0.0, 0.3], "seed": [0]}, optimiser={"epochs": 6, "lr": 1.0})
    metrics = metrics_of(
        tmp_path, made[0], made[2], **{**host.model_dump(exclude_unset=True), **({"folds": folds} if folds else {})}
    )
    entry = metrics["with_h2t"]
    assert entry["temperature"] != 1
    assert entry["ece_scaled"] < entry["ece"] or folds
    assert (metrics["stage1"]["temperature"] is None) == bool(folds)
    own = [h for h in table(tmp_path / "e/heads.parquet") if h["ratio"] == 0.3 and h["split"] == "test"]
    assert [h["temperature"] for h in own if h["statistics"] == "mixture"] == [entry["temperature"]]
    assert [h["temperature"] for h in own if h["statistics"] != "mixture"] == [None]
    if folds:
        number = next(h["number"] for h in own)
        assert load_folds(tmp_path / "h").temperature[number] == entry["temperature"]


def test_an_exported_head_is_as_confident_as_evaluate_measured(tmp_path, digits_cache, backbone_dir):
    """One of several learning rates, chosen by its value; its confidence has the temperature, its logits have not."""
    lists = {"ratio": [0.0, 0.3], "seed": [0], "lr": [0.02, 1.0]}
    params = write_params(tmp_path / "params.yaml", prepare={**make_prepare().model_dump()}, hosts__dr__grid=lists)
    given = ("--params", params)
    data = [str(tmp_path / name) for name in ("heads", "evaluate")]
    accepted("train-classifier", "dr", digits_cache, backbone_dir, data[0], *given)
    accepted("evaluate", "dr", digits_cache, data[0], backbone_dir, data[1], *given)
    entry = json.loads((tmp_path / "evaluate/metrics.json").read_text())["with_h2t"]
    lr = entry["chosen"]["values"]["lr"]
    where = (data[0], digits_cache, backbone_dir)
    line = refused("export", *where, tmp_path / "m", "--ratio", "0.3", *given)
    assert "2 of 4" in line
    assert "--constant lr=0.02, 1" in line
    assert "no such constant" in refused("export", *where, tmp_path / "m", "--constant", "tau=1", *given)
    accepted("export", *where, tmp_path / "m", "--ratio", "0.3", "--constant", f"lr={lr}", *given)
    model = load_model(tmp_path / "m")
    assert model.about["setting"]["lr"] == lr
    assert model.temperature == pytest.approx(entry["temperature"])
    logits, _, _ = open_model(tmp_path / "m", CPU)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(logits(x) * model.temperature, model.network(x), rtol=1e-6)


# --- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["hosts.dr.grid.lr=[0.1, 0.1]"], "hosts.dr.grid.lr: must be a list of one or more different values"),
        (["hosts.dr.grid.lr=[-1]"], "hosts.dr.grid.lr[0]: must be greater than 0"),
        (["hosts.dr.grid.loss={tau: [1.0]}"], "hosts.dr.grid.loss.tau: unknown key"),
        (["hosts.mislas.grid.loss={smooth_tail: [2.0]}"], "hosts.mislas.grid.loss.smooth_tail: must lie in [0, 1]"),
        (["hosts.dr.folds=1"], "hosts.dr.folds: must be at least 2; got 1"),
        (["hosts.ncm.grid.ratio=[0.0]"], "closed-form fit and takes no grid but the key loss"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, digits_cache, backbone_dir, settings, words):
    hosts = {name: {"host": name, "backbone": "ce_mixup"} for name in ("dr", "mislas", "ncm")}
    params = write_params(tmp_path / "params.yaml", hosts=hosts)
    given = [part for setting in settings for part in ("--set", setting)]
    command = ("train-classifier", "dr", digits_cache, backbone_dir, tmp_path / "out", "--params", params, *given)
    assert words in refused(*command, leaves=tmp_path / "out")


def test_a_choice_without_anything_to_choose_on_is_refused_before_training(tmp_path, made):
    params = write_params(tmp_path / "params.yaml", hosts__dr__grid={"ratio": [0.0, 0.3], "lr": [0.01, 0.1]})
    command = ("train-classifier", "dr", made[1], made[2], tmp_path / "out", "--params", params)
    line = refused(*command, leaves=tmp_path / "out")
    assert "hosts.dr.grid: a choice among values of lr needs validation images or cross-validation" in line
    assert "set hosts.dr.folds: 5" in line
    accepted(*command, "--set", "hosts.dr.folds=2")


# --- what people read


def test_the_report_says_what_was_tried_and_chosen(tmp_path):
    grid = {"ratio": [0.0, 0.3], "seed": [0, 1], "lr": [0.001, 0.3]}
    evaluated = make_evaluated(tmp_path, grid=grid, folds=3)
    params = write_params(tmp_path / "params.yaml", hosts={"dr": {"host": "dr", "backbone": "ce_mixup"}})
    accepted("report", evaluated, tmp_path / "r", "--params", params)
    chosen = json.loads((evaluated / "dr/metrics.json").read_text())["with_h2t"]["chosen"]
    expected = f"dr, with H2T: lr {chosen['values']['lr']:g} of 0.001, 0.3 (the"
    assert expected in (tmp_path / "r/results.md").read_text()
    assert expected in (tmp_path / "r/index.html").read_text()


def test_a_sweep_shows_every_combination_and_chooses_nothing(tmp_path, digits_cache, backbone_dir):
    for stage, made in (("extract", digits_cache), ("train_backbone", backbone_dir)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "ce_mixup").symlink_to(made)
    host = {"backbone": "ce_mixup", "optimiser": {"epochs": 1}, "folds": 2}
    lists = {"ratio": [0.3], "seed": [0], "loss": {"smooth_head": [0.2, 0.4]}, "weight_decay": [0.0]}
    params = write_params(tmp_path / "params.yaml", hosts={"mislas": {**host, "grid": lists}})
    given = ("--params", params, "--data", tmp_path)
    lines = json.loads(accepted("sweep", "mislas", *given, "--lr", "0.01,0.1", "--json"))
    settings = [(line["constants"], line["lr"], line["ratio"]) for line in lines]
    assert settings == [
        ({"loss.smooth_head": smooth, "weight_decay": 0.0}, lr, ratio)
        for smooth in (0.2, 0.4)
        for lr in (0.01, 0.1)
        for ratio in (0.0, 0.3)
    ]
    assert all((line["difference"] is None) == (line["ratio"] == 0) for line in lines)
    assert accepted("sweep", "mislas", *given, "-q").splitlines()[0].split()[:3] == [
        "ratio",
        "loss.smooth_head",
        "top-1",
    ]

"""h2t.api: its figures and features are those of the stages; what it saves is read by `h2t predict`."""

import csv
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_builders import write_image
from PIL import Image
from pipeline_builders import CPU, accepted, one_line, refused
from safetensors.torch import load_file, save_file

from h2t import api
from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.features import Features, Shares, gathered, held_out
from h2t.pipeline.base.code import imports, modules
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.samples import load_samples
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.setting import Optimiser
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.stages import evaluate, extract, prepare, probe, train_backbone, train_classifier

COUNTS = (24, 12, 6)
NAMES = np.array(["wren", "owl", "kōkako"])
INPUT = {"size": 32, "crop": 0.9, "mean": [0.5] * 3, "std": [0.25] * 3}


def arrays(seed=0, shape=(8,)):
    """Features of well-separated classes and their labels."""
    label = np.repeat(np.arange(3), COUNTS)
    centres = np.random.default_rng(9).standard_normal((3, *shape)) * 3
    noise = np.random.default_rng(seed).standard_normal((len(label), *shape))
    return (centres[label] + noise).astype(np.float32), NAMES[label]


@pytest.fixture(scope="module")
def compared():
    return api.compare(*arrays(), methods=["dr", "ncm"], ratios=[0.0, 0.25], seeds=[0, 1])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("api") / "photos"
    for k, (name, count) in enumerate(zip(NAMES, COUNTS, strict=True)):
        for i in range(count):
            write_image(root / name / f"{i:02}.png", 100 * k + i % 2)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory, backbone_dir):
    """A checkpoint of a whole network: the backbone and a classifier that is not used."""
    state = load_file(backbone_dir / "backbone.safetensors")
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(state, path)
    return str(path)


@pytest.fixture(scope="module")
def features(photos, weights):
    return api.extract_features(photos, "resnet20", weights=weights, input=INPUT, batch_size=16, device="cpu")


def test_maps_whose_channels_seem_to_come_last_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"taken as \(n, C, H, W\); if channels come last, give features.transpose"):
        spec = api.write_cache(tmp_path / "c", np.zeros((3, 7, 7, 4)), ["owl"] * 3)
    assert spec.maps == ((7, 7, 4),)


def test_compared_figures_are_those_of_the_stages(tmp_path):
    x, y = arrays()
    split = [("train", "test", "val")[i % 3] for i in range(len(x))]
    api.write_cache(tmp_path / "c", x, y, split=split)
    entry = {"optimiser": {"epochs": 3}}
    found = api.compare(tmp_path / "c", methods={"dr": entry}, ratios=[0.0, 0.25], seeds=[0, 1], device="cpu")
    with open_cache(tmp_path / "c") as cache:
        probe.run("probe", Probe(), Run("c", tmp_path / "p"), cache, "none")
        grid = {"ratio": [0.0, 0.25], "seed": [0, 1]}
        params = train_classifier.Params(host="dr", backbone="c", batchnorm="stage1", grid=grid, **entry)
        train_classifier.run(params, Run("dr", tmp_path / "h"), Residency(), cache, tmp_path / "p")
        metrics = evaluate.run(evaluate.Params(), Run("dr", tmp_path / "e"), cache, tmp_path / "h", tmp_path / "p")
    assert found.table["method"].tolist() == ["probe", "dr", "dr"]
    lines = zip(found.table.to_dict("records"), ("stage1", "without_h2t", "with_h2t"), strict=True)
    for line, name in lines:
        for figure in ("top1", "head", "medium", "tail", "ece"):
            assert line[figure] == pytest.approx(metrics[name][figure])
    figures = pq.read_table(tmp_path / "e/heads.parquet").to_pylist()
    on_val = [f["top1"] for f in figures if f["split"] == "val" and f["ratio"] == 0.25]
    assert found.table["val_top1"].tolist()[2] == pytest.approx(np.mean(on_val))
    best = found.table[1:]["val_top1"].idxmax()
    assert found.take("dr").head.table["ratio"][0].as_py() == found.table["ratio"][best]


def test_a_comparison_is_a_table_with_each_method_once(compared):
    table = compared.table
    assert table["method"].tolist() == ["probe", "dr", "dr", "ncm"]
    assert set(table) >= {"top1", "head", "medium", "tail", "ece", "val_top1"}
    assert "probe" in repr(compared)
    assert "<table" in compared._repr_html_()
    assert compared.classes == NAMES.tolist()
    assert (table["top1"] > 60).all()


def test_one_is_taken_saved_and_loaded(compared, tmp_path):
    x, y = arrays(seed=1)
    one = compared.take("dr", ratio=0.25, seed=1)
    assert one.head.table.to_pylist()[0] | {"ratio": 0.25, "seed": 1} == one.head.table.to_pylist()[0]
    assert (one.predict(x) == y).mean() > 0.8
    one.save(tmp_path / "m", licence="MIT", use="Birds")
    text = (tmp_path / "m/README.md").read_text(encoding="utf-8")
    assert "- This model: MIT" in text
    assert "| kōkako | 4 | 1 | " in text
    np.testing.assert_array_equal(api.load(tmp_path / "m").predict_proba(x), one.predict_proba(x))
    table = api.predict(tmp_path / "m", x, top=2)
    assert table.columns.tolist() == ["image", "rank", "class", "confidence"]
    assert table[table["rank"] == 1]["class"].tolist() == one.predict(x).tolist()
    assert table[table["rank"] == 1]["confidence"].to_numpy() == pytest.approx(one.predict_proba(x).max(1))


def test_maps_are_compared_and_predicted():
    x, y = arrays(shape=(4, 2, 2))
    one = api.compare(x, y, methods=["dr"], ratios=[0.25], seeds=[0]).take("dr")
    assert (one.predict(x) == y).mean() > 0.8
    np.testing.assert_allclose(one.predict_proba(x), one.predict_proba(x.mean((2, 3))), atol=1e-6)


def test_compare_doubts_channels_that_seem_last_and_needs_training_rows():
    x, y = arrays(shape=(2, 2, 4))
    with pytest.warns(UserWarning, match="if channels come last"), pytest.raises(UserError, match="no training feat"):
        api.compare(x, y, methods=["dr"], split=["test"] * len(y))


def test_features_of_images_are_those_of_the_stages(photos, weights, features, tmp_path):
    section = {"dataset": "image_folder", "options": {"root": str(photos), "train": "."}, "test": 0.2}
    prepare.run(prepare.Params(**section), Run("prepare", tmp_path / "p"))
    samples = load_samples(tmp_path / "p")
    images = samples.images(section)
    backbone = train_backbone.Params(arch="resnet20", weights=weights, input=INPUT, head="none")
    train_backbone.run(backbone, Run("b", tmp_path / "b"), samples, images)
    params = extract.Params(batchnorm=["stage1"], dtype="float32", batch_size=16)
    extract.run(params, Run("b", tmp_path / "c", CPU), samples, images, tmp_path / "b")
    cached = api.extract_features(tmp_path / "c")
    mine = dict(zip(features.source, features.values, strict=True))
    assert set(mine) == set(cached.source)
    np.testing.assert_allclose(np.stack([mine[s] for s in cached.source]), cached.values, rtol=1e-5, atol=1e-6)
    assert dict(zip(features.source, features.labels, strict=True)) == dict(
        zip(cached.source, cached.labels, strict=True)
    )
    assert set(cached.split) == {"train", "test"}
    assert set(api.extract_features(tmp_path / "c", split="test").split) == {"test"}


def test_images_may_be_files_or_arrays(photos, weights, features):
    more = {"weights": weights, "input": INPUT, "batch_size": 16, "device": "cpu"}
    paths = [photos / source for source in features.source[:3]]
    files = api.extract_features(paths, "resnet20", **more)
    assert files.labels is None
    np.testing.assert_allclose(files.values, features.values[:3], rtol=1e-5, atol=1e-6)
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    held = api.extract_features(pixels, "resnet20", **more)
    np.testing.assert_array_equal(held.values, files.values)
    for given in (map(Image.open, paths), (str(path) for path in paths), np.array([str(path) for path in paths])):
        np.testing.assert_array_equal(api.extract_features(given, "resnet20", **more).values, files.values)
    shrunk = Image.fromarray(pixels[0])
    shrunk.getexif()[0x0100] = 4000  # the width that a camera wrote
    api.extract_features([shrunk], "resnet20", **more)
    turned = [Image.fromarray(one).rotate(90, expand=True) for one in pixels]
    for one in turned:
        one.getexif()[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    np.testing.assert_array_equal(api.extract_features(turned, "resnet20", **more).values, files.values)
    grey = api.extract_features(pixels[..., 0], "resnet20", **{**more, "batch_size": np.int64(16)})
    assert grey.values.shape == files.values.shape


def test_a_classifier_of_images_is_a_model_for_h2t_predict(photos, features, tmp_path):
    one = api.compare(features, methods=["dr"], ratios=[0.25], seeds=[0]).take("dr")
    one.save(tmp_path / "m")
    done = accepted("predict", tmp_path / "m", photos)
    lines = list(csv.DictReader(io.StringIO(done)))
    by_name = {line["image"].removeprefix(f"{photos}/"): line for line in lines}
    of_features = api.predict(one, features)
    assert [by_name[name]["class"] for name in of_features["image"]] == of_features["class"].tolist()
    of_images = api.predict(one, photos)
    assert of_images["class"].tolist() == [line["class"] for line in lines]
    assert api.predict(tmp_path / "m", [photos / "owl/00.png"])["class"].tolist() == [by_name["owl/00.png"]["class"]]
    with one_line("must be all image files or all images of Pillow; got both"):
        api.predict(tmp_path / "m", [Image.new("RGB", (40, 40)), photos / "owl/00.png"])
    opened = api.predict(tmp_path / "m", [Image.open(path) for path in sorted(photos.rglob("*.png"))])
    assert opened["confidence"].tolist() == of_images["confidence"].tolist()
    assert opened["image"].tolist() == [str(i) for i in range(len(opened))]


def test_arrays_become_a_cache_that_is_sound(tmp_path):
    x, y = arrays()
    spec = api.write_cache(tmp_path / "c", x, y, source=[f"IMG_{i}" for i in range(len(x))])
    assert (spec.provenance["classes"], spec.provenance["counts"]) == (NAMES.tolist(), list(COUNTS))
    assert verify(tmp_path / "c") == []
    back = api.extract_features(tmp_path / "c")
    order = [int(source.removeprefix("IMG_")) for source in back.source]
    np.testing.assert_array_equal(back.values, x[order])
    assert back.labels == y[order].tolist()


def test_groups_and_given_splits_are_kept():
    x, y = arrays()
    given = gathered(x, y, None, [f"camera {i % 7}" for i in range(len(x))])
    held = held_out(given, Shares(test=0.2, validation=0.2))
    by_group = {g: {s for h, s in zip(given.group, held, strict=True) if h == g} for g in given.group}
    assert all(len(splits) == 1 for splits in by_group.values())
    assert set(held) == {"train", "val", "test"}
    mine = ["test" if i % 2 else "train" for i in range(len(x))]
    assert held_out(gathered(x, y, mine, None), Shares(test=0.2)) == mine
    unnamed = [np.nan, None, *["one camera"] * 40]
    alone = held_out(gathered(x, y, None, unnamed), Shares(test={"at_most": 40}))
    in_array = Features(x, [str(i) for i in range(42)], list(y), None, np.arange(42).astype(str))
    assert "test" in held_out(gathered(in_array, None, None, None), Shares(test=0.2))
    assert len({s for g, s in zip(unnamed, alone, strict=True) if g == "one camera"}) == 1


def test_tensors_and_arrow_arrays_are_taken_like_arrays():
    x, y = arrays()
    found = [
        api.compare(features, labels, methods=["ncm"], seeds=[0])
        for features, labels in (
            (x, y),
            (torch.tensor(x, requires_grad=True), pa.array(y)),
            (torch.tensor(x).double(), list(y)),
        )
    ]
    assert found[0].table.equals(found[1].table)
    assert found[0].table.equals(found[2].table)
    one = found[0].take("ncm")
    assert np.array_equal(one.predict_proba(torch.tensor(x, requires_grad=True)), one.predict_proba(x))
    half = torch.tensor(x).bfloat16()
    with one_line("top: must be a whole number, at least 1; got 0"):
        api.predict(one, x, top=0)
    assert np.array_equal(one.predict_proba(half), one.predict_proba(half.float().numpy()))
    assert one.predict(x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("samples", "epochs"), [(1, 500), (128, 500), (129, 250), (6_272, 11), (6_400, 10), (10**6, 10)]
)
def test_few_samples_get_more_epochs(samples, epochs):
    assert Optimiser.enough_epochs(samples) == epochs
    assert epochs * -(-samples // 128) >= 500


def test_the_batch_that_is_asked_for_counts():
    params = api._entry("dr", {"optimiser": {"batch_size": 7}}, [0.0], [0], None, 42)
    assert params.optimiser.epochs == 84  # of 6 steps


def test_compare_trains_few_samples_longer_unless_told():
    x, y = arrays()
    usual, long, short = (
        api.compare(x, y, methods=["crt"], ratios=[0.0], seeds=[0], validation=0, **given).take("crt")
        for given in ({}, {"epochs": 500}, {"epochs": 10})
    )
    assert np.array_equal(usual.predict_proba(x), long.predict_proba(x))
    assert not np.allclose(usual.predict_proba(x), short.predict_proba(x))


@pytest.mark.parametrize("method", ["lift", "gcl"])
def test_a_method_takes_its_own_kind_of_classifier(method):
    found = api.compare(*arrays(), methods=[method], seeds=[0])
    assert found.take(method).head.about["classifier"] == "cosine"


X, Y = arrays()
WRONG = {
    "no labels": (lambda p: api.compare(X), "labels: one for each row is needed; got none"),
    "few labels": (lambda p: api.compare(X, Y[:-1]), "labels: must have one value for each of 42 rows; got 41"),
    "few splits": (lambda p: api.compare(X, Y, split=["train"]), "split: must have one value for each"),
    "another split": (lambda p: api.write_cache(p, X, Y, split=["train"] * 41 + ["pruefung"]), "got 'pruefung'"),
    "no method": (lambda p: api.compare(X, Y, methods=["drr"]), "'drr'"),
    "a wrong key": (lambda p: api.compare(X, Y, methods={"dr": {"poool": 1}}), "methods.dr.poool: unknown key"),
    "a ratio": (lambda p: api.compare(X, Y, ratios=[1.5]), "methods.crt.grid.ratio[0]: must lie in [0, 1]; got 1.5"),
    "no test rows": (lambda p: api.compare(X, Y, test=0), "test: must leave at least one row for testing"),
    "Booleans as splits": (
        lambda p: api.compare(X, Y, split=[True] * 42),
        "split: must be train, val or test; got True",
    ),
    "all rows held out": (lambda p: api.compare(X, Y, test=1), "compare.test: must lie in [0, 0.9]; got 1"),
    "a share as text": (lambda p: api.compare(X, Y, test="half"), "compare.test: must be"),
    "a seed": (lambda p: api.compare(X, Y, seed=-1), "compare.seed: must be at least 0; got -1"),
    "no methods": (lambda p: api.compare(X, Y, methods=[]), "methods: must name at least one host; got none"),
    "one class": (lambda p: api.compare(X, ["owl"] * 42), "labels: must name two or more classes; got one, 'owl'"),
    "1 and '1'": (lambda p: api.write_cache(p, X, [1, "1"] * 21), "labels: must be texts or whole numbers throughout"),
    "an empty label": (lambda p: api.write_cache(p, X, ["a", " "] * 21), "a label must not be empty; that of row 1 is"),
    "no rows": (lambda p: api.write_cache(p, X[:0], []), "features: must have at least one row"),
    "a generator": (lambda p: api.compare((row for row in X), Y), "got generator"),
    "ragged rows": (lambda p: api.compare([[1, 2], [3]], ["a", "b"]), "features: must be numbers of shape"),
    "masked": (lambda p: api.compare(np.ma.masked_array(X, X > 0), Y), "features: must have a value everywhere"),
    "NaN": (lambda p: api.write_cache(p, np.full((2, 3), np.nan), ["a", "b"]), "holds NaN"),
    "three axes": (lambda p: api.compare(X[:, :, None], Y), "(n, C) or (n, C, H, W)"),
    "Booleans": (lambda p: api.write_cache(p, X, Y == "owl"), "labels must be whole numbers or texts"),
    "no backbone": (lambda p: api.extract_features([np.zeros((9, 9), np.uint8)], "resnet51"), "'resnet50'"),
    "floats": (lambda p: api.extract_features(np.zeros((2, 9, 9, 3)), "resnet20", weights="none"), "must be uint8"),
    "one image": (lambda p: api.extract_features(np.zeros((9, 9, 3), np.uint8), "resnet20"), "give a list of images"),
    "no images": (lambda p: api.extract_features([], "resnet20"), "images: must have at least one image"),
    "tensors": (lambda p: api.extract_features(torch.zeros(2, 3, 9, 9), "resnet20"), "tensor.permute(0, 2, 3, 1)"),
    "a number": (lambda p: api.extract_features(3, "resnet20"), "must be all image files"),
    "no batch": (lambda p: api.extract_features([X], "resnet20", batch_size=0), "batch_size: must be a whole number"),
    "no file": (lambda p: api.extract_features([p / "x.png"], "resnet20", weights="none"), "x.png: no such image"),
    "no model": (lambda p: api.predict(p, X), "no such file"),
    "a device": (lambda p: api.compare(X, Y, device="gpu"), "device: must be auto, cpu"),
}


@pytest.mark.parametrize(("call", "says"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_line_and_leaves_nothing(tmp_path, call, says):
    with one_line(says):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_features_of_another_width_are_refused(compared):
    with pytest.raises(UserError, match=r"features: must have shape \(n, 8\).*got \(42, 7\)"):
        compared.take("dr").predict(X[:, :7])
    with pytest.raises(UserError, match="method: must be one of dr, ncm; got 'crt'"):
        compared.take("crt")


def test_no_stage_and_no_cache_imports_the_public_modules():
    public = {f"h2t.{name}" for name in ("api", "classifier", "estimator", "features")}
    importing = {m for m, path in modules().items() if public & imports(path)}
    assert importing == set()


def test_an_image_that_cannot_be_read_is_one_line_with_a_way_out(weights, tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^image '.*bad\.png': .*; repair it or leave it out$"):
        api.extract_features([tmp_path / "good.png", tmp_path / "bad.png"], "resnet20", weights=weights, input=INPUT)


def test_small_features_are_said_and_what_to_do():
    x, y = arrays()
    short = x / np.linalg.norm(x, axis=1, keepdims=True) / 10
    factor = 1 / np.sqrt(np.square(short).mean())
    with pytest.warns(UserWarning, match=r"multiply all features by"):
        api.compare(short, y, methods=["ncm"], seeds=[0])
    api.compare(short * factor, y, methods=["ncm"], seeds=[0])  # a warning is an error here


def test_predict_says_how_a_classifier_of_features_is_used(tmp_path):
    api.compare(*arrays(), methods=["ncm"], seeds=[0]).take("ncm").save(tmp_path / "m")
    assert f"h2t.api.predict('{tmp_path}/m', features)" in refused("predict", str(tmp_path / "m"), "x.png")

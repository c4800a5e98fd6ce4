import csv
import io
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import own_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from pipeline_builders import (
    CPU,
    accepted,
    extracted,
    fitted,
    invoke,
    make_prepare,
    one_line,
    pooled_copy,
    prepared,
    refused,
    run_host,
    silent,
    write_params,
)
from safetensors.torch import load_file, save_file
from scipy.stats import beta

from h2t.cache.format.spec import to_float32
from h2t.cache.reader import open_cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation.metrics import answers
from h2t.pipeline.evaluation.scoring import head_logits, load_heads_for, score_heads, stage1_logits
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.models.card import Measured, Stated, card, interval
from h2t.pipeline.models.export import Choice, run
from h2t.pipeline.models.model import SEAL, as_linear, load_model, load_single_head
from h2t.pipeline.models.predict import ranked
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.trained import load_head
from h2t.pipeline.networks.weights import load_weights, save_weights
from h2t.pipeline.stages import train_backbone

PREPARE = make_prepare().model_dump()
ONE = Choice(ratio=0.3, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_cache, backbone_dir):
    """Heads of several hosts on the digits' cache, one epoch."""
    root = tmp_path_factory.mktemp("heads")
    for host in ("dr", "mislas"):
        fitted(root / host, digits_cache, backbone_dir, host=host, optimiser={"epochs": 1})
    run_host(root / "ncm", digits_cache, backbone_dir, name="ncm", host="ncm", classifier="cosine")
    return SimpleNamespace(root=root, cache=digits_cache, backbone=backbone_dir)


def exported(trained, out, host="dr", *, say=silent, choice=ONE, cache=None, **more):
    with open_cache(cache or trained.cache) as opened:
        return run(
            Run("export", out, CPU, say=say), opened, trained.root / host, trained.backbone, choice, PREPARE, **more
        )


@pytest.mark.parametrize(("host", "choice"), [("dr", Choice(2)), ("mislas", Choice(1)), ("ncm", Choice())])
def test_a_model_gives_the_logits_of_evaluate(tmp_path, trained, digits, host, choice):
    found = exported(trained, tmp_path / "m", host, choice=choice)
    assert found["images"] < 1e-4
    model = load_model(tmp_path / "m")
    with open_cache(trained.cache) as cache:
        heads = load_heads_for(cache, trained.root / host, trained.backbone)
        rows = sample_rows(cache.rows, "test", heads.about["evaluate"]).first[:40]
        expected = head_logits(cache, heads, rows, CPU)[choice.number or 0]
        samples = cache.rows["sample"].to_numpy()[rows].tolist()
    with torch.no_grad():
        logits = model.network(digits[1].batch(samples, [None] * len(samples)))
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4
    assert model.classes == [str(name) for name in digits[0].facts["classes"]]


def test_the_classifier_of_stage_one_is_exported_by_naming_its_backbone_twice(tmp_path, trained):
    named = SimpleNamespace(root=trained.backbone.parent, cache=trained.cache, backbone=trained.backbone)
    exported(named, tmp_path / "m", trained.backbone.name, choice=Choice())
    made = load_head(trained.backbone)
    model = load_model(tmp_path / "m").network
    with open_cache(trained.cache) as cache:
        rows = sample_rows(cache.rows, "test", "stage1").first[:40]
        expected = stage1_logits(cache, made, rows, CPU)
        with torch.no_grad():
            logits = model.on_maps((torch.from_numpy(to_float32(cache.read(rows), cache.spec.dtype)),))
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-5
    text = (tmp_path / "m/README.md").read_text(encoding="utf-8")
    assert "Stage I's own classifier" in text
    shutil.copytree(trained.backbone, tmp_path / "copy")
    with pytest.raises(UserError, match=r"to export that, name .* in its place"):
        exported(SimpleNamespace(**{**vars(named), "root": tmp_path}), tmp_path / "n", "copy")
    (tmp_path / "copy/backbone.safetensors").unlink()  # a classifier of features, perhaps of another host
    with pytest.raises(UserError) as raised:
        exported(SimpleNamespace(**{**vars(named), "root": tmp_path}), tmp_path / "n", "copy")
    assert "stage I" not in str(raised.value)


def test_a_card_says_what_was_trained_and_how_certain_its_figures_are(tmp_path, trained):
    exported(trained, tmp_path / "m", stated=Stated("CC BY 4.0", "Digits | of `forms`"))
    text = (tmp_path / "m/README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license_name"] == "CC BY 4.0"
    assert "Digits \\| of &#96;forms&#96;" in text
    with open_cache(trained.cache) as cache:
        heads = load_heads_for(cache, trained.root / "dr", trained.backbone)
        scores = score_heads(cache, heads, "test", heads.about["evaluate"], CPU)
        counts = cache.spec.provenance["counts"]
    right = scores.said[3].guesses == scores.labels
    assert f"| all images | {100 * right.mean():.1f} | " in text
    for k, name in enumerate(load_model(tmp_path / "m").classes):
        mine = scores.labels == k
        assert f"| {name} | {counts[k]} | {mine.sum()} | {100 * right[mine].mean():.1f} | " in text
    assert "host `dr` with ratio 0.3, donor instance, selection random, seed 1" in text.replace("Host", "host")


def test_a_card_says_that_images_in_groups_count_singly():
    about = {"classes": ["a", "b"], "cache": "c", "host": "dr", "backbone": "b", "statistics": "stage1", "setting": {}}
    labels = np.array([0, 0, 1, 1])
    single, grouped = (
        card(about, [9, 3], "own", Measured(labels, labels, np.array(of)), Stated())
        for of in ([5, 3, 9, 1], [0, 0, 1, 1])
    )
    assert "The images come in 2 groups, but count singly here: the intervals are too narrow." in grouped
    assert "groups" not in single


def test_intervals_of_accuracies():
    """One class: Jeffreys' interval as SciPy has it. Equal classes: as of all images together. None is empty."""
    right, total = np.array([7, 2, 0]), np.array([10, 10, 10])
    low, high = 100 * beta.ppf([0.025, 0.975], 7.5, 3.5)
    assert interval(right[:1], total[:1], np.ones(1)) == pytest.approx((70, low, high))
    low, high = 100 * beta.ppf([0.025, 0.975], 9.5, 21.5)
    assert interval(right, total, total / 30) == pytest.approx((30, low, high))
    for k, ends in ((0, (0, 0)), (5, (100, 100))):
        mean, low, high = interval(np.array([k]), np.array([5]), np.ones(1))
        assert low <= mean <= high
        assert high - low > 30
        assert mean in ends


def test_intervals_hold_as_often_as_they_say():
    """500 test sets of 20 classes of other accuracies and sizes, which count alike whatever their number of images."""
    draws = np.random.default_rng(0)
    accuracy, total = draws.uniform(0.3, 0.95, 20), np.array([3, 5, 8, 12, 40] * 4)
    weights = np.full(20, 1 / 20)
    found = [interval(draws.binomial(total, accuracy), total, weights) for _ in range(500)]
    assert np.mean([low <= 100 * accuracy.mean() <= high for _, low, high in found]) > 0.93


def test_a_linear_head_is_a_plain_state_dict_with_evaluation_statistics(tmp_path, trained):
    exported(trained, tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    assert state["fc.weight"].shape == (10, 64)
    own = load_file(trained.backbone / "backbone.safetensors")
    assert set(state) == set(own) | {"fc.weight", "fc.bias"}
    with open_cache(trained.cache) as cache:
        from h2t.pipeline.extraction import batchnorm

        mixture = batchnorm.from_bytes(cache.statistics)["mixture"]
    assert all(torch.equal(state[name], t) for name, t in mixture.items())
    arch = plugins.load("backbones", "resnet20")
    backbone = arch.build(build(arch.Options, "test", {}))
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 8, 8)
    backbone.eval()
    with torch.no_grad():
        expected = load_model(tmp_path / "m").network(x)
        (maps,) = backbone(x)
        found = torch.nn.functional.linear(global_average(maps), state["fc.weight"], state["fc.bias"])
    torch.testing.assert_close(found, expected)


def test_a_classifier_that_is_a_convolution_is_exported_as_one(tmp_path):
    timm = pytest.importorskip("timm")
    small = {"channels": [8, 8, 16, 16, 16, 16], "levels": [1] * 6}
    whole = timm.create_model("dla34", num_classes=10, **small).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    samples, images = prepared(PREPARE, tmp_path / "p")
    options = {"model": "dla34", "config": {"architecture": "dla34", "model_args": small}}
    entry = {"arch": "timm", "options": options, "objective": "ce", "weights": str(tmp_path / "w.safetensors")}
    params = build(train_backbone.Params, "b", {**entry, "input": {"size": 32}})
    train_backbone.run(params, Run("b", tmp_path / "b"), samples, images)
    extracted(tmp_path / "cache", samples, images, tmp_path / "b", batchnorm=["stage1"])
    named = SimpleNamespace(root=tmp_path, cache=tmp_path / "cache", backbone=tmp_path / "b")
    exported(named, tmp_path / "m", "b", choice=Choice())
    state = load_file(tmp_path / "m/model.safetensors")
    assert state["fc.weight"].shape == (10, 16, 1, 1)
    whole.load_state_dict(state)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m").network(x), whole(x))


def test_a_flipped_bit_is_an_error_not_another_class(tmp_path, trained):
    """In the weights and in their description, such as the names of classes; a file from before seals still opens."""
    exported(trained, tmp_path / "m")
    for name, opens in (("model", load_model), ("head", load_single_head)):
        path = tmp_path / f"m/{name}.safetensors"
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        class_name = whole.index(b"classes") + 13
        for at in [*np.linspace(start, len(whole) - 1, 6).astype(int).tolist(), whole.index(b"mean"), class_name]:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(UserError, match=f"{name}.safetensors: "):
                opens(path)
        path.write_bytes(whole)
        tensors, about = load_weights(path)
        del about[SEAL]
        save_weights(path, tensors, about)
        opens(path)


def test_cosine_heads_are_not_linear_and_are_exported_all_the_same(tmp_path, trained):
    said = []
    exported(trained, tmp_path / "m", "ncm", choice=Choice(), say=said.append)
    assert "no plain state dict" in said[-1]
    assert "h2t.weight" in load_file(tmp_path / "m/model.safetensors")


def test_scales_and_priors_are_folded_into_one_layer(trained):
    from h2t.pipeline.heads.stored import load_heads

    heads = load_heads(trained.root / "mislas")
    state = {k: t[1].clone() for k, t in heads.state.items()}
    state["class_scale"] *= torch.linspace(0.5, 2, 10)
    weight, bias = as_linear(heads.parts, heads.context, state)
    torch.testing.assert_close(weight, (state["weight"] * state["class_scale"].unsqueeze(-1))[0])
    torch.testing.assert_close(bias, (state["bias"] * state["class_scale"])[0])


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice(), "there are 4 of 4; pass --head 0 to 3, or a combination of --ratio 0, 0.3; --seed 0, 1"),
        (Choice(ratio=0.7), "ratio 0.7 matches 0 of 4"),
        (Choice(number=9), "number 9 matches 0 of 4"),
    ],
)
def test_a_choice_that_fits_no_or_several_heads_is_one_line(tmp_path, trained, choice, says):
    with pytest.raises(UserError, match=says.replace(".", r"\.")):
        exported(trained, tmp_path / "m", choice=choice)
    assert not (tmp_path / "m").exists()


def test_nothing_is_left_behind_when_logits_differ(tmp_path, trained, monkeypatch):
    from h2t.pipeline.extraction import batchnorm

    monkeypatch.setattr(batchnorm, "use", lambda backbone, buffers: None)  # the wrong statistics: those of stage I
    with pytest.raises(UserError, match="logits on images may differ"):
        exported(trained, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_images_that_changed_are_refused(tmp_path, trained, monkeypatch):
    digits = plugins.load("datasets", "digits")
    right = digits.reader
    monkeypatch.setattr(digits, "reader", lambda options: lambda source: bytes(64 * [len(right(options)(source)) % 2]))
    with pytest.raises(UserError, match=r"has changed since it was prepared.*; or pass --without-images"):
        exported(trained, tmp_path / "m")


def test_without_images_the_head_is_checked_on_maps(tmp_path, trained, monkeypatch):
    digits = plugins.load("datasets", "digits")

    def gone(source):
        raise FileNotFoundError(source)

    monkeypatch.setattr(digits, "reader", lambda options: gone)
    with pytest.raises(UserError, match="--without-images"):
        exported(trained, tmp_path / "m")
    assert exported(trained, tmp_path / "m", with_images=False)["maps"] < 1e-4


@pytest.mark.parametrize(("host", "choice"), [("dr", ONE), ("mislas", Choice(1))])
def test_a_head_on_a_pooled_cache_is_exported_without_opening_images(tmp_path, trained, monkeypatch, host, choice):
    pooled = tmp_path / "pooled"
    pooled_copy(pooled, trained.cache)
    monkeypatch.setattr(plugins.load("datasets", "digits"), "reader", None)  # reading data may mean downloading it
    assert exported(trained, tmp_path / "m", host, choice=choice, cache=pooled, with_images=False)["maps"] < 1e-4


def test_a_cache_pooled_otherwise_needs_images(tmp_path, trained):
    fitted(tmp_path / "dr", trained.cache, trained.backbone, pool="max", optimiser={"epochs": 1})
    pooled_copy(tmp_path / "pooled", trained.cache, pool="max")
    own = SimpleNamespace(root=tmp_path, cache=tmp_path / "pooled", backbone=trained.backbone)
    with pytest.raises(UserError, match="got a cache pooled by max; export without --without-images"):
        exported(own, tmp_path / "m", with_images=False)
    assert exported(own, tmp_path / "m")["images"] < 1e-4


ONNX = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8), reason="torch below 2.8 writes no ONNX of ours"
)


@ONNX
def test_onnx_gives_the_same_logits_for_any_batch(tmp_path, trained):
    from h2t.pipeline.models.predict import open_model

    found = exported(trained, tmp_path / "m", "ncm", choice=Choice(0), onnx=True)
    assert found["onnx"] < 1e-4
    logits, classes, transform = open_model(tmp_path / "m/model.onnx", CPU)
    plain, same, _ = open_model(tmp_path / "m", CPU)
    x = torch.randn(2, 3, transform.size, transform.size)
    with torch.no_grad():
        torch.testing.assert_close(logits(x), plain(x), rtol=1e-4, atol=1e-4)
    assert classes == same


class Windows(torch.nn.Module):
    """Attention inside windows, with five axes, which torch's exporter does not know."""

    def forward(self, x):
        windows = x.flatten(1).unflatten(1, (1, 3, 4, 16))
        return torch.nn.functional.scaled_dot_product_attention(windows, windows, windows).flatten(1)


@ONNX
def test_a_network_that_torch_cannot_write_as_onnx_is_one_line(tmp_path):
    from h2t.pipeline.models.export import write_onnx
    from h2t.pipeline.models.model import Model

    pytest.importorskip("onnxscript")
    transform = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    with one_line(match=r"^model\.onnx: torch must .*; export without --onnx"):
        write_onnx(Model(Windows().eval(), {"transform": transform}), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_onnx_without_its_packages_is_one_line(tmp_path, trained, monkeypatch):
    from h2t.pipeline.models import export

    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'h2t\[onnx\]'"):
        exported(trained, tmp_path / "m", onnx=True)


def test_onnx_with_an_old_torch_is_one_line(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.7.1+cpu")
    with pytest.raises(UserError, match=r"^onnx: needs .* torch 2\.8 or newer; type: pip install"):
        exported(trained, tmp_path / "m", onnx=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, trained):
    """An exported model, by the command line, and pictures of digits as files."""
    root = tmp_path_factory.mktemp("export")
    params = write_params(root / "params.yaml")
    accepted(
        "export", trained.root / "dr", trained.cache, trained.backbone, root / "m", "--head", 3, "--params", params
    )
    digits = plugins.load("datasets", "digits")
    collection = digits.load(digits.Options())
    read = digits.reader(digits.Options())
    (root / "pictures/deep").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(digits.decode(read(collection.source[i]))).save(root / f"pictures/deep/{i}.png")
    return root


def test_predict_names_classes_as_the_model_does(model, tmp_path):
    done = accepted("predict", model / "m", model / "pictures", "--top", 2)
    header, *lines = done.splitlines()
    assert header == "image,rank,class,confidence"
    assert len(lines) == 6
    table = json.loads(accepted("predict", model / "m", model / "pictures", "--json", "--top", 99))
    assert sum(line["confidence"] for line in table[:10]) == pytest.approx(1, abs=1e-4)
    loaded = load_model(model / "m")
    digits = plugins.load("datasets", "digits")
    read = digits.reader(digits.Options())
    from h2t.pipeline.data.views import normalised

    x = normalised(torch.from_numpy(np.stack([digits.decode(read("digits/0000"))])), loaded.transform)
    with torch.no_grad():
        assert table[0]["class"] == loaded.classes[int(loaded.network(x).argmax())]
    out = tmp_path / "classes.csv"
    accepted("predict", model / "m/model.safetensors", model / "pictures", "--top", 2, "--out", out)
    assert out.read_text().splitlines() == [header, *lines]


@pytest.mark.parametrize("classes", [1, 2, 10, 20, 100])
def test_of_equal_logits_the_first_class_comes_first_as_in_evaluate(classes):
    """Few values among many classes: ties everywhere, also between classes whose softmax is the same number."""
    values = torch.randint(0, 3, (50, classes), generator=torch.Generator().manual_seed(0)).float()
    for logits in (values, values * 1e-20, torch.zeros(3, classes)):
        share, which = ranked(logits, 5)
        assert torch.equal(which[:, 0], torch.from_numpy(logits.numpy().argmax(1)))
        assert torch.equal(which[:, 0], logits.argmax(1))
        expected = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :5]
        assert which.tolist() == expected.tolist()
        assert share[:, 0].numpy() == pytest.approx(
            answers(logits.numpy(), np.zeros(len(logits), int)).confidence, rel=1e-12
        )


def as_table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_predict_writes_the_same_lines_in_every_format(model, tmp_path):
    expected = as_table(accepted("predict", model / "m", model / "pictures", "--top", 2))
    lines = [{**line, "rank": int(line["rank"]), "confidence": float(line["confidence"])} for line in expected]
    for ending in ("csv", "json", "jsonl", "parquet"):
        out = tmp_path / f"classes.{ending}"
        accepted("predict", model / "m", model / "pictures", "--top", 2, "--out", out)
    assert as_table((tmp_path / "classes.csv").read_text()) == expected
    assert json.loads((tmp_path / "classes.json").read_text()) == lines
    assert [json.loads(line) for line in (tmp_path / "classes.jsonl").read_text().splitlines()] == lines
    assert pq.read_table(tmp_path / "classes.parquet").to_pylist() == lines
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"classes.{e}" for e in ("csv", "json", "jsonl", "parquet")]
    done = invoke("predict", model / "m", model / "pictures", "--top", 2, "--jsonl")
    assert [json.loads(line) for line in done.stdout.splitlines()] == lines


def test_predict_reads_tables_and_stdin(model):
    folder = model / "pictures"
    expected = [line["class"] for line in as_table(accepted("predict", model / "m", folder))]
    names = [f"deep/{i}.png" for i in range(3)]
    (folder / "some.csv").write_text("file_name,other\n" + "".join(f"{name},x\n" for name in names))
    (folder / "windows.tsv").write_text("photo\n" + "".join(name.replace("/", "\\") + "\n" for name in names))
    pq.write_table(pa.table({"image": [(folder / name).read_bytes() for name in names]}), folder / "inside.parquet")
    for table, more in (("some.csv", []), ("windows.tsv", ["--column", "photo"]), ("inside.parquet", [])):
        done = invoke("predict", model / "m", folder / table, *more)
        assert [line["class"] for line in as_table(done.stdout)] == expected, done.output
    assert as_table(done.stdout)[2]["image"] == f"{folder}/inside.parquet:000000002"
    done = invoke("predict", model / "m", folder / "windows.tsv")
    assert "windows.tsv: which column holds the paths of images? There are: photo; add --column NAME" in done.stderr
    for between in ("\n", "\0"):
        text = between.join([*(str(folder / name) for name in names), ""])
        done = invoke("predict", model / "m", "-", input=text)
        assert [line["class"] for line in as_table(done.stdout)] == expected, done.output
    for table in ("some.csv", "windows.tsv", "inside.parquet"):
        (folder / table).unlink()


@pytest.mark.parametrize("name", own_data.COLLECTIONS)
def test_predict_reads_collections_as_people_have_them(model, tmp_path, name):
    """Each image once: also those that a spreadsheet or Parquet files name or hold."""
    usable = own_data.COLLECTIONS[name][0](tmp_path / "images")
    given = [tmp_path / "images"]
    if inside := own_data.PREDICTED.get(name):
        given = sorted(given[0].glob(inside.removeprefix("/")))
    done = invoke("predict", model / "m", *given)
    assert done.exit_code == (1 if name == "messy" else 0), done.stderr
    lines = as_table(done.stdout)
    assert len(lines) == len({line["image"] for line in lines}) == usable + own_data.READABLE.get(name, 0)


def test_predict_streams_many_images_and_names_the_bad_ones(model, tmp_path):
    """More images than a batch; a bad one in a batch costs no other, and names of any bytes are printed."""
    data = (model / "pictures/deep/0.png").read_bytes()
    for i in range(130):
        (tmp_path / f"{i:03}.png").write_bytes(data)
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(data)
    (tmp_path / "070.png").write_bytes(data[:-40])
    done = invoke("predict", model / "m", tmp_path)
    assert done.exit_code == 1
    lines = as_table(done.stdout)
    assert len(lines) == 130
    assert len({(line["class"], line["confidence"]) for line in lines}) == 1
    assert lines[-1]["image"] == f"{tmp_path}/caf\\xe9.png"
    assert done.stderr.startswith(f"skipped: {tmp_path}/070.png: cannot be decoded")
    assert "prepare" not in done.stderr


def test_without_a_readable_image_nothing_is_written(model, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = invoke("predict", model / "m", tmp_path / "bad.png", "--out", tmp_path / "c.json")
    assert done.exit_code == 1
    assert "no image could be read (given: 1)" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.png"]


def test_who_predicts_is_not_told_to_change_parameters(model, tmp_path):
    Image.new("F", (40, 40)).save(tmp_path / "deep.tif")
    line = invoke("predict", model / "m", tmp_path / "deep.tif").stderr.splitlines()[0]
    assert line.endswith("deep.tif: has floating-point pixels; convert it to what the model was trained on")


def test_predict_leaves_out_what_is_no_image_and_says_so(model, tmp_path):
    shutil.copy(model / "pictures/deep/0.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = invoke("predict", model / "m", tmp_path)
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2
    assert "bad.png" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_predict_takes_from_a_folder_what_training_takes(model, tmp_path):
    """Every ending of a format that is opened, through links; other kinds are counted, and a pipe does not block."""
    picture = Image.open(model / "pictures/deep/0.png")
    for folder in ("new/a", "elsewhere", "new/.thumbnails"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("new/a/1.jfif", "new/a/2.avif", "elsewhere/3.png", "new/a/._1.png", "new/.thumbnails/4.png"):
        picture.save(tmp_path / name, format="JPEG" if name.endswith("jfif") else None)
    (tmp_path / "new/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "new/loop").symlink_to(tmp_path / "new")
    for name in ("a/5.heic", "a/6.heic", "a/notes.txt"):
        (tmp_path / "new" / name).touch()
    os.mkfifo(tmp_path / "new/a/7.png")
    done = invoke("predict", model / "m", tmp_path / "new")
    assert done.exit_code == 1
    assert [line["image"] for line in as_table(done.stdout)] == [
        f"{tmp_path}/new/{name}" for name in ("a/1.jfif", "a/2.avif", "b/3.png")
    ]
    assert done.stderr.splitlines() == [
        f"note: {tmp_path}/new: 3 files of other kinds left out: .heic 2, .txt 1",
        f"skipped: {tmp_path}/new/a/7.png: cannot be read (not a plain file)",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "x.png"], "no exported model; make one with h2t export"),
        (["m/head.safetensors", "pictures"], "holds no complete classifier"),
        (["m", "nothing.png"], "no such image"),
        (["m", "pictures", "--out", "x.txt"], "must end in .csv, .json, .jsonl, .parquet"),
        (["m", "pictures", "--out", "nowhere/x.csv"], "nowhere/x.csv: must be in a folder that exists"),
        (["m", "pictures", "--out", "folder.csv"], "folder.csv: must be a file; got a folder"),
        (["m", "pictures", "--out", "x.json", "--json"], "whose ending says the format"),
        (["m", "-"], "stdin: must name at least one image"),
        (["b", "pictures"], "no exported model; make one with h2t export"),
    ],
)
def test_wrong_use_of_predict_is_one_line(model, monkeypatch, arguments, says):
    monkeypatch.chdir(model)
    (model / "folder.csv").mkdir(exist_ok=True)
    (model / "b").mkdir(exist_ok=True)
    for name in ("backbone", "head"):  # as train_backbone names its files
        (model / f"b/{name}.safetensors").touch()
    line = refused("predict", *arguments, code=2 if "--json" in arguments else 1)
    assert says in line

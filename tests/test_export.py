import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline_builders import CPU, fitted, invoke, make_prepare, silent, write_params
from safetensors.torch import load_file
from torchvision.models import resnet18

from h2t.cache.reader import open_cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run
from h2t.pipeline.evaluation.metrics import softmax_confidence
from h2t.pipeline.evaluation.scoring import head_logits, load_heads_for
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.models.export import Choice, run
from h2t.pipeline.models.model import as_linear, load_model
from h2t.pipeline.models.predict import ranked
from h2t.pipeline.networks.classifier import global_average

PREPARE = make_prepare().model_dump()
ONE = Choice(ratio=0.3, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_cache, backbone_dir):
    """Heads of several hosts on the digits' cache, one epoch."""
    root = tmp_path_factory.mktemp("heads")
    for host in ("dr", "mislas", "ncm"):
        more = {"optimiser": {"epochs": 1}} if host != "ncm" else {}
        if host == "ncm":
            from h2t.pipeline.stages import train_classifier

            params = train_classifier.Params(host="ncm", backbone="b", classifier="cosine")
            with open_cache(digits_cache) as opened:
                train_classifier.run(params, Run("ncm", root / host), Residency(), opened, backbone_dir)
        else:
            fitted(root / host, digits_cache, backbone_dir, host=host, **more)
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


def test_torchvision_loads_a_state_dict_of_its_names():
    """What makes the file loadable: `fc` beside the backbone's own names, nothing else needed, nothing left over."""
    model = resnet18(num_classes=4)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    state |= {"fc.weight": torch.zeros(4, 512), "fc.bias": torch.zeros(4)}
    resnet18(num_classes=4).load_state_dict(state, strict=True)


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


def test_onnx_without_its_packages_is_one_line(tmp_path, trained, monkeypatch):
    from h2t.pipeline.models import export

    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'h2t\[onnx\]'"):
        exported(trained, tmp_path / "m", onnx=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory, trained):
    """An exported model, by the command line, and pictures of digits as files."""
    root = tmp_path_factory.mktemp("export")
    params = write_params(root / "params.yaml")
    done = invoke(
        "export", trained.root / "dr", trained.cache, trained.backbone, root / "m", "--head", 3, "--params", params
    )
    assert done.exit_code == 0, done.output
    digits = plugins.load("datasets", "digits")
    collection = digits.load(digits.Options())
    read = digits.reader(digits.Options())
    (root / "pictures/deep").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(digits.decode(read(collection.source[i]))).save(root / f"pictures/deep/{i}.png")
    return root


def test_predict_names_classes_as_the_model_does(model, tmp_path):
    done = invoke("predict", model / "m", model / "pictures", "--top", 2)
    assert done.exit_code == 0, done.output
    header, *lines = done.stdout.splitlines()
    assert header == "image,rank,class,confidence"
    assert len(lines) == 6
    table = json.loads(invoke("predict", model / "m", model / "pictures", "--json", "--top", 99).stdout)
    assert sum(line["confidence"] for line in table[:10]) == pytest.approx(1, abs=1e-4)
    loaded = load_model(model / "m")
    digits = plugins.load("datasets", "digits")
    read = digits.reader(digits.Options())
    from h2t.pipeline.data.images import normalised

    x = normalised(torch.from_numpy(np.stack([digits.decode(read("digits/0000"))])), loaded.transform)
    with torch.no_grad():
        assert table[0]["class"] == loaded.classes[int(loaded.network(x).argmax())]
    out = tmp_path / "classes.csv"
    assert invoke("predict", model / "m/model.safetensors", model / "pictures", "--top", 2, "--out", out).exit_code == 0
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
        assert share[:, 0].numpy() == pytest.approx(softmax_confidence(logits.numpy()), rel=1e-12)


def test_predict_leaves_out_what_is_no_image_and_says_so(model, tmp_path):
    shutil.copy(model / "pictures/deep/0.png", tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = invoke("predict", model / "m", tmp_path)
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2
    assert "bad.png" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "x.png"], "no exported model; make one with h2t export"),
        (["m/head.safetensors", "pictures"], "holds no complete classifier"),
        (["m", "nothing.png"], "no such image"),
        (["m", "pictures", "--out", "x.txt"], "must end in .csv or .json"),
    ],
)
def test_wrong_use_of_predict_is_one_line(model, monkeypatch, arguments, says):
    monkeypatch.chdir(model)
    done = invoke("predict", *arguments)
    assert done.exit_code == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1

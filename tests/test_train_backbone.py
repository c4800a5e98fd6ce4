"""Stage I: resume, parts and processes, precision, memory format, frozen backbones, starting weights."""

import hashlib
import json
import pickle
from contextlib import contextmanager

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from builders import tree
from pipeline_builders import CPU, distance, extracted, fitted, make_samples, one_line, silent, torchrun, write_params
from safetensors.torch import load_file, save_file

from h2t.cache.reader import open_cache
from h2t.pipeline.base import params as reading
from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import Section
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.stages import evaluate, train_backbone
from h2t.pipeline.stages.train_backbone import Params
from h2t.pipeline.training.batches import rectangle
from h2t.pipeline.training.loop import StageOne
from h2t.pipeline.training.parallel import Group
from h2t.pipeline.training.resume import Checkpoint
from h2t.pipeline.training.settings import learning_rate

TINY = '''"""One convolution."""

from torch import nn

from h2t.pipeline.base.params import Section


class Options(Section):
    """None."""


class Net(nn.Module):
    channels, experts = 8, 1

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.bn1(self.conv1(x)).relu(),)


def build(options):
    return Net()
'''


BBN = {"arch": "resnet20", "options": {"experts": 2, "fork": "last_block"}, "objective": "bbn", "mixup": 0.0}


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory, monkeypatch):
    """A backbone that trains in no time, as a plug-in outside of the package."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "backbones").mkdir()
    (folder / "backbones/tiny.py").write_text(TINY)
    monkeypatch.setenv("H2T_PLUGINS", str(folder))


def make_training(**overrides) -> Params:
    values = {"arch": "tiny", "epochs": 2, "batch_size": 64, "warmup_epochs": 0, "lr": 0.02, "mixup": 1.0}
    return Params(**{**values, **overrides})


def trained(out, samples, images, say=silent, **overrides):
    """The backbone's state after training into `out`."""
    train_backbone.run(make_training(**overrides), Run("b", out, say=say), samples, images)
    return load_file(out / "backbone.safetensors")


def test_a_network_that_does_not_say_its_experts_is_refused(digits, tmp_path, monkeypatch):
    (tmp_path / "backbones").mkdir()
    (tmp_path / "backbones/mute.py").write_text(TINY.replace("channels, experts = 8, 1", "channels = 8"))
    monkeypatch.setenv("H2T_PLUGINS", str(tmp_path))
    with pytest.raises(UserError, match="mute: the network must have the attribute 'experts'; got none"):
        trained(tmp_path / "out", *digits, arch="mute")
    assert not (tmp_path / "out").exists()


def furthest(found, expected) -> float:
    return max(distance(found[k].double(), expected[k].double()) for k in expected if expected[k].abs().max() > 0)


def test_the_schedule():
    steps = Params(arch="resnet20", epochs=200)
    rates = [learning_rate(steps, e) for e in (0, 4, 5, 159, 160, 180, 199)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.1, 0.01, 0.001, 0.001])
    cosine = Params(arch="resnet20", epochs=10, schedule="cosine", warmup_epochs=0)
    assert learning_rate(cosine, 5) == pytest.approx(0.05)


def test_warm_up_may_start_above_0():
    """ResLT's: a third of the rate plus two thirds of it, risen by a fifth an epoch."""
    warm = Params(arch="resnet20", lr=0.3, warmup_from=1 / 3)
    expected = [0.3 * ((1 - f) / 3 + f) for f in (0.2, 0.4, 0.6, 0.8, 1.0)] + [0.3]
    assert [learning_rate(warm, e) for e in range(6)] == pytest.approx(expected, abs=1e-15)


def test_a_smaller_last_batch_can_be_left_out(digits, tmp_path):
    kept = trained(tmp_path / "1", *digits, epochs=1)
    left = trained(tmp_path / "2", *digits, epochs=1, drop_last=True)
    batches = [{int(v) for k, v in s.items() if k.endswith("num_batches_tracked")} for s in (kept, left)]
    assert batches == [{6}, {5}]  # 351 samples, 64 a batch
    with pytest.raises(
        UserError, match=r"backbones\.b\.batch_size: .* at least one batch; got 351 training images for"
    ):
        trained(tmp_path / "3", *digits, epochs=1, drop_last=True, batch_size=400)


def test_rotation_turns_the_images_of_stage_one(digits, tmp_path):
    samples, images = digits
    one, key = int(samples.of("train")[0]), (0, "stage1", 0)
    plain = images.batch([one], [key])
    assert torch.equal(images.turned(1e-6).batch([one], [key]), plain)
    turned = images.turned(90.0)
    assert torch.equal(turned.batch([one], [None]), images.batch([one], [None]))  # not in the evaluation view
    assert not torch.equal(turned.batch([one], [key]), plain)
    assert torch.equal(pickle.loads(pickle.dumps(turned)).batch([one], [key]), turned.batch([one], [key]))
    assert furthest(trained(tmp_path / "1", *digits, rotation=15.0), trained(tmp_path / "2", *digits)) > 1e-3


class Killed(BaseException):
    pass


@contextmanager
def killed(monkeypatch, stop):
    """Training in the block is killed when it has saved epoch `stop`."""
    offer = Checkpoint.offer

    def die(self, steps, *rest):
        offer(self, steps, *rest)
        if steps == stop:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoint, "offer", die)
        yield


@pytest.mark.parametrize(
    ("more", "stop"),
    [
        ({"epochs": 3}, 2),
        ({"epochs": 3, "precision": "fp16", "accumulate": 2, "objective": "reslt"}, 2),
        ({"epochs": 9, "mixup": 0.0, "cmo": 1.0, "accumulate": 2}, 5),  # in epochs 4 and 5
        ({"epochs": 3, "accumulate": 2, **BBN}, 2),
    ],
)
def test_a_killed_training_goes_on_to_the_same_bytes(digits, tmp_path, monkeypatch, more, stop):
    trained(tmp_path / "whole", *digits, **more)
    with killed(monkeypatch, stop):
        trained(tmp_path / "b", *digits, **more)
    assert not (tmp_path / "b").exists()
    said = []
    trained(tmp_path / "b", *digits, said.append, **more)
    assert said[0] == f"b: resumes after epoch {stop} of {more['epochs']}"
    assert tree(tmp_path / "b") == tree(tmp_path / "whole")
    assert not list(tmp_path.glob(".b.training*"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"lr": 0.03, "mixup": 0.2},
            "starts anew, as the saved training differs: parameters.lr 0.03, was 0.02; parameters.mixup 0.2, was 1.0",
        ),
        # Training that was interrupted before there was CMO goes on, too: its settings do not have these keys.
        ({"cmo_power": 2.0}, "resumes after epoch 1 of 1"),
    ],
    ids=["other settings", "a key of CMO that has no effect"],
)
def test_an_unfinished_training_is_gone_on_with_if_its_settings_mean_the_same(
    digits, tmp_path, monkeypatch, more, says
):
    with killed(monkeypatch, 1):
        trained(tmp_path / "b", *digits, epochs=1)
    said = []
    trained(tmp_path / "b", *digits, said.append, epochs=1, **more)
    assert said[0] == f"b: {says}"


def test_cmo_pastes_images_of_rare_classes(digits):
    """At exponent 1 all classes are as frequent, at 0 as in the training images; other epochs have none."""
    samples, images = digits
    for power in (0.0, 1.0, 2.0, 300.0):
        params = make_training(epochs=12, mixup=0.0, cmo=1.0, cmo_power=power)
        counts = torch.tensor(samples.counts)
        objective = plugins.load("objectives", "ce").Objective(Section(), 8, 1, counts)
        training = StageOne(
            params, plugins.load("backbones", "tiny").build(Section()), objective, samples, images, 0, Group(CPU, 0, 1)
        )
        drawn = {e: [p.second for parts in training.batches.of(e) for p in parts] for e in range(12)}
        assert [e for e in drawn if drawn[e][0] is not None] == list(range(4, 9))
        found = np.concatenate([p.samples for e in range(4, 9) for p in drawn[e]])
        share = np.bincount(samples.labels[found], minlength=len(counts)) / len(found)
        law = (counts.double() / counts.min()) ** (1 - power)
        assert np.abs(share - (law / law.sum()).numpy()).max() < 4 * (0.25 / len(found)) ** 0.5
        assert set(np.array(samples.table["split"])[found]) == {"train"}


def test_cmo_with_mixup_is_refused():
    with pytest.raises(UserError, match="cmo and mixup both mix images and labels; set one of them to 0"):
        reading.build(Params, "backbones.b", {"arch": "tiny", "cmo": 0.5, "mixup": 1.0})


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"mixup": 1.0}, r"backbones\.b\.mixup: does not go with objective bbn, .*; got 1\.0; set it to 0"),
        ({"cmo": 0.5}, r"backbones\.b\.cmo: does not go with objective bbn, .*; got 0\.5; set it to 0"),
        ({"frozen": True}, r"backbones\.b\.frozen: does not go with objective bbn, .*; got True; set it to false"),
        ({"options": {"experts": 3}}, r"b\.objective: bbn needs two branches .*; got resnet20 with 3 branches; take "),
        ({"options": {}}, r"b\.objective: bbn needs two branches .*; got resnet20 with 1 branch; take "),
        ({"arch": "tiny", "options": {}}, r"got tiny with branches that only run together; take arch resnet32 or "),
    ],
)
def test_what_does_not_go_with_bbn_is_one_line(digits, tmp_path, more, text):
    with one_line(match=text):
        trained(tmp_path / "b", *digits, **{**BBN, **more})


def test_hosts_start_from_the_classifier_that_bbn_is_published_with(digits, tmp_path):
    """W [f_c; f_r] + b on the cached maps of both branches, for the stage-I line and for DR before its first step."""
    trained(tmp_path / "b", *digits, epochs=1, **BBN)
    extracted(tmp_path / "x", *digits, tmp_path / "b")
    head = load_file(tmp_path / "b/head.safetensors")
    assert head["bias"][0].abs().min() > 0
    assert head["bias"][1].abs().max() == 0
    still = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}
    fitted(tmp_path / "h", tmp_path / "x", tmp_path / "b", batchnorm="stage1", optimiser=still, grid={"seed": [0]})
    with open_cache(tmp_path / "x") as cache:
        evaluate.run(evaluate.Params(), Run("b", tmp_path / "e"), cache, tmp_path / "h", tmp_path / "b")
        rows = cache.rows.filter(
            pc.and_(pc.equal(cache.rows["split"], "test"), pc.equal(cache.rows["statistics"], "stage1"))
        )
        places = rows["row"].to_numpy()
        both = np.concatenate([cache.read(places, expert=e).mean((2, 3)) for e in range(2)], 1)
    found = both @ np.concatenate([head["weight"][0], head["weight"][1]], 1).T + head["bias"][0].numpy()
    right = 100 * (found.argmax(1) == rows["label"].to_numpy()).mean()
    metrics = json.loads((tmp_path / "e/metrics.json").read_text())
    assert metrics["stage1"]["top1"] == pytest.approx(right, abs=1e-9)
    assert metrics["without_h2t"]["top1"] == pytest.approx(right, abs=1e-9)


def test_the_second_branch_of_bbn_gets_images_of_rare_classes_and_none_of_the_first(digits):
    """Classes in proportion to 1 / n; a branch's own batch norms see its own batch, the shared ones both."""
    samples, images = digits
    counts = torch.tensor(samples.counts)
    params = make_training(**BBN, epochs=4)
    backbone = plugins.load("backbones", "resnet20").build(
        reading.build(plugins.load("backbones", "resnet20").Options, "options", BBN["options"])
    )
    objective = plugins.load("objectives", "bbn").Objective(Section(), 64, 2, counts)
    training = StageOne(params, backbone, objective, samples, images, 0, Group(CPU, 0, 1))
    parts = [part for epoch in range(4) for batch in training.batches.of(epoch) for part in batch]
    assert [part.share for part in parts[:: len(parts) // 4]] == [1 - (t / 4) ** 2 for t in range(4)]
    found = np.concatenate([part.second.samples for part in parts])
    share = np.bincount(samples.labels[found], minlength=len(counts)) / len(found)
    law = 1 / counts.double()
    assert np.abs(share - (law / law.sum()).numpy()).max() < 4 * (0.25 / len(found)) ** 0.5
    x = torch.randn(8, 3, 8, 8)
    training._each_alone(x)
    seen = {"conv1": 2, "own": 1}
    assert int(backbone.bn1.num_batches_tracked) == seen["conv1"]
    assert [int(block.bn1.num_batches_tracked) for block in backbone.blocks] == [seen["own"]] * 2
    backbone.eval()
    first, second = training._each_alone(x)
    both = backbone(x)
    assert torch.allclose(first, both[0][:4], atol=1e-5)
    assert torch.allclose(second, both[1][4:], atol=1e-5)


@pytest.mark.parametrize(
    ("share", "centre", "expected"),
    [
        (0.75, (0.5, 0.5), (8, 24, 8, 24)),  # a quarter of the area
        (0.75, (0.0, 0.99), (23, 32, 0, 8)),  # clipped
        (0.0, (0.5, 0.5), (0, 32, 0, 32)),
        (1.0, (0.5, 0.5), (16, 16, 16, 16)),
    ],
)
def test_the_rectangle_of_cutmix(share, centre, expected):
    rows, columns = rectangle(share, centre, 32, 32)
    assert (rows.start, rows.stop, columns.start, columns.stop) == expected


def test_parts_of_a_batch_have_batch_norm_of_their_own(digits, tmp_path):
    one = trained(tmp_path / "1", *digits, epochs=1, mixup=0.0)
    two = trained(tmp_path / "2", *digits, epochs=1, mixup=0.0, accumulate=2)
    assert furthest(two, one) > 1e-3
    assert all(v == 6 for k, v in two.items() if k.endswith("num_batches_tracked"))  # 347 samples: 6 steps


def test_running_statistics_are_those_of_the_mean_part(digits, tmp_path):
    samples, images = digits
    params = make_training(epochs=1, batch_size=512, accumulate=2, mixup=0.0, lr=1e-9)
    state = trained(tmp_path / "b", samples, images, **params.model_dump(exclude={"arch", "epochs"}), epochs=1)
    train = samples.of("train")
    order = train[stream(0, "stage1", "epoch", 0).permutation(len(train))]
    halves = [len(order) - len(order) // 2, len(order) // 2]
    x = images.batch(order.tolist(), [(0, "stage1", 0)] * len(order))
    weight = state["conv1.weight"]
    means = [torch.nn.functional.conv2d(part, weight, None, 2, 1).mean((0, 2, 3)) for part in x.split(halves)]
    expected = 0.1 * (means[0] + means[1]) / 2
    assert torch.allclose(state["bn1.running_mean"], expected, atol=1e-5)


@pytest.mark.parametrize("more", [{"precision": "bf16"}, {"precision": "fp16"}, {"channels_last": True}])
def test_precision_and_memory_format_stay_near_float32(digits, tmp_path, more):
    plain = trained(tmp_path / "plain", *digits, epochs=1)
    found = trained(tmp_path / "found", *digits, epochs=1, **more)
    assert all(v.dtype == plain[k].dtype for k, v in found.items())
    assert furthest(found, plain) < (1e-4 if "channels_last" in more else 0.03)
    assert furthest(found, plain) > 0


def test_compile_is_asked_for(digits, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module: asked.append(module) or module)
    trained(tmp_path / "b", *digits, epochs=1, compile=True)
    assert len(asked) == 1


def test_only_the_classifier_of_a_frozen_backbone_trains(digits, tmp_path):
    first = trained(tmp_path / "a", *digits, epochs=1)
    save_file(first, tmp_path / "start.safetensors")
    start = str(tmp_path / "start.safetensors")
    found = trained(tmp_path / "b", *digits, epochs=1, frozen=True, start=start)
    assert all(torch.equal(found[k], first[k]) for k in first if not k.endswith("num_batches_tracked"))
    untrained = trained(tmp_path / "c", *digits, epochs=1, frozen=True, start=start, lr=1e-12)
    heads = [load_file(tmp_path / name / "head.safetensors")["weight"] for name in "bc"]
    assert untrained
    assert not torch.allclose(*heads)


def test_where_training_starts_from(digits, tmp_path):
    first = trained(tmp_path / "a", *digits, epochs=1)
    torch.save(
        {"state_dict": {**first, "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}}, tmp_path / "s.pth"
    )
    found = trained(tmp_path / "b", *digits, epochs=1, start=str(tmp_path / "s.pth"), lr=1e-12)
    assert torch.allclose(found["conv1.weight"], first["conv1.weight"])
    with pytest.raises(UserError, match=r"backbones\.b\.start: torchvision has no weights for tiny"):
        trained(tmp_path / "c", *digits, start="torchvision")
    with pytest.raises(UserError, match=r"must have sha256 0+; got"):
        trained(tmp_path / "c", *digits, start=str(tmp_path / "s.pth"), sha256="0" * 64)
    with pytest.raises(UserError, match=r"conv1\.weight must have shape"):
        trained(tmp_path / "c", *digits, arch="resnet20", start=str(tmp_path / "s.pth"))


@pytest.mark.parametrize("key", ["start", "weights"])
def test_a_checkpoint_replaced_after_its_sha256_was_compared_is_refused(digits, tmp_path, monkeypatch, key):
    for number in (0, 1):
        state = {"conv1.weight": torch.full((8, 3, 3, 3), float(number)), "fc.weight": torch.zeros(10, 8)}
        norm = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        state |= {f"bn1.{k}": torch.full((8,), v) for k, v in norm.items()}
        torch.save(state, tmp_path / f"{number}.pth")
    path, load = tmp_path / "0.pth", train_backbone.load_checkpoint
    given = {key: str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "epochs": 1}
    trained(tmp_path / "a", *digits, **given)

    def late(path):
        (tmp_path / "1.pth").replace(path)
        return load(path)

    monkeypatch.setattr(train_backbone, "load_checkpoint", late)
    with pytest.raises(UserError, match=rf"backbones\.b\.{key}: 0\.pth changed while it was read; run again"):
        trained(tmp_path / "b", *digits, **given)
    assert not (tmp_path / "b").exists()


def test_training_that_diverges_stops_in_one_line(digits, tmp_path):
    with pytest.raises(
        UserError, match=r"backbones\.b: training diverged, .*; got .* in epoch 0; lower backbones\.b\.lr"
    ):
        trained(tmp_path / "b", *digits, epochs=1, lr=1e6, mixup=0.0)
    assert not (tmp_path / "b").exists()


def test_two_processes_train_like_one_and_go_on_where_one_was_killed(tmp_path, monkeypatch, warm_programs):
    """A process trains whole parts of a batch, whatever is mixed or pasted in them."""
    entry = make_training(accumulate=2, objective="gcl", epochs=3).model_dump()
    write_params(tmp_path / "params.yaml", backbones={"ce_mixup": entry})
    given = reading.load(tmp_path / "params.yaml")["prepare"]
    kept = ("imbalance", "test_per_class", "validation_per_class")
    samples, images = make_samples(tmp_path / "prepare", **{k: given[k] for k in kept})

    def one(out):
        train_backbone.run(Params(**entry), Run("ce_mixup", out), samples, images)

    one(tmp_path / "one")
    with killed(monkeypatch, 1):
        one(tmp_path / "two")
    done = torchrun(warm_programs, "train-backbone", "ce_mixup", "prepare", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("resumes after epoch 1 of 3") == 1  # one process speaks
    for name in ("backbone.safetensors", "head.safetensors"):
        assert furthest(load_file(tmp_path / "two" / name), load_file(tmp_path / "one" / name)) < 1e-3


def test_processes_that_do_not_divide_the_parts_are_refused(digits, tmp_path, monkeypatch):
    @contextmanager
    def three(device):
        yield Group(device, 0, 3)

    monkeypatch.setattr(train_backbone, "processes", three)
    with pytest.raises(UserError, match=r"backbones\.b\.accumulate: must be a multiple of the number of processes, 3"):
        trained(tmp_path / "b", *digits, accumulate=2)

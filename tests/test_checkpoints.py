import pickle
from contextlib import nullcontext

import pytest
import torch
from pipeline_builders import one_line

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.networks.classifier import logits
from h2t.pipeline.networks.trained import load_backbone, load_head
from h2t.pipeline.networks.weights import fill, fit_head, load_checkpoint, load_weights, save_weights, split_head
from h2t.pipeline.stages import train_backbone


def network(arch="resnet32", experts=1, seed=0):
    module = plugins.load("backbones", arch)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = module.build(module.Options(experts=experts))
    for buffer in (b for n, b in built.named_buffers() if n.endswith("running_mean")):
        buffer.uniform_(-0.1, 0.1)
    return built.eval()


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def norms(channels=64):
    return {
        f"BN{b}.{k}": torch.rand(channels) + i
        for i, b in enumerate("HMT")
        for k in ("weight", "bias", "running_mean", "running_var")
    }


def published(kind, classes=10):
    """(checkpoint as the repository saves it, our network with the same weights, objective, expected head)."""
    experts = 3 if kind in ("ride", "ride_linear", "h2t_ride", "h2t_ride_cosine", "h2t_reslt") else 1
    net = network(experts=experts)
    body = net.state_dict()
    weight, bias = torch.randn(experts, classes, 64), torch.randn(experts, classes)
    linear = {"weight": weight, "bias": bias}
    if kind in ("h2t", "mislas"):
        checkpoint = {
            "epoch": 200,
            "state_dict_model": prefixed("module.", body),
            "state_dict_classifier": {"module.fc.weight": weight[0], "module.fc.bias": bias[0]},
            "best_acc1": torch.tensor(45.4),
            "its_ece": 8.8,
        }
        return checkpoint, net, "ce", linear
    if kind == "gcl":
        state = prefixed("module.", {**body, "linear.weight": weight[0].T.contiguous()})
        return {"epoch": 200, "arch": "resnet32", "state_dict": state}, net, "gcl", {"weight": weight}
    if kind == "ride":
        state = {**body, **{f"linears.{e}.weight": weight[e].T.contiguous() for e in range(3)}}
        return (
            {"arch": "Model", "epoch": 200, "state_dict": prefixed("backbone.", state)},
            net,
            "ride",
            {"weight": weight},
        )
    each = (
        {f"linears.{e}.weight": weight[e] for e in range(3)} | {f"linears.{e}.bias": bias[e] for e in range(3)}
        if experts == 3
        else {}
    )
    if kind == "ride_linear":
        state = prefixed("module.backbone.", {**body, **each})
        return {"state_dict": state}, net, "ce", linear
    if kind == "h2t_ride":
        unused = {"fc.weight": torch.zeros(classes, 64), "fc.bias": torch.zeros(classes)}
        return {"state_dict_model": body, "state_dict_classifier": {**unused, **each}}, net, "ce", linear
    if kind == "h2t_ride_cosine":
        unused = {"fc.weight": torch.zeros(classes, 64), "fc.bias": torch.zeros(classes)}
        cosine = {f"linears.{e}.weight": weight[e].T.contiguous() for e in range(3)}
        return (
            {"state_dict_model": body, "state_dict_classifier": {**unused, **cosine}},
            net,
            "ride",
            {"weight": weight},
        )
    if kind == "h2t_reslt":
        head = {k.replace("linears", "linear"): v for k, v in each.items()} | norms()
        return {"state_dict_model": body, "state_dict_classifier": prefixed("module.", head)}, net, "reslt", linear
    assert kind == "reslt"
    state = {**prefixed("model.", body), "linear.weight": weight[0], "linear.bias": bias[0], **norms()}
    return {"state_dict": prefixed("module.", state)}, net, "reslt", linear


KINDS = ("h2t", "mislas", "gcl", "ride", "ride_linear", "h2t_ride", "h2t_ride_cosine", "h2t_reslt", "reslt")


def stage(tmp_path, digits, file, objective, experts, arch="resnet32"):
    samples, images = digits
    params = train_backbone.Params(
        arch=arch, options={"experts": experts}, objective=objective, weights=str(file), epochs=1
    )
    train_backbone.run(params, Run("b", tmp_path / "b"), samples, images)
    return tmp_path / "b"


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_published_repositories(kind, tmp_path, digits):
    checkpoint, net, objective, expected = published(kind)
    torch.save(checkpoint, tmp_path / "x.pth.tar")
    folder = stage(tmp_path, digits, tmp_path / "x.pth.tar", objective, net.experts)
    loaded, _ = load_backbone(folder)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for found, wanted in zip(loaded(x), net(x), strict=True):
            assert torch.equal(found, wanted)
    head = load_head(folder)
    for name, tensor in expected.items():
        assert torch.equal(head.state[name], tensor)
    if objective == "reslt":
        state = checkpoint.get("state_dict_classifier") or checkpoint["state_dict"]
        assert torch.equal(head.state["running_var"][2], state["module.BNT.running_var"])
    with torch.no_grad():
        features = torch.stack([m.mean((-2, -1)) for m in loaded(x)])
        assert logits(head.classifier, head.state, features, head.scale).shape == (2, 10)


def test_a_plain_state_dict_and_safetensors(tmp_path):
    from safetensors.torch import save_file

    net = network("resnet20")
    state = {**net.state_dict(), "fc.weight": torch.randn(10, 64), "fc.bias": torch.randn(10)}
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        body, head = split_head(load_checkpoint(tmp_path / name))
        fill(network("resnet20", seed=1), body, name)
        assert torch.equal(head["weight"][0], state["fc.weight"])


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    for number, content in enumerate(({"state_dict": Malicious()}, Malicious())):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(UserError, match="refused, it holds more than tensors"):
            load_checkpoint(tmp_path / f"{number}.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"state_dict": Malicious()}))
    with one_line(match=r"refused|not a readable checkpoint"):
        load_checkpoint(tmp_path / "old.pt")


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"hello", b"PK\x03\x04broken"])
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_files_that_are_no_checkpoints(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with one_line():
        load_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="no such checkpoint file"):
        load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("fc.weight"), "must hold a linear classifier named fc"),
        (lambda s: s.pop("conv1.weight"), "must hold weights for 'conv1.weight'"),
        (lambda s: s.update(extra=torch.ones(1)), "1 key not in the network: extra"),
        (lambda s: s.update({"conv1.weight": torch.ones(1)}), "conv1.weight must have shape"),
        (lambda s: s["conv1.weight"].fill_(torch.nan), "holds NaN or infinity"),
        (lambda s: s["fc.weight"].fill_(torch.inf), "fc.weight holds NaN or infinity"),
        (lambda s: s["fc.bias"][:1].fill_(torch.nan), "fc.bias holds NaN or infinity"),
        (lambda s: s.update({"fc.0.bias": torch.ones(3)}), "fc.bias must be dense real tensors with 1 axis"),
        (lambda s: s.update({"fc.bias": torch.ones(10, dtype=torch.complex64)}), "got another kind of tensor"),
        (lambda s: s.update({"fc.weight": torch.ones(64)}), "must hold a linear classifier named fc"),
        (lambda s: s.update({"fc.weight": torch.ones(10, 63)}), r"classifier's weight must have shape \(1, 10, 64\)"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, digits, change, text):
    state = {**network("resnet20").state_dict(), "fc.weight": torch.randn(10, 64), "fc.bias": torch.randn(10)}
    change(state)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=text):
        stage(tmp_path, digits, tmp_path / "x.pt", "ce", 1, "resnet20")


@pytest.mark.parametrize(("value", "fits"), [(torch.inf, True), (torch.nan, False)])
def test_a_bound_may_be_infinite_but_nothing_is_nan(value, fits):
    model = torch.nn.Module()
    model.register_buffer("bound", torch.tensor([torch.inf, 1]))
    given = {"bound": torch.tensor([value, 1])}
    with nullcontext() if fits else pytest.raises(UserError, match="bound holds NaN or infinity"):
        fill(model, given, "x")


def test_heads_of_another_kind():
    head = {"weight": torch.randn(1, 10, 64), "bias": torch.randn(1, 10)}
    with pytest.raises(UserError, match="cosine classifier takes no bias"):
        fit_head(head, {"weight": torch.zeros(1, 10, 64)}, "x")
    square = torch.randn(1, 8, 8)
    assert torch.equal(fit_head({"weight": square}, {"weight": torch.zeros(1, 8, 8)}, "x")["weight"], square.mT)
    own = {"weight": torch.zeros(1, 8, 8), "bias": torch.ones(1, 8)}
    assert torch.equal(fit_head({"weight": square}, own, "x")["weight"], square)
    with pytest.raises(UserError, match="the classifier's norm_weight must have shape"):
        fit_head(head, {**head, "norm_weight": torch.ones(3, 64)}, "x")


def test_weights_of_ours_come_back_and_repeat(tmp_path):
    state = {"b": torch.randn(3), "a": torch.arange(4).reshape(2, 2).T}
    for name in ("one", "two"):
        save_weights(tmp_path / name, state, {"n": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found, about = load_weights(tmp_path / "one")
    assert about == {"n": 1}
    assert all(torch.equal(found[k], state[k]) for k in state)
    for text in ("", "no"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(UserError, match="not weights written by h2t"):
            load_weights(tmp_path / "bad")

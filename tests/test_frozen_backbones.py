"""Pretrained networks of other packages: the proof of the tap by family, layouts, weights, one set of statistics."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest
import torch
from backbone_families import FAMILIES, built, own_logits_differ_by, reference, timm
from pipeline_builders import make_samples, one_line
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.layouts import as_maps, grid
from h2t.pipeline.networks.pretrained import made_with, other_version
from h2t.pipeline.networks.trained import BLOCK, BackboneFacts, has_stored_weights, load_backbone, load_head
from h2t.pipeline.networks.weights import fill, load_weights, save_weights
from h2t.pipeline.stages import extract, train_backbone

pytest.importorskip("timm")
pytest.importorskip("transformers")

#: Families whose own classifier does not read the chosen features, with a part of the reason that is given.
UNPROVEN = {
    "timm-test_vit-map": "the class token: set options.features to cls",
    "timm-test_vit-tokens": "the class token: set options.features to cls",
    "timm-vit_base_patch16_siglip_224-map": r"lie attn_pool\.",
    "huggingface-dinov2-cls": r"lie classifier \(Linear\)",
    "huggingface-dinov2_with_registers-cls": r"lie classifier \(Linear\)",
    "huggingface-siglip_vision_model-map": r"lie (vision_model\.)?head\.",  # that of transformers 4
}


def skip_unknown(family):
    """timm 1.0.15, the oldest that is allowed, has no DINOv3 yet."""
    import timm as package

    if version("timm") < "1.0.2" and family.arch == "timm" and not package.is_model(family.name):
        pytest.skip(f"timm {version('timm')} has no {family.name}")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_pool_and_own_layers_and_classifier_give_the_networks_own_logits(family):
    skip_unknown(family)
    backbone, off = own_logits_differ_by(family)
    if str(family) in UNPROVEN:
        assert off is None
        assert re.search(UNPROVEN[str(family)], backbone.ending.why)
    else:
        assert off is not None, backbone.ending.why
        assert off <= 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (2, 5), (7, 1), (14, 9)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_tokens_become_a_grid_that_need_not_be_square(rows, columns, prefix):
    image = (rows * 16, columns * 16)
    patches = torch.randn(2, 6, rows, columns)
    tokens = torch.cat([torch.randn(2, prefix, 6), patches.flatten(2).mT], 1)
    assert grid(rows * columns, image) == (rows, columns)
    assert torch.equal(as_maps(tokens, 6, image, prefix, "map"), patches)
    assert as_maps(tokens, 6, image, prefix, "tokens").shape == (2, 6, prefix + rows * columns, 1)
    if prefix:
        assert torch.equal(as_maps(tokens, 6, image, prefix, "cls")[..., 0, 0], tokens[:, 0])
    else:
        with pytest.raises(UserError, match="needs a network with a class token"):
            as_maps(tokens, 6, image, prefix, "cls")


def test_maps_with_the_channels_last_are_turned():
    maps = torch.randn(2, 6, 3, 4)
    assert torch.equal(as_maps(maps.permute(0, 2, 3, 1), 6, (48, 64), None, "map"), maps)
    assert torch.equal(as_maps(maps, 6, (48, 64), None, "map"), maps)


VIT = timm("test_vit", "cls")


def params(path, **more) -> train_backbone.Params:
    values = {"arch": "timm", "options": VIT.options, "objective": "ce", "weights": str(path), "input": {"size": 32}}
    return train_backbone.Params.model_validate({**values, **more})


@pytest.mark.parametrize(("classes", "says"), [(10, None), (1000, "it has 1000 classes, the dataset has 10")])
def test_the_classifier_in_the_weights_is_kept_if_it_has_the_datasets_classes(tmp_path, classes, says):
    import timm as package

    samples, images = make_samples(tmp_path / "p")
    whole = package.create_model("test_vit", num_classes=classes, img_size=32)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    said: list[str] = []
    train_backbone.run(params(tmp_path / "w.safetensors"), Run("b", tmp_path / "b", say=said.append), samples, images)
    head = load_head(tmp_path / "b")
    if says is None:
        assert torch.equal(head.state["weight"][0], whole.head.weight)
    else:
        assert not head.state
        assert says in said[-1].replace(",000", "000")
    backbone, identity = load_backbone(tmp_path / "b")
    assert identity["input"]["size"] == 32
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(backbone(x)[0][..., 0, 0], whole.eval().forward_features(x)[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (timm("dla34", channels=(8, 8, 16, 16, 16, 16), levels=(1, 1, 1, 1, 1, 1)), "fc"),  # a convolution
        (timm("vit_small_patch16_dinov3", depth=1, embed_dim=48, num_heads=3), "head"),  # timm builds none by default
    ],
    ids=str,
)
def test_a_classifier_that_the_plain_network_lacks_or_writes_as_a_convolution_is_kept(family, name, tmp_path):
    import timm as package

    skip_unknown(family)
    samples, images = make_samples(tmp_path / "p")
    whole = package.create_model(family.name, num_classes=10, **family.config).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    values = params(tmp_path / "w.safetensors", options=family.options)
    train_backbone.run(values, Run("b", tmp_path / "b"), samples, images)
    head, (backbone, _) = load_head(tmp_path / "b"), load_backbone(tmp_path / "b")
    assert backbone.last_layer == name
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        own = torch.nn.functional.linear(global_average(backbone(x)[0]), head.state["weight"][0], head.state["bias"][0])
        assert torch.allclose(own, whole(x), atol=1e-5)
    weight = whole.state_dict()[f"{name}.weight"]
    assert torch.equal(head.state["weight"][0].reshape(10, -1, *backbone.last_kernel), weight)


WIDE = timm("vit_small_patch16_224", "cls", 32, depth=1)  # weights of up to 590,000 numbers


@pytest.mark.parametrize("family", [WIDE, timm("mobilenetv3_small_050")], ids=str)
def test_a_loaded_network_has_the_weights_of_the_file_and_the_ending_that_was_proved(family, tmp_path):
    network = built(family)
    about = {"arch": "timm", "options": family.options, "input": {"size": family.size}}
    save_weights(tmp_path / "backbone.safetensors", network.state_dict(), about)
    before = torch.get_rng_state()
    loaded, _ = load_backbone(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.ending.classifier == network.ending.classifier
    assert [kinds for _, kinds in loaded.ending.after] == [kinds for _, kinds in network.ending.after]
    assert {k: v.tolist() for k, v in loaded.state_dict().items()} == {
        k: v.tolist() for k, v in network.state_dict().items()
    }
    assert has_stored_weights(loaded, tmp_path)
    next(loaded.parameters()).data.view(-1)[0] += 1e-3
    assert not has_stored_weights(loaded, tmp_path)


def test_loading_a_network_draws_few_random_numbers(tmp_path):
    """Of a network of 86 million parameters, drawing initial values took longer than everything else."""
    network = built(WIDE)
    about = {"arch": "timm", "options": WIDE.options, "input": {"size": WIDE.size}}
    save_weights(tmp_path / "backbone.safetensors", network.state_dict(), about)
    drawn = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal drawn
            if func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
                drawn += args[0].numel()
            return func(*args, **(kwargs or {}))

    with Counting():
        load_backbone(tmp_path)
    large = sum(p.numel() > BLOCK for p in network.parameters())
    small = sum(p.numel() for p in network.parameters() if p.numel() <= BLOCK)
    assert 0 < drawn < 4 * (BLOCK * large + small)


def test_without_batch_norm_there_is_one_set_of_statistics_and_no_pass():
    network = built(VIT)
    found = batchnorm.from_bytes(batchnorm.to_bytes({"stage1": batchnorm.current(network)}))
    assert found == {"stage1": {}}
    batchnorm.use(network, found["stage1"])


def facts(batch_norm, pretrained):
    from h2t.pipeline.data.network_input import Input

    return BackboneFacts(Input(), batch_norm, pretrained)


def test_recipes_that_do_not_apply_are_left_out():
    asked = extract.Params(batchnorm=["stage1", "calibrated"])
    assert extract.with_recipes_of(asked, facts(True, True)) == asked
    assert extract.with_recipes_of(extract.Params(), facts(True, False)).batchnorm == ["stage1", "branchwise"]
    assert extract.with_recipes_of(extract.Params(), facts(True, True)).batchnorm == ["stage1"]
    for given in (asked, extract.Params()):
        left = extract.with_recipes_of(given, facts(False, False))
        assert (left.batchnorm, left.batchnorm_passes) == (["stage1"], 0)


def options(arch, **values):
    module = plugins.load("backbones", arch)
    return module, module.Options.model_validate(values)


@pytest.mark.parametrize("arch", ["timm", "huggingface"])
def test_a_hub_id_needs_a_commit(arch):
    module, chosen = options(arch, model="owner/name")
    with pytest.raises(UserError, match=r"options\.revision: a hub id needs the commit"):
        module.resolved(chosen)
    with pytest.raises(ValueError, match="40 hexadecimal digits"):
        module.Options(model="owner/name", revision="main")


@pytest.mark.parametrize("arch", ["timm", "huggingface"])
def test_offline_the_message_says_where_to_put_the_files(arch, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    module, chosen = options(arch, model="owner/name", revision="a" * 40)
    with one_line(match=r"\(no network\); put config\.json and model\.safetensors into a folder"):
        module.resolved(chosen)


@pytest.mark.parametrize("arch", ["timm", "huggingface"])
def test_code_of_a_folder_is_refused(arch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": {"AutoModel": "evil.Model"}}))
    module, chosen = options(arch, model=str(tmp_path))
    with pytest.raises(UserError, match="brings code of its own, which h2t never runs"):
        module.resolved(chosen)


def test_a_local_folder_of_hugging_face_gives_network_input_and_weights(tmp_path):
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8
    )
    whole = transformers.ViTForImageClassification(config).eval()
    whole.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}, resample=3).save_pretrained(tmp_path)
    module, chosen = options("huggingface", model=str(tmp_path), features="cls")
    stated = module.input(chosen)
    assert (stated.size, stated.fit, stated.interpolation, stated.mean) == (16, "squash", "bicubic", [0.5] * 3)
    found = module.weights(chosen, 16)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.state_dict().items())
    backbone = module.build(module.resolved(chosen), 16)
    assert backbone.last_layer == "classifier"
    assert backbone.unused == {"classifier.weight", "classifier.bias"}
    with pytest.raises(UserError, match=r"the files in .* cannot be loaded .* leave input.size out") as no:
        module.weights(chosen, 32)
    assert "hub" not in str(no.value)


def test_dvc_watches_a_local_folder_and_no_hub_id(tmp_path):
    from pipeline_builders import make_params

    from h2t.pipeline.stages import inputs

    values = make_params()
    values.setdefault("extract", {})
    for model, watched in ((str(tmp_path), True), ("owner/name", False)):
        values["backbones"] = {"b": {"arch": "timm", "options": {"model": model}, "weights": "pretrained"}}
        named = inputs.named(values)["backbones/b"]
        assert named == ({"backbones.b.options.model": model} if watched else {})


@pytest.mark.parametrize(("model", "size"), [("test_vit", 75), ("test_convnext", 1)])
def test_a_size_that_a_network_does_not_take_is_one_line(model, size):
    plugin = plugins.load("backbones", "timm")
    with pytest.raises(UserError, match=rf"input.size: the network must take images of 3 x {size} x {size}; it says"):
        plugin.build(plugin.Options(model=model), size)


def test_a_network_of_grey_images_is_one_line(tmp_path):
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "num_channels": 1,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "vit", "image_size": 32, "patch_size": 16, **small})
    )
    plugin = plugins.load("backbones", "huggingface")
    with pytest.raises(UserError, match=r"must take images of 3 x 32 x 32; it says: Make sure that the channel"):
        plugin.build(plugin.Options(model=str(tmp_path)), 32)


def test_a_tensor_of_two_names_and_infinite_bounds_are_saved_and_loaded(tmp_path):
    twice = torch.nn.Linear(3, 3)
    network = torch.nn.Sequential(twice, twice)
    network.register_buffer("bounds", torch.tensor([-torch.inf, torch.inf]))
    save_weights(tmp_path / "w.safetensors", network.state_dict(), {})
    found, _ = load_weights(tmp_path / "w.safetensors")
    assert set(found) == set(network.state_dict())
    fill(network, found, "file")
    with pytest.raises(UserError, match=r"0\.weight holds NaN or infinity"):
        fill(network, {**found, "0.weight": torch.full((3, 3), torch.nan)}, "file")


def test_modules_that_another_version_of_the_package_named_otherwise_are_told(tmp_path):
    """transformers 5 calls vit.layers what 4 called vit.encoder.layer."""
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    config = {**vit, "num_attention_heads": 2, "intermediate_size": 16}
    plugin, chosen = options("huggingface", config=config)
    state = {f"of4.{name}": value for name, value in plugin.build(chosen, 32).state_dict().items()}
    about = {"arch": "huggingface", "options": {"config": config}, "channels": 16, "experts": 1, "input": {"size": 32}}
    save_weights(tmp_path / "backbone.safetensors", state, about)
    here = version("transformers")
    with pytest.raises(UserError, match=rf"another architecture, or made with another transformers than {here}\?$"):
        load_backbone(tmp_path)
    told = other_version("huggingface", {"transformers": "4.1"})
    assert told == f", or made with another transformers (4.1) than {here}"
    assert other_version("huggingface", made_with("huggingface")) == other_version("resnet20") == ""


def test_an_encoder_of_timm_without_a_classifier_gives_maps():
    class Encoder(torch.nn.Conv2d):
        forward_features = torch.nn.Conv2d.forward

        def forward_head(self, values):
            raise NotImplementedError

    backbone = plugins.load("backbones", "timm")._Timm(Encoder(3, 5, 3), 5, "map", 8, None)
    assert backbone.ending.why == "it has no classifier of its own"
    assert backbone(torch.zeros(1, 3, 8, 8))[0].shape == (1, 5, 6, 6)


def test_a_network_of_several_outputs_is_one_line():
    plugin = plugins.load("backbones", "timm")
    small = {"parallel_depth": 1, "serial_depths": [1] * 4, "embed_dims": [16] * 4}
    config = {"architecture": "coat_tiny", "model_args": small}
    with pytest.raises(UserError, match=r"must give one tensor of maps or tokens; got \d; choose another network"):
        plugin.build(plugin.Options(model="coat_tiny", config=config), 32)


TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
REFUSED = [
    (
        {"model_type": "imagegpt", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
        "imagegpt .* takes no images",
    ),
    (
        {"model_type": "siglip2", "vision_config": {**TEXT, "num_patches": 16}},
        "must take images alone; it says: .*missing|cannot build a network of siglip2",  # transformers 5, 4
    ),
    ({"model_type": "bert", **TEXT}, "bert of transformers takes no images"),
    ({"model_type": "dinat"}, "transformers cannot build a network of dinat .*natten"),
    ({"model_type": "hgnet_v2"}, "hgnet_v2 of transformers gives no maps before its classifier"),
]


@pytest.mark.parametrize(
    ("config", "says"), REFUSED, ids=lambda one: one["model_type"] if isinstance(one, dict) else ""
)
def test_a_network_of_hugging_face_that_cannot_be_one_is_one_line(config, says):
    plugin = plugins.load("backbones", "huggingface")
    with pytest.raises(UserError, match=says) as no:
        plugin.build(plugin.Options(config=config), 32)
    assert str(no.value).endswith("choose another network")


def test_a_size_that_is_stated_twice_in_a_configuration_is_set_twice():
    plugin = plugins.load("backbones", "huggingface")
    hiera = {"model_type": "hiera", "image_size": [224, 224], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    hiera |= {"query_stride": [2, 2], "num_query_pool": 1, "masked_unit_size": [2, 2]}
    backbone = plugin.build(plugin.Options(config=hiera), 64)
    assert backbone(torch.zeros(1, 3, 64, 64))[0].shape == (1, backbone.channels, 8, 8)


def test_an_unknown_name_gets_the_nearest():
    module, chosen = options("timm", model="resnet188")
    with pytest.raises(
        UserError, match=r"options\.model: must be a network of timm.*got 'resnet188'; did you mean 'resnet"
    ):
        module.build(chosen, 32)


def test_fresh_weights_come_from_torchs_generator_and_the_proof_changes_nothing():
    module, chosen = options("timm", model="test_convnext")
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(module.build(chosen, 32).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert not torch.equal(states[0]["stem.0.weight"], states[2]["stem.0.weight"])
    torch.manual_seed(0)
    plain = module._create(chosen).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in states[0].items())


def test_a_backbone_moves_and_trains_with_its_network():
    network = built(VIT).double()
    assert network._model.cls_token.dtype == torch.float64
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.float64))[0].dtype == torch.float64
    network.train()
    assert all(m.training for m in network._model.modules())
    assert reference(VIT).training is False
    assert np.isfinite(network.channels)

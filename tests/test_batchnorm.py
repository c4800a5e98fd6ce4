import numpy as np
import pytest
import torch
from pipeline_builders import CPU

from h2t.pipeline.base import plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.seeds import stream
from h2t.pipeline.extraction import batchnorm
from h2t.pipeline.extraction.batchnorm import SAMPLERS, compute, current, estimate, from_bytes, to_bytes, use
from h2t.pipeline.extraction.recipes import RECIPES, stored
from h2t.pipeline.networks.trained import load_backbone
from h2t.pipeline.networks.weights import weights_digest

DRAWN = ("balanced", "instance", "reverse")  # samplers of rows that recipes tell apart


def state_of(backbone):
    return {k: t.clone() for k, t in backbone.state_dict().items()}


@pytest.fixture
def backbone(backbone_dir):
    return load_backbone(backbone_dir)[0]


def batches_of(name, samples, images, passes, seed):
    """The augmented batches behind the statistics `name`: the samplers in turn, each counting its own batches."""
    train = samples.of("train")
    labels = samples.labels[train]
    counts = np.bincount(labels)
    from h2t.pipeline.data.classes import ClassIndex

    index = ClassIndex(np.cumsum(counts) - counts, counts)
    size = min(128, len(train))
    seen = dict.fromkeys(SAMPLERS[name], 0)
    for number in range(passes):
        sampler = SAMPLERS[name][number % len(SAMPLERS[name])]
        epoch, step = divmod(seen[sampler], len(train) // size)
        seen[sampler] += 1
        law = plugins.load("samplers", sampler)
        at = law.draw(index, lambda *key, s=sampler: stream(seed, "batchnorm", name, s, *key), epoch, step, size)
        yield images.batch(train[at].tolist(), [(seed, "batchnorm", name, number, i) for i in range(size)])


@pytest.mark.parametrize("name", ["balanced", "instance", "calibrated", "reverse"])
def test_statistics_are_means_over_batches_of_means_and_unbiased_variances(name, digits, backbone):
    """Against hooks on the inputs of every norm, in train mode, in float64."""
    samples, images = digits
    found = estimate(backbone, SAMPLERS[name], samples, images, passes=3, seed=5, device=CPU, name=name)
    seen: dict[str, list] = {}

    def watch(layer):
        def hook(module, inputs):
            x = inputs[0].double()
            seen.setdefault(f"{layer}.running_mean", []).append(x.mean((0, 2, 3)))
            seen.setdefault(f"{layer}.running_var", []).append(x.var((0, 2, 3), correction=1))

        return hook

    norms = [(n, m) for n, m in backbone.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in norms]
    backbone.train()
    with torch.no_grad():
        for x in batches_of(name, samples, images, 3, 5):
            backbone(x)
    for handle in handles:
        handle.remove()
    assert set(found) == set(seen)
    for key, values in seen.items():
        assert len(values) == 3
        expected = torch.stack(values).mean(0)
        assert torch.allclose(found[key].double(), expected, rtol=1e-4, atol=1e-5), key


def test_the_backbone_is_left_unchanged(digits, backbone):
    before = state_of(backbone)
    momenta = [m.momentum for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    compute(backbone, ["balanced", "calibrated", "mixture", "stage1"], *digits, passes=1, seed=0, device=CPU)
    for name, tensor in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), name
    assert not any(m.training for m in backbone.modules())
    assert [m.momentum for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)] == momenta
    assert not any(p.requires_grad for p in backbone.parameters())


def test_an_error_on_the_way_leaves_the_backbone_unchanged(digits, backbone):
    samples, _ = digits
    before = weights_digest(current(backbone))

    class Broken:
        def batch(self, samples, keys):
            raise UserError("no image")

    with pytest.raises(UserError, match="no image"):
        estimate(backbone, ("balanced",), samples, Broken(), passes=1, seed=0, device=CPU, name="balanced")
    assert weights_digest(current(backbone)) == before
    assert not any(m.training for m in backbone.modules())


def test_the_mixture_is_element_wise(digits, backbone):
    found = compute(backbone, ["balanced", "instance", "mixture"], *digits, passes=1, seed=0, device=CPU)
    assert list(found) == ["balanced", "instance", "mixture"]
    for name, values in found["mixture"].items():
        expected = 0.526 * found["instance"][name].double() + 0.474 * found["balanced"][name].double()
        assert torch.allclose(values.double(), expected, rtol=1e-6, atol=1e-7)


def test_the_mixture_alone_needs_no_one_to_ask_for_its_parts(digits, backbone):
    assert list(compute(backbone, ["mixture"], *digits, passes=1, seed=0, device=CPU)) == ["mixture"]


def test_stage1_is_what_the_backbone_holds(digits, backbone):
    found = compute(backbone, ["stage1"], *digits, passes=1, seed=0, device=CPU)
    for name, values in found["stage1"].items():
        assert torch.equal(values, backbone.state_dict()[name])


def test_statistics_repeat_and_hang_on_seed_and_passes(digits, backbone):
    def digest(**changes):
        given = {"passes": 2, "seed": 0, "device": CPU, "name": "balanced", **changes}
        return weights_digest(estimate(backbone, ("balanced",), *digits, **given))

    assert digest() == digest()
    assert len({digest(), digest(seed=1), digest(passes=3)}) == 3


def test_branches_see_different_batches(digits, backbone):
    found = compute(backbone, ["balanced", "instance"], *digits, passes=2, seed=0, device=CPU)
    assert weights_digest(found["balanced"]) != weights_digest(found["instance"])


def test_using_statistics_changes_maps_and_back(digits, backbone):
    _, images = digits
    x = images.batch([0, 1], [None, None])
    plain = backbone(x)[0]
    own = current(backbone)
    use(backbone, {k: t + 0.5 for k, t in own.items()})
    assert not torch.equal(backbone(x)[0], plain)
    use(backbone, own)
    assert torch.equal(backbone(x)[0], plain)


# Section 9 of the design: what each list of recipes stores
@pytest.mark.parametrize(
    ("recipes", "train", "evaluation"),
    [
        (["stage1"], ["stage1"], ["stage1"]),
        (["calibrated"], ["calibrated"], ["calibrated", "stage1"]),
        (["branchwise"], ["balanced", "instance"], ["balanced", "mixture", "stage1"]),
        (["stage1", "branchwise"], ["balanced", "instance", "stage1"], ["balanced", "mixture", "stage1"]),
        (["branchwise", "reverse"], ["balanced", "instance", "reverse"], ["balanced", "mixture", "stage1"]),
    ],
)
def test_rows_of_a_recipe(recipes, train, evaluation):
    assert stored(recipes, "train") == train
    assert stored(recipes, "val") == evaluation
    assert stored(recipes, "test") == evaluation


def test_what_stage_two_reads_under_each_recipe():
    for name in ("stage1", "calibrated"):
        recipe = RECIPES[name]
        assert {recipe.receiver, recipe.evaluate, *map(recipe.read_under, DRAWN)} == {name}
    recipe = RECIPES["branchwise"]
    assert recipe.receiver == "balanced"
    assert [recipe.read_under(sampler) for sampler in DRAWN] == list(DRAWN)
    assert recipe.evaluate == "mixture"


def test_every_recipe_reads_only_what_it_or_the_extra_line_stores():
    for name, recipe in RECIPES.items():
        assert recipe.receiver in stored([name], "train")
        assert recipe.evaluate in stored([name], "test")
        for donor in DRAWN:
            assert recipe.read_under(donor) in stored([name, "reverse"] if donor == "reverse" else [name], "train")


def test_statistics_go_through_bytes_and_the_same_values_give_the_same_bytes():
    values = {"stage1": {"bn1.running_mean": torch.arange(3.0)}, "balanced": {"bn1.running_mean": torch.ones(3)}}
    data = to_bytes(values)
    assert data == to_bytes({k: dict(v) for k, v in values.items()})
    back = from_bytes(data)
    assert set(back) == set(values)
    assert torch.equal(back["stage1"]["bn1.running_mean"], torch.arange(3.0))
    with pytest.raises(UserError, match="keys must be <statistics>/<buffer>; got"):
        from safetensors.torch import save

        from_bytes(save({"mean": torch.ones(1)}))


def test_the_published_share():
    """Two passes a step with momentum 0.1, the instance batch last: 0.1 / (1 - 0.81) and 0.09 / (1 - 0.81)."""
    assert round(0.1 / (1 - 0.9**2), 3) == batchnorm.INSTANCE_SHARE

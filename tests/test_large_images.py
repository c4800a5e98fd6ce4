"""The list-file data sets from end to end on miniature copies, with the network of ImageNet-LT and a smaller one."""

import pytest
from image_builders import make_imagenet_lt, make_inaturalist18, make_places_lt
from pipeline_builders import evaluated, extracted, fitted, prepared
from safetensors.torch import save_file

from h2t.cache.reader import open_cache
from h2t.pipeline.base import plugins
from h2t.pipeline.base.run import Run
from h2t.pipeline.stages import train_backbone

pytestmark = pytest.mark.slow
SMALL = {"arch": "torchvision", "options": {"model": "resnet18"}}


def calm_weights(path, arch, options=()):
    """Fresh weights whose residual branches are small: a few steps are too few for the running statistics to settle."""
    module = plugins.load("backbones", arch)
    state = module.build(module.Options(**dict(options))).state_dict()
    save_file({k: 0.05 * v if k.endswith(("bn2.weight", "bn3.weight")) else v for k, v in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("dataset", "make", "backbone"),
    [
        ("imagenet_lt", make_imagenet_lt, {"arch": "resnet50"}),
        ("places_lt", lambda root: make_places_lt(root, "data_256"), SMALL),
        ("inaturalist18", make_inaturalist18, SMALL),
    ],
)
def test_from_images_to_metrics(dataset, make, backbone, tmp_path):
    section = {"dataset": dataset, "options": make(tmp_path / "images")}
    samples, images = prepared(section, tmp_path / "prepare")
    backbone = {**backbone, "start": str(calm_weights(tmp_path / "start.safetensors", **backbone))}
    training = train_backbone.Params(
        **backbone, epochs=1, batch_size=8, schedule="cosine", warmup_epochs=0, lr=0.001, mixup=0.2
    )
    trained = tmp_path / "backbone"
    train_backbone.run(training, Run("b", trained), samples, images)
    cache = tmp_path / "cache"
    extracted(cache, samples, images, trained, batch_size=4, batchnorm_passes=1, max_views=2)
    fitted(tmp_path / "heads", cache, trained, optimiser={"batch_size": 4})
    with open_cache(cache) as opened:
        assert opened.spec.maps == ((512 if backbone["arch"] == "torchvision" else 2048, 1, 1),)
    found = evaluated(tmp_path / "evaluate", cache, tmp_path / "heads", trained)
    assert 0 <= found["with_h2t"]["top1"] <= 100

import pytest
import torch
from pipeline_builders import make_stage1_head

from h2t.pipeline.networks.classifier import expert_logits, global_average, logits


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_linear_logits_by_hand(experts, scale):
    state = make_stage1_head(4, 5, experts).state
    features = torch.randn(experts, 2, 5)
    found = expert_logits("linear", state, features, scale)
    for e in range(experts):
        for b in range(2):
            for k in range(4):
                value = scale * (torch.dot(features[e, b], state["weight"][e, k]) + state["bias"][e, k])
                assert torch.isclose(found[e, b, k], value, rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits("linear", state, features, scale), found.mean(0))


@pytest.mark.parametrize("experts", [1, 3])
def test_cosine_logits_by_hand(experts):
    state = make_stage1_head(4, 5, experts).state
    features = torch.randn(experts, 2, 5)
    found = expert_logits("cosine", {"weight": state["weight"]}, features, 16.0)
    expected = torch.cosine_similarity(features[:, :, None], state["weight"][:, None], dim=-1) * 16
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(expert_logits("cosine", state, 7 * features, 16.0), found, atol=1e-5)


def test_cosine_of_a_zero_feature_is_zero_and_not_nan():
    state = {"weight": torch.ones(1, 3, 2)}
    assert torch.equal(logits("cosine", state, torch.zeros(1, 1, 2), 30.0), torch.zeros(1, 3))


def test_global_average_of_any_leading_axes():
    maps = torch.arange(24.0).reshape(1, 2, 3, 2, 2)
    assert torch.equal(global_average(maps), maps.flatten(-2).mean(-1))
    assert torch.equal(global_average(torch.ones(1, 4, 1, 1)), torch.ones(1, 4))

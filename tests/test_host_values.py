"""Hosts on one small example: values computed by independent code, rounded to six digits."""

import numpy as np
import pytest
import torch

from h2t.pipeline.base import plugins
from h2t.pipeline.heads.covariances import class_covariances
from h2t.pipeline.heads.host import Context, TrainingBatch
from h2t.pipeline.networks.trained import StageOneHead

COUNTS = torch.tensor([100, 10, 1])
WEIGHT = torch.tensor([[0.5, -0.25], [0.1, 0.3], [-0.4, 0.2]], dtype=torch.float64)
BIAS = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
FEATURES = torch.tensor([[1, 2], [0.5, 0.25]], dtype=torch.float64)
LABELS = torch.tensor([2, 0])
STATE = {"weight": WEIGHT[None], "bias": BIAS[None]}


def made(name, **loss):
    module = plugins.load("hosts", name)
    return module.Host(module.Loss(**loss), "linear", 1.0, Context(COUNTS, 2, 1))


@pytest.mark.parametrize(
    ("name", "loss", "expected"),
    [
        ("focal", {}, [[0.039382, 0.250617], [0.348418, 0.594984], [-0.387800, -0.845602]]),
        ("focal", {"detach": True}, [[0.031377, 0.139455], [0.180650, 0.315843], [-0.212028, -0.455298]]),
        (
            "influence_balanced",
            {},
            [[43.543864, 89.655199], [83.475354, 165.429054], [-127.019218, -255.084252]],
        ),
        (
            "influence_balanced",
            {"detach": True},
            [[75.290568, 157.330257], [148.053478, 292.106978], [-223.344047, -449.437235]],
        ),
    ],
)
def test_the_gradient_of_the_example(name, loss, expected):
    """Whether it flows through the weight of a sample does not show in the loss."""
    weight = STATE["weight"].clone().requires_grad_()
    found = made(name, **loss).loss({**STATE, "weight": weight}, FEATURES[None], LABELS, None)
    assert torch.autograd.grad(found, weight)[0][0].numpy() == pytest.approx(np.array(expected), abs=6e-7)


@pytest.mark.parametrize(("share", "expected"), [(0.3, [0.3, 0]), (0.7, [1, 0.7])])
def test_remix_gives_the_label_to_the_rarer_class(share, expected):
    found = made("remix").label_share(torch.tensor([share, share]).double(), torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx(expected)


def test_sigmoid_focal_is_finite_for_large_logits():
    """Published code computes the weight by exp(-z), which overflows in float32."""
    state = {"weight": STATE["weight"].float() * 1000, "bias": STATE["bias"].float()}
    found = made("focal", form="sigmoid").loss(state, FEATURES[None].float(), LABELS, None)
    logits = FEATURES @ (WEIGHT * 1000).T + BIAS
    own = torch.nn.functional.one_hot(LABELS, 3)
    wrong = torch.where(own > 0, 1 - logits.sigmoid(), logits.sigmoid())
    cross = torch.nn.functional.binary_cross_entropy_with_logits(logits, own.double(), reduction="none")
    assert found.item() == pytest.approx(float((cross * wrong**2).sum() / 2), rel=1e-5)


def test_the_shares_of_mixup_are_those_of_a_beta_distribution():
    host = made("manifold_mixup", alpha=0.4)
    drawn = [host.noise(np.random.default_rng(i), 5) for i in range(4000)]
    assert all(sorted(d[:, 0].tolist()) == list(range(5)) and len(set(d[:, 1].tolist())) == 1 for d in drawn)
    shares = np.array([float(d[0, 1]) for d in drawn])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)


def test_the_weights_that_httn_transfers():
    features = torch.tensor([[[1, 0.2], [0.3, 1], [0.6, 0.7]]], dtype=torch.float64)
    stage1 = StageOneHead(STATE, "linear", 1.0)
    state = made("httn", head_classes=2, ridge=1e-12).fit(features, torch.arange(3), stage1)
    assert state["weight"][0, 2].tolist() == pytest.approx([0.293317, 0.068674], abs=6e-7)
    assert torch.equal(state["weight"][0, :2], WEIGHT[:2])
    assert state["bias"][0].tolist() == pytest.approx([0.1, 0, 0.05])
    plain = made("httn", head_classes=2, ridge=1e-12, attention=False).fit(features, torch.arange(3), stage1)
    exact = torch.tensor([[0.520235, -0.051668], [-0.337865, 0.414569]], dtype=torch.float64)
    tail = torch.nn.functional.normalize(features[0, 2], dim=0)
    assert plain["weight"][0, 2].tolist() == pytest.approx((exact @ tail).tolist(), abs=2e-6)


@pytest.mark.parametrize(("kind", "expected"), [("full", 1.199331), ("diagonal", 1.201972)])
def test_isda_of_the_example(kind, expected):
    host = made("isda", covariance=kind)
    full = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    full[0, 0] = torch.tensor([[0.2, 0.05], [0.05, 0.1]])
    full[0, 2] = torch.tensor([[0.05, 0.02], [0.02, 0.08]])
    host.covariances = full if kind == "full" else full.diagonal(dim1=-2, dim2=-1)
    batch = TrainingBatch(FEATURES[None], LABELS, progress=1.0)
    assert host.batch_loss(STATE, batch).item() == pytest.approx(expected, abs=6e-7)
    assert host.batch_loss(STATE, batch._replace(progress=0.0)).item() == pytest.approx(1.190922, abs=6e-7)


def test_covariances_are_divided_by_the_count():
    features = torch.tensor([[[1, 2], [3, 0], [2, 2], [5, 5]]], dtype=torch.float64)
    found = class_covariances(features, [3, 1], full=True)[0]
    assert found[0].flatten().tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 8 / 9])
    assert not found[1:].any()
    diagonal = class_covariances(features, [3, 1], full=False)[0]
    assert torch.allclose(diagonal, found.diagonal(dim1=-2, dim2=-1))


def test_feature_transfer_moves_the_deviation_of_a_large_class():
    host = made("feature_transfer", regular_classes=1, share=1.0)
    q = torch.tensor([[0.8], [0.6]], dtype=torch.float64)
    host.projections = (q @ q.T)[None]
    host.centres = torch.tensor([[[1, 1], [0, 1], [0, 1]]], dtype=torch.float64)
    partners = torch.tensor([[[2, 3], [2, 3], [2, 3]]], dtype=torch.float64)
    receivers = torch.tensor([[[7, 7], [7, 7], [7, 7]]], dtype=torch.float64)
    labels, theirs = torch.tensor([1, 0, 2]), torch.tensor([0, 0, 1])
    batch = TrainingBatch(receivers, labels, torch.zeros(3), partners=partners, partner_labels=theirs)
    found = host.augment(batch)[0]
    assert found[0].tolist() == pytest.approx([1.6, 2.2])
    assert found[1:].tolist() == [[7, 7], [7, 7]]  # a large class keeps its samples, a rare partner gives nothing


def test_feature_transfer_keeps_the_directions_of_most_variance():
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(1, 111, 2, generator=draws).double() * torch.tensor([5.0, 0.1])
    labels = torch.arange(3).repeat_interleave(COUNTS)
    for energy, rank in ((0.95, 1), (1.0, 2), (0.0, 0)):
        host = made("feature_transfer", energy=energy)
        host.prepare(features, labels, StageOneHead(STATE, "linear", 1.0))
        assert torch.linalg.matrix_rank(host.projections[0], tol=1e-6) == rank
        if rank == 1:
            assert float(host.projections[0, 0, 0]) == pytest.approx(1, abs=1e-3)


def test_smote_moves_towards_a_neighbour():
    host = made("smote", neighbours=2)
    features = torch.tensor([[[9, 9]] * 100 + [[1, 2], [3, 0], [9, 0]] + [[0, 0]] * 7 + [[4, 4]]], dtype=torch.float64)
    host.prepare(features, torch.arange(3).repeat_interleave(COUNTS), StageOneHead(STATE, "linear", 1.0))
    assert host.neighbours[100].tolist()[0] == 104 or features[0, host.neighbours[100, 0]].tolist() == [0, 0]
    assert host.neighbours[110].tolist() == [-1, -1]
    host.neighbours[100] = torch.tensor([101, 102])
    noise = torch.tensor([[0.2, 0.1, 0.25], [0.05, 0.1, 0.25], [0.999, 0.5, 0.5], [0.2, 0.6, 0.5]], dtype=torch.float64)
    samples = torch.tensor([100, 100, 110, 100])
    labels = torch.tensor([1, 1, 2, 1])
    found = host.augment(TrainingBatch(features[:, samples], labels, noise, samples))[0]
    # Moved; an original, as 0.05 < 10 / 100; a class of one sample; the second neighbour.
    assert found.tolist() == [[1.5, 1.5], [1, 2], [4, 4], [5, 1]]


def test_smote_is_that_of_imbalanced_learn():
    """Its neighbours are ours, and each of its synthetic samples lies between a sample and one of our neighbours."""
    from imblearn.over_sampling import SMOTE

    counts = torch.tensor([40, 12, 7])
    draws = torch.Generator().manual_seed(3)
    features = torch.randn(1, 59, 3, generator=draws).double()
    labels = torch.arange(3).repeat_interleave(counts)
    module = plugins.load("hosts", "smote")
    host = module.Host(module.Loss(), "linear", 1.0, Context(counts, 3, 1))
    host.prepare(features, labels, StageOneHead(STATE, "linear", 1.0))
    x = features[0].numpy()
    made_there, their_labels = SMOTE(k_neighbors=5, random_state=0).fit_resample(x, labels.numpy())
    assert np.bincount(their_labels).tolist() == [40, 40, 40]
    for synthetic, label in zip(made_there[59:], their_labels[59:], strict=True):
        pairs = [(i, j) for i in np.flatnonzero(labels.numpy() == label) for j in host.neighbours[i].tolist()]
        between = [
            abs(np.linalg.norm(synthetic - x[i]) + np.linalg.norm(synthetic - x[j]) - np.linalg.norm(x[i] - x[j]))
            for i, j in pairs
        ]
        assert min(between) < 1e-9


def test_oltr_of_the_example():
    """The part without the centroids' own term."""
    selector = torch.tensor([[0.2, -0.1], [0.3, 0.4]], dtype=torch.float64)
    state = {
        "weight": STATE["weight"],
        "memory_weight": STATE["weight"],
        "memory_bias": STATE["bias"],
        "centroids": torch.tensor([[[1, 0], [0, 1], [1, 1]]], dtype=torch.float64),
        "select_weight": selector[None],
        "select_bias": torch.zeros(1, 2, dtype=torch.float64),
    }
    host = made("oltr", centroid_weight=0.0)
    assert host.loss(state, FEATURES[None], LABELS, None).item() == pytest.approx(9.540138, abs=6e-7)
    at_centroid = {**state, "centroids": state["centroids"].clone().requires_grad_()}
    found = made("oltr").loss(at_centroid, torch.tensor([[[1.0, 0.0]]]).double(), LABELS[:1], None)
    assert torch.autograd.grad(found, at_centroid["centroids"])[0].isfinite().all()


def test_m2m_of_the_example():
    host = made("m2m", steps=1, step=0.1)
    host.prepare(FEATURES[None], LABELS, StageOneHead(STATE, "linear", 1.0))
    host.length = torch.tensor(1.0)
    moved = host.translated(STATE, FEATURES[None, 1:], torch.tensor([0]), torch.tensor([2]))
    assert moved[0, 0].tolist() == pytest.approx([0.405501, 0.282710], abs=6e-7)
    assert host._first(moved).softmax(-1)[0, 2].item() == pytest.approx(0.253705, abs=6e-7)
    # A sample of class 2 and one of class 0, its seed, which stays with probability 0.094302.
    for confidence, keep, changes in ((0.25, 0.0943, True), (0.25, 0.0944, False), (0.26, 0.0943, False)):
        host = made("m2m", steps=1, step=0.1, confidence=confidence)
        host.prepare(FEATURES[None], LABELS, StageOneHead(STATE, "linear", 1.0))
        host.length = torch.tensor(1.0)
        noise = torch.tensor([[0.5, 0.5, keep], [0.5, 0.5, 0.0]], dtype=torch.float64)
        found = host.loss(STATE, FEATURES[None], LABELS, noise).item()
        x = torch.cat([moved[0] if changes else FEATURES[:1], FEATURES[1:]])
        expected = torch.nn.functional.cross_entropy(x @ WEIGHT.T + BIAS, LABELS).item()
        assert found == pytest.approx(expected, abs=1e-12)


def test_the_split_by_class_activation():
    """Two classes that are not rare and a rare one, of one channel whose activation is the map itself."""
    module = plugins.load("hosts", "cam_split")
    host = module.Host(module.Loss(regular_classes=2, share=1.0), "linear", 1.0, Context(COUNTS, 1, 1, pixels=4))
    host.weight = torch.ones(1, 3, 1, dtype=torch.float64)
    host.resembles = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 0]]).bool()
    mine, other = torch.tensor([[10.0, 9], [2, 0]]).double(), torch.tensor([[5.0, 6], [7, 25]]).double()
    maps, partners = torch.stack([mine, mine])[None, :, None], torch.stack([other + 1, other])[None, :, None]
    noise = torch.tensor([[0, 0.5, 0.5, 0, 1, 0, 1], [0, 0.5, 0.5, 0, 1, 0, 1]], dtype=torch.float64)
    labels, theirs = torch.tensor([2, 1]), torch.tensor([0, 1])
    batch = TrainingBatch(maps, labels, noise, partners=partners, partner_labels=theirs)
    found = host.augment(batch)[0, :, 0]
    # Pixels by turns the receiver's where specific (10 is), and the partner's where common (6 is, 25 is not).
    assert found[0].tolist() == [[10, 6], [0, 0]]
    assert torch.equal(found[1], mine)  # not rare
    alone = host.augment(batch._replace(partner_labels=torch.tensor([0, 0])))
    assert torch.equal(alone, maps)  # no partner of a class that resembles it
    flat = host.augment(batch._replace(features=torch.ones_like(maps), partners=torch.zeros_like(maps)))
    assert flat.isfinite().all()


def test_partners_of_the_split_are_of_the_classes_that_look_most_like_the_rare_one():
    module = plugins.load("hosts", "cam_split")
    counts = torch.tensor([3, 2, 2, 1])
    host = module.Host(module.Loss(confusing=1), "linear", 1.0, Context(counts, 4, 1))
    of_class = torch.tensor([[9, 0, 0, 1], [0, 9, 0, 5], [4, 0, 9, 0], [0, 2, 3, 9]])
    said = of_class.repeat_interleave(counts, dim=0)
    state = {"weight": torch.eye(4)[None], "bias": torch.zeros(1, 4)}
    host.prepare(said[None].float(), torch.arange(4).repeat_interleave(counts), StageOneHead(state, "linear", 1.0))
    assert host.resembles.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]]

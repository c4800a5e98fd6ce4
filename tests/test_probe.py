"""Heads that are fitted to a cache, and what classifiers of stage II start from."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden_cases import FIRST
from pipeline_builders import CPU, accepted, make_stage2_cache, refused, write_params
from printed import ROOT, blocks
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from test_importing import make_features, save_npz
from torch.nn import functional as F

from h2t.cache.reader import open_cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.heads import start
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.networks import probe
from h2t.pipeline.networks.frozen import FrozenPart, Layer
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.trained import load_head
from h2t.pipeline.training.loop import StageOne

COUNTS = (120, 40, 14, 5)


def make_blobs(channels=12, seed=0):
    """Features after a ReLU of classes that overlap, of a size far from 1: (N, D) and labels (N,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(COUNTS)), COUNTS)
    centres = rng.standard_normal((len(COUNTS), channels))
    values = np.maximum(0, centres[labels] + 1.5 * rng.standard_normal((len(labels), channels)) + 1)
    return torch.from_numpy(0.02 * values).float(), torch.from_numpy(labels)


def penalised(state, x, y, l2):
    logits = x.double() @ state["weight"][0].double().T + state["bias"][0].double()
    return float(F.cross_entropy(logits, y) + l2 / 2 * state["weight"].double().square().sum())


# --- the solver


@pytest.mark.parametrize("l2", [1e-6, 1e-3])
def test_the_linear_probe_is_scikit_learns_optimum(l2):
    from sklearn.linear_model import LogisticRegression

    x, y = make_blobs()
    given = x.clone()
    state = probe.fit(x, y, len(COUNTS), Probe(l2=l2), "linear")
    assert torch.equal(x, given)
    peer = LogisticRegression(C=1 / (l2 * len(y)), tol=1e-10, max_iter=20_000).fit(x.double().numpy(), y.numpy())
    best = {"weight": torch.from_numpy(peer.coef_)[None], "bias": torch.from_numpy(peer.intercept_)[None]}
    assert penalised(state, x, y, l2) <= penalised(best, x, y, l2) * (1 + 1e-5)
    ours = (x @ state["weight"][0].T + state["bias"][0]).softmax(1)
    assert torch.allclose(ours.double(), torch.from_numpy(peer.predict_proba(x.double().numpy())), atol=2e-3)


def test_the_cosine_probe_lies_where_the_loss_is_flat():
    x, y = make_blobs()
    weight = probe.fit(x, y, len(COUNTS), Probe(scale=10.0), "cosine")["weight"][0].double().requires_grad_()
    assert torch.allclose(weight.norm(dim=1), torch.ones(len(COUNTS)).double(), atol=1e-6)

    def loss(w):
        return F.cross_entropy(10 * F.normalize(x.double(), dim=1) @ F.normalize(w, dim=1).T, y)

    (slope,) = torch.autograd.grad(loss(weight), weight)
    means = torch.stack([x[y == j].mean(0) for j in range(len(COUNTS))]).double()
    assert slope.abs().max() < 1e-4
    assert loss(weight).item() < 0.9 * loss(means).item()


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_probe_fitted_again_has_the_same_bits(classifier):
    x, y = make_blobs(channels=64)
    first, second = (probe.fit(x, y, len(COUNTS), Probe(), classifier) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_a_probe_that_stops_before_its_minimum_says_so(classifier):
    x, y = make_blobs(channels=64)
    for iterations, lines in ((2, 1), (1000, 0)):
        said = []
        probe.fit(x, y, len(COUNTS), Probe(iterations=iterations), classifier, said.append)
        assert len(said) == lines
        assert all("stopped after 2 iterations" in line for line in said)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_features_that_are_all_zero_give_finite_weights(classifier):
    state = probe.fit(torch.zeros(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), 2, Probe(), classifier)
    assert all(t.isfinite().all() for t in state.values())


# --- on a cache


def make_cache(folder, **overrides):
    return make_stage2_cache(folder / "c", counts=(9, 6, 3), train=("stage1", "balanced", "instance"), **overrides)


def test_a_probe_is_of_pooled_features_behind_the_frozen_part(tmp_path):
    frozen = FrozenPart((Layer("layer_norm", torch.rand(6) + 0.5, torch.rand(6), 1e-6),))
    with open_cache(make_cache(tmp_path)) as cache:
        found = start.fit_probe(cache, Probe(l2=0.1), "linear", CPU, frozen)
        chosen = sample_rows(cache.rows, "train", "stage1")
        features = frozen(torch.from_numpy(cache.read(chosen.first)).float().mean((2, 3)))
        expected = probe.fit(features, torch.from_numpy(chosen.labels), 3, Probe(l2=0.1), "linear")
    assert found.frozen is frozen
    assert torch.allclose(found.state["weight"], expected["weight"], atol=1e-5)


def test_several_experts_and_a_cache_without_such_rows_have_no_probe(tmp_path):
    make_stage2_cache(tmp_path / "two" / "c", experts=2)
    with open_cache(tmp_path / "two" / "c") as cache, pytest.raises(UserError, match="for backbones of one expert"):
        start.fit_probe(cache, Probe(), "linear", CPU, None)
    make_stage2_cache(tmp_path / "branchwise" / "c")
    with open_cache(tmp_path / "branchwise" / "c") as cache, pytest.raises(UserError, match="add the recipe"):
        start.fit_probe(cache, Probe(), "linear", CPU, None)


def test_a_row_that_is_not_finite_is_named(tmp_path):
    def spoil(maps, rows):
        where = (np.array(rows["split"]) == "train") & (np.array(rows["statistics"]) == "stage1")
        maps[0][np.flatnonzero(where)[4]] = np.nan

    with open_cache(make_cache(tmp_path, change=spoil)) as cache, pytest.raises(UserError, match=r"row \d+ \(.*NaN"):
        start.fit_probe(cache, Probe(), "linear", CPU, None)


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "available_memory", lambda: 100)
    with open_cache(make_cache(tmp_path)) as cache, pytest.raises(UserError, match="raise the memory limit"):
        start.fit_probe(cache, Probe(), "linear", CPU, None)


# --- the commands, on a backbone of the digits that is two layers


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A project whose backbone has a probe, as far as its cache."""
    folder = tmp_path_factory.mktemp("extracted") / "p"
    shutil.copytree(FIRST, folder)
    with contextlib.chdir(folder):
        _extract()
    return folder


@pytest.fixture
def project(extracted, tmp_path, monkeypatch):
    """A copy of it; the working directory."""
    shutil.copytree(extracted, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def _extract():
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["backbones"]["few"]["head"] = "probe"
    training = {"optimiser": {"epochs": 1, "batch_size": 64}, "grid": {"ratio": [0.0, 0.3], "seed": [0]}}
    values["host_defaults"] = {"backbone": "few", "batchnorm": "stage1", **training}
    values["hosts"] = {
        "dr": {"host": "dr"},
        "gcl": {"host": "gcl", "classifier": "cosine"},
        "lift": {"host": "lift", "classifier": "cosine"},
        "tau_norm": {"host": "tau_norm"},
    }
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    shutil.rmtree("data/train_classifier")
    accepted("train-backbone", "few", "data/prepare", "data/train_backbone/few")
    accepted("extract", "few", "data/prepare", "data/train_backbone/few", "data/extract/few", "--replace")


def train(name, out="out", backbone="data/train_backbone/few", *more):
    return accepted("train-classifier", name, "data/extract/few", backbone, out, *more)


def test_a_saved_probe_a_fitted_one_and_its_folder_give_the_same_classifiers(project):
    assert "fitting the linear probe" in train("dr", "fitted")
    accepted("probe", "few", "data/extract/few", "data/probe/few")
    assert "fitting" not in train("dr", "saved")
    assert "fitting" not in train("dr", "folder", "data/probe/few")
    contents = {Path(name, "heads.safetensors").read_bytes() for name in ("fitted", "saved", "folder")}
    assert len(contents) == 1
    assert set(load_file("data/probe/few/head.safetensors")) == {"weight", "bias"}
    assert load_file("data/probe/few/head.safetensors")["weight"].shape == (1, 10, 8)
    # Other settings: the saved probe is not taken.
    accepted("train-backbone", "few", "data/prepare", "data/train_backbone/few", "--set", "backbones.few.probe.l2=1.0")
    assert "fitting" in train("dr", "other", "data/train_backbone/few", "--set", "backbones.few.probe.l2=1.0")
    assert Path("other/heads.safetensors").read_bytes() not in contents


def test_other_settings_of_the_probe_do_not_train_the_backbone_again(project, monkeypatch):
    trained = Path("data/train_backbone/few/backbone.safetensors").read_bytes()
    epochs = []
    whole = StageOne._epoch
    monkeypatch.setattr(StageOne, "_epoch", lambda self, epoch: (epochs.append(epoch), whole(self, epoch))[1])

    def again(*more) -> str:
        shutil.rmtree("data/train_backbone/few")  # as DVC does before it runs a stage
        settings = [word for text in more for word in ("--set", text)]
        return accepted("train-backbone", "few", "data/prepare", "data/train_backbone/few", *settings)

    assert "was trained with these settings before" in again("backbones.few.probe.l2=0.5")
    assert Path("data/train_backbone/few/backbone.safetensors").read_bytes() == trained
    assert load_head(Path("data/train_backbone/few")).about["probe"]["l2"] == 0.5
    assert epochs == []
    plugin = Path("plugins/backbones/few.py")
    plugin.write_text(plugin.read_text(encoding="utf-8") + "\n# another network, for all one knows\n")
    assert "starts anew" in again()
    assert len(epochs) == 2
    again("backbones.few.lr=0.05")
    assert len(epochs) == 4
    again("backbones.few.lr=0.05", "backbones.few.head=trained")
    assert len(epochs) == 4
    assert not Path("data/train_backbone/.few.training").exists()


def test_the_probe_is_the_stage1_line(project):
    train("dr")
    accepted("evaluate", "dr", "data/extract/few", "out", "data/train_backbone/few", "result")
    with open_cache("data/extract/few") as cache:
        head = start.fit_probe(cache, Probe(), "linear", CPU, None)
        rows = sample_rows(cache.rows, "test", "stage1")
        features = torch.from_numpy(cache.read(rows.first)).float().mean((2, 3))
    guesses = (features @ head.state["weight"][0].T + head.state["bias"][0]).argmax(1).numpy()
    found = json.loads(Path("result/metrics.json").read_text(encoding="utf-8"))["stage1"]["top1"]
    assert found == pytest.approx(100 * (guesses == rows.labels).mean())


def test_cosine_hosts_start_from_the_cosine_probe_and_others_from_the_linear_one(project):
    accepted("probe", "few", "data/extract/few", "data/probe/few")
    weights = {name: load_file(f"data/probe/few/{name}.safetensors")["weight"] for name in ("head", "cosine")}
    assert torch.allclose(weights["cosine"].norm(dim=-1), torch.ones(1, 10), atol=1e-5)
    still = ("--set", "host_defaults.optimiser.lr=1e-20", "--set", "host_defaults.optimiser.weight_decay=0.0")
    for name, weight in (("dr", weights["head"]), ("gcl", weights["cosine"])):
        train(name, name, "data/train_backbone/few", *still)
        assert torch.equal(load_file(f"{name}/heads.safetensors")["weight"][0], weight)
    about = json.loads(pq_about("gcl"))
    assert about["scale"] == 25.0


def pq_about(folder):
    import pyarrow.parquet as pq

    return pq.read_schema(Path(folder) / "heads.parquet").metadata[b"h2t"]


def test_lift_starts_from_class_means_of_length_1(project):
    train("lift", "out", "data/train_backbone/few", "--set", "host_defaults.optimiser.lr=1e-20")
    found = load_file("out/heads.safetensors")["weight"][0, 0].double()
    with open_cache("data/extract/few") as cache:
        rows = sample_rows(cache.rows, "train", "stage1")
        features = torch.from_numpy(cache.read(rows.first)).double().mean((2, 3))
    for label in range(10):
        mean = sum(f for f, y in zip(features, rows.labels, strict=True) if y == label)
        assert torch.allclose(found[label], mean / mean.norm(), atol=1e-6)
    assert json.loads(pq_about("out"))["scale"] == 25.0


def test_a_linear_host_started_from_means_predicts_the_nearest_mean(project):
    train("tau_norm", "out", "data/train_backbone/few", "--set", "hosts.tau_norm.start=means")
    with open_cache("data/extract/few") as cache:
        rows = sample_rows(cache.rows, "train", "stage1")
        x = torch.from_numpy(cache.read(rows.first)).double().mean((2, 3))
    means = torch.stack([x[torch.from_numpy(rows.labels) == j].mean(0) for j in range(10)])
    state = {k: t[0, 0].double() for k, t in load_file("out/heads.safetensors").items()}
    assert torch.allclose(F.normalize(state["weight"], dim=1), F.normalize(means, dim=1), atol=1e-5)


def test_a_backbone_without_a_head_serves_the_hosts_that_need_none(project):
    none = ("--set", "backbones.few.head=none")
    accepted("train-backbone", "few", "data/prepare", "data/train_backbone/few", *none)
    assert load_file("data/train_backbone/few/head.safetensors") == {}
    command = ("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "out")
    assert "this backbone has none" in refused(*command, *none, leaves=Path("out"))
    train("lift", "out", "data/train_backbone/few", *none)
    accepted("evaluate", "lift", "data/extract/few", "out", "data/train_backbone/few", "result", *none)
    assert json.loads(Path("result/metrics.json").read_text(encoding="utf-8"))["stage1"] is None


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "hosts.dr={host: ride}",
            "host ride starts from the classifier that its own stage I trained; got backbones.few",
        ),
        ("hosts.dr={host: reslt, pool: moments}", "host reslt starts from the classifier that its own stage I trained"),
        ("hosts.dr={host: crt, start: means}", "hosts.dr.start: host crt has a start of its own; got means"),
        ("hosts.dr.start_sha256=ab", "hosts.dr.start_sha256: needs a file in start; got None"),
        ("extract.batchnorm=[branchwise]", "backbones.few.head: a probe is fitted to training rows under stage1"),
        ("backbones.few.head=own", "must be 'trained', 'probe' or 'none'"),
    ],
)
def test_what_does_not_fit_is_one_line(project, setting, says):
    found = refused("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "out", "--set", setting)
    assert says in found
    assert len(found.splitlines()) == 1


def test_a_probe_of_another_cache_and_a_head_of_another_kind_are_refused(project):
    accepted("probe", "few", "data/extract/few", "data/probe/few", "--set", "extract.max_views=1")
    more = ("--set", "extract.max_views=1")
    accepted("extract", "few", "data/prepare", "data/train_backbone/few", "data/other/few", *more)
    command = ("train-classifier", "dr", "data/other/few", "data/probe/few", "out")
    assert "must be a probe of this cache" in refused(*command, leaves=Path("out"))
    trained = ("--set", "backbones.few.head=trained", "--set", "hosts.dr.start=probe")
    command = ("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "out")
    assert "backbones.few has head: trained; set backbones.few.head: probe" in refused(*command, *trained)
    assert "must be a backbone with head trained" in refused(*command, "--set", "backbones.few.head=trained")


def test_weights_of_other_classes_need_no_head(project):
    state = load_file("data/train_backbone/few/backbone.safetensors")
    network = {**state, "fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    torch.save(network, "imagenet.pth")
    given = ("--set", "backbones.few.weights=imagenet.pth")
    accepted("train-backbone", "few", "data/prepare", "pretrained", *given)
    found = load_file("pretrained/backbone.safetensors")
    assert all(torch.equal(t, state[k]) for k, t in found.items() if not k.endswith("num_batches_tracked"))


def test_a_frozen_backbone_with_a_probe_trains_nothing(project):
    said = accepted("train-backbone", "few", "data/prepare", "frozen", "--set", "backbones.few.frozen=true")
    assert "nothing is trained" in said


def test_a_backbone_with_a_trained_head_gets_a_note_in_place_of_a_probe(project):
    said = accepted("probe", "few", "data/extract/few", "out", "--set", "backbones.few.head=trained")
    assert "no probe is fitted" in said
    assert [p.name for p in Path("out").iterdir()] == ["probe.json"]


def test_of_dvcs_stages_the_probe_comes_first_and_none_depends_on_it():
    """So a full run fits it once, and with a trained head nothing runs again because of it."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    assert list(stages).index("probe") < list(stages).index("train_classifier")
    assert not [d for stage in stages.values() for d in stage.get("do", stage)["deps"] if d.startswith("data/probe")]


# --- imported features


def test_imported_features_get_a_probe_by_the_commands_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(Path("params.yaml"))
    save_npz("train.npz", *make_features((20, 12, 6)))
    save_npz("test.npz", *make_features((5, 5, 5), seed=1))
    (block,) = blocks("docs/frozen-backbones.md")
    for line in block.splitlines():
        accepted(*shlex.split(line)[1:])
    metrics = json.loads(Path("result/metrics.json").read_text(encoding="utf-8"))
    assert metrics["stage1"]["top1"] > 90
    assert metrics["with_h2t"]["top1"] > 90
    host = ("--set", "hosts={dr: {backbone: ce_mixup, batchnorm: stage1}}")
    assert "this backbone has none" in refused("train-classifier", "dr", "features", "none", "x", *host)


# --- a file of vectors


NAMES = ["ant", "bee", "cat"]
VECTORS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7 + 1


def write_vectors(path, names=NAMES, vectors=VECTORS):
    if path.suffix == ".npy":
        np.save(path, vectors)
        path.with_suffix(".txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    else:
        save_arrays(dict(zip(names, vectors, strict=True)), path)


def digest_of(path):
    with pytest.raises(UserError, match="_sha256: must be the digest") as wrong:
        start.from_file(path, None, "start", NAMES, 4, "linear")
    return str(wrong.value).split(", ")[1].split(";")[0]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_vectors_are_matched_by_class_name(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    write_vectors(path, NAMES[::-1], VECTORS[::-1].copy())
    linear = start.from_file(path, digest_of(path), "start", NAMES, 4, "linear").state
    assert torch.equal(linear["weight"], torch.from_numpy(VECTORS)[None])
    assert not linear["bias"].any()
    cosine = start.from_file(path, digest_of(path), "start", NAMES, 4, "cosine").state
    assert torch.equal(cosine["weight"][0], F.normalize(torch.from_numpy(VECTORS), dim=1))


BAD = VECTORS.copy()
BAD[1, 2] = np.nan


@pytest.mark.parametrize(
    ("names", "vectors", "says"),
    [
        (["ant", "bee", "dog"], VECTORS, "has no vector for class 'cat'"),
        ([*NAMES, "dog"], np.vstack([VECTORS, VECTORS[:1]]), "'dog', which is no class of the cache"),
        (NAMES, VECTORS[:, :3].copy(), "must have 4 finite numbers for class 'ant'"),
        (NAMES, VECTORS.astype(np.int64), "must have 4 finite numbers for class 'ant'"),
        (NAMES, BAD, "for class 'bee'"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_vectors_that_do_not_fit_are_one_line(tmp_path, suffix, names, vectors, says):
    path = tmp_path / f"text{suffix}"
    write_vectors(path, names, vectors)
    with pytest.raises(UserError, match="start") as wrong:
        start.from_file(path, digest_of(path), "start", NAMES, 4, "linear")
    assert says in str(wrong.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npy", b"\x93NUMPY", "is not an .npy file of numbers"),
        ("x.safetensors", b"\x08\0\0\0\0\0\0\0not json", "is not a safetensors file"),
        ("x.pt", b"x", "must be probe, means, or a .safetensors or .npy file"),
    ],
)
def test_a_file_that_is_none_is_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "x.txt").write_text("ant")
    with pytest.raises(UserError, match="start") as wrong:
        start.from_file(tmp_path / name, digest_of(tmp_path / name), "start", NAMES, 4, "linear")
    assert says in str(wrong.value)


def test_a_missing_file_is_one_line(tmp_path):
    for name in ("x.npy", "x.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            start.from_file(tmp_path / name, "ab", "start", NAMES, 4, "linear")


def test_a_host_starts_from_a_file_and_notices_another(project):
    names = json.loads(Path("data/prepare/classes.json").read_text(encoding="utf-8"))
    names = names["classes"] if isinstance(names, dict) else names
    names = [entry["name"] if isinstance(entry, dict) else entry for entry in names]
    vectors = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)
    write_vectors(Path("text.safetensors"), names, vectors)
    command = ("train-classifier", "lift", "data/extract/few", "data/train_backbone/few", "out")
    given = ("--set", "hosts.lift.start=text.safetensors", "--set", "host_defaults.optimiser.lr=1e-20")
    line = refused(*command, *given)
    digest = line.split("text.safetensors, ")[1].split(";")[0]
    accepted(*command, *given, "--set", f"hosts.lift.start_sha256='{digest}'")
    found = load_file("out/heads.safetensors")["weight"][0, 0]
    assert torch.allclose(found, F.normalize(torch.from_numpy(vectors), dim=1), atol=1e-6)
    write_vectors(Path("text.safetensors"), names, vectors + 1)
    assert "must be the digest" in refused(*command, *given, "--set", f"hosts.lift.start_sha256='{digest}'")

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipeline_builders import invoke, write_params
from safetensors.numpy import save_file

from h2t.cache.reader import open_cache
from h2t.cache.tools.audit import verify
from h2t.pipeline.sharing import importing


def make_features(counts=(3, 12, 6), shape=(5,), seed=0, dtype=np.float32):
    """Features of well-separated classes and their labels, in no order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    centres = np.random.default_rng(9).standard_normal((len(counts), *shape)) * 4
    return (centres[labels] + rng.standard_normal((len(labels), *shape))).astype(dtype), labels


def save_npz(path, x, y):
    np.savez(path, features=x, labels=y)


def save_safetensors(path, x, y):
    save_file({"embeddings": x, "y": y}, path)


def save_parquet(path, x, y):
    pq.write_table(pa.table({"embedding": list(x), "label": y}), path)


def save_fixed_parquet(path, x, y):
    values = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    pq.write_table(pa.table({"embedding": values, "label": [f"class {v}" for v in y]}), path)


WRITERS = [
    (save_npz, "x.npz"),
    (save_safetensors, "x.safetensors"),
    (save_parquet, "x.parquet"),
    (save_fixed_parquet, "x.parquet"),
]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_every_format_gives_the_rows_that_were_given(tmp_path, write, name):
    x, y = make_features()
    write(tmp_path / name, x, y)
    done = invoke("cache", "import", tmp_path / "c", "--train", tmp_path / name)
    assert done.exit_code == 0, done.output
    assert verify(tmp_path / "c") == []
    with open_cache(tmp_path / "c") as cache:
        assert cache.spec.maps == ((5, 1, 1),)
        assert cache.spec.dtype == "float32"
        assert cache.spec.provenance["counts"] == [12, 6, 3]
        names = cache.spec.provenance["classes"]
        assert [n.removeprefix("class ") for n in names] == ["1", "2", "0"]
        found = cache.read(np.arange(cache.spec.rows))[:, :, 0, 0]
        samples = cache.rows["sample"].to_numpy()
        np.testing.assert_array_equal(found, x[samples])
        given = [names[k].removeprefix("class ") for k in cache.rows["label"].to_pylist()]
        assert given == [str(v) for v in y[samples]]


def test_npy_with_labels_beside_and_class_names(tmp_path):
    x, y = make_features(shape=(4, 2, 2), dtype=np.float16)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    (tmp_path / "names.txt").write_text("cat\ndog\nowl\n")
    done = invoke(
        "cache", "import", tmp_path / "c", "--train", tmp_path / "x.npy", "--train-labels", tmp_path / "y.npy",
        "--classes", tmp_path / "names.txt",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with open_cache(tmp_path / "c") as cache:
        assert (cache.spec.maps, cache.spec.dtype) == (((4, 2, 2),), "float16")
        assert cache.spec.provenance["classes"] == ["dog", "owl", "cat"]


def imported(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        save_npz(tmp_path / f"{split}.npz", *make_features(seed=seed))
    out = tmp_path / "features"
    done = invoke("cache", "import", out, "--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz")
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("host", ["crt", "ncm", "logistic_regression"])
def test_hosts_without_a_warm_start_train_on_imported_features(tmp_path, host):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml")
    entry = f"hosts.{host}={{backbone: ce_mixup, batchnorm: stage1}}"
    common = ["--params", params, "--set", entry, "--device", "cpu"]
    done = invoke("train-classifier", host, cache, "none", tmp_path / "heads", *common)
    assert done.exit_code == 0, done.output
    done = invoke("evaluate", host, cache, tmp_path / "heads", "none", tmp_path / "evaluate", *common)
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    assert metrics["stage1"] is None
    assert metrics["without_h2t"]["top1"] > 60


def test_hosts_with_a_warm_start_say_so(tmp_path):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml", hosts__dr__batchnorm="stage1")
    done = invoke("train-classifier", "dr", cache, "none", tmp_path / "heads", "--params", params, "--device", "cpu")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert "this backbone has none, like features that were imported" in line


def test_a_backbone_for_imported_features_is_refused(tmp_path, backbone_dir):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml", hosts__dr__batchnorm="stage1")
    done = invoke("train-classifier", "dr", cache, backbone_dir, tmp_path / "heads", "--params", params)
    assert done.exit_code == 1
    assert "give none as the backbone" in done.stderr


def test_importing_again_does_nothing_and_other_features_are_refused(tmp_path):
    cache = imported(tmp_path)
    before = (cache / "cache.json").read_bytes()
    imported(tmp_path)
    save_npz(tmp_path / "other.npz", *make_features(seed=5))
    done = invoke("cache", "import", cache, "--train", tmp_path / "other.npz")
    assert done.exit_code == 1
    assert "holds another cache" in done.stderr
    assert (cache / "cache.json").read_bytes() == before
    assert invoke("cache", "import", cache, "--train", tmp_path / "other.npz", "--replace").exit_code == 0
    assert (cache / "cache.json").read_bytes() != before


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def cut(path):
    np.save(path, np.zeros((9, 4), np.float32))
    path.write_bytes(path.read_bytes()[:-10])


def garbage(path):
    path.write_bytes(b"PAR1" + b"\xff" * 64)


def features(x, y=None):
    """Writes an .npz file of features and, unless None, labels."""
    labels = {} if y is None else {"labels": np.asarray(y)}
    return lambda path: np.savez(path, features=np.asarray(x), **labels)


THREE = np.zeros((3, 2), np.float32)
OBJECTS = np.array([Evil()], dtype=object)
HOSTILE = {
    "pickled": (lambda path: np.save(path, OBJECTS, allow_pickle=True), "x.npy", "Python objects"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "x.npy", "cannot be read"),
    "pickled in npz": (features(OBJECTS, [0]), "x.npz", "allow_pickle"),
    "cut": (cut, "x.npy", "cannot be read"),
    "no npz": (garbage, "x.npz", "cannot be read"),
    "no safetensors": (garbage, "x.safetensors", "cannot be read"),
    "no parquet": (garbage, "x.parquet", "cannot be read"),
    "another name": (garbage, "x.pkl", "must be one of .npy"),
    "ragged": (
        lambda path: pq.write_table(pa.table({"embedding": [[1.0], [1.0, 2.0]], "label": [0, 1]}), path),
        "x.parquet",
        "different lengths",
    ),
    "nan": (features([[1.0, 2.0], [1.0, np.nan]], [0, 1]), "x.npz", "row 1 (x.npz/000000001) holds NaN"),
    "infinity": (features([[1.0, -np.inf]], [0]), "x.npz", "holds NaN, infinity"),
    "too large": (features(np.full((3, 2), 1e300), [0, 0, 0]), "x.npz", "beyond float32"),
    "complex": (features([[1j]], [0]), "x.npz", "must be numbers"),
    "text": (features([["1"]], [0]), "x.npz", "must be numbers"),
    "no rows": (features(THREE[:0], np.zeros(0, int)), "x.npz", "got float32 (0, 2)"),
    "cube": (features(THREE[:, :, None], [0, 0, 0]), "x.npz", "(n, C) or (n, C, H, W)"),
    "no labels": (features(THREE), "x.npz", "no labels"),
    "few labels": (features(THREE, [0, 0]), "x.npz", "one label for each of 3 rows"),
    "labels of two axes": (features(THREE, [[0], [1], [1]]), "x.npz", "one label for each"),
    "fractions": (features(THREE, [0, 0.5, 1]), "x.npz", "whole numbers or texts"),
    "nan label": (features(THREE, [0, np.nan, 1]), "x.npz", "whole numbers or texts"),
}


@pytest.mark.parametrize(("write", "name", "says"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_input_is_one_line_and_leaves_nothing(tmp_path, capfd, write, name, says):
    write(tmp_path / name)
    np.save(tmp_path / "y.npy", np.zeros(9, int))
    beside = ["--train-labels", tmp_path / "y.npy"] if name.endswith(("npy", "pkl", "safetensors")) else []
    done = invoke("cache", "import", tmp_path / "c", "--train", tmp_path / name, *beside)
    assert done.exit_code == 1, done.output
    (line,) = done.stderr.splitlines()
    assert says in line
    assert "code ran" not in done.output + capfd.readouterr().out
    assert not (tmp_path / "c").exists()


def test_an_archive_that_claims_too_much_is_refused_unread(tmp_path, monkeypatch):
    from h2t.pipeline.sharing import importing

    save_npz(tmp_path / "x.npz", *make_features())
    monkeypatch.setattr(importing, "available_memory", lambda: 100)
    done = invoke("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npz")
    assert done.exit_code == 1
    assert "GB of memory" in done.stderr


def test_labels_without_training_rows_are_refused(tmp_path):
    save_npz(tmp_path / "train.npz", *make_features((3, 4)))
    save_npz(tmp_path / "test.npz", *make_features((3, 4, 5)))
    done = invoke("cache", "import", tmp_path / "c", "--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz")
    assert done.exit_code == 1
    assert "label 2 occurs in no training row" in done.stderr


def test_features_that_change_while_they_are_imported_are_refused(tmp_path, monkeypatch):
    """An .npy file is read in place, first for its digests and again for its values."""
    x, y = make_features()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    writer = importing.CacheWriter

    def late(*given):
        np.save(tmp_path / "x.npy", x + 1)
        return writer(*given)

    command = ["cache", "import", tmp_path / "c", "--train", tmp_path / "x.npy", "--train-labels", tmp_path / "y.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(importing, "CacheWriter", late)
        done = invoke(*command)
    assert done.exit_code == 1
    assert "changed while it was imported; import again once the file is finished" in done.stderr
    assert not (tmp_path / "c").exists()
    assert invoke(*command).exit_code == 0
    assert verify(tmp_path / "c") == []

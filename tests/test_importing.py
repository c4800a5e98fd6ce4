import json
import pickle

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pipeline_builders import accepted, invoke, refused, write_params
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from h2t.cache.reader import open_cache
from h2t.cache.tools.verify import verify
from h2t.pipeline.sharing import feature_files, importing


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


def save_wide_parquet(path, x, y):
    columns = {f"f{j}": x[:, j] for j in reversed(range(x.shape[1]))}  # in no order
    pq.write_table(pa.table({"id": [f"s{i}" for i in range(len(x))], **columns, "label": y}), path, row_group_size=4)


def save_torch(path, x, y):
    torch.save({"features": torch.from_numpy(x), "labels": torch.from_numpy(y)}, path)


def save_old_torch(path, x, y):
    tensors = {"features": torch.from_numpy(x), "labels": [f"class {v}" for v in y]}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def save_hdf5(path, x, y):
    with h5py.File(path, "w") as file:
        file["features"] = x
        file["label"] = [f"class {v}" for v in y]


WRITERS = [
    (save_npz, "x.npz"),
    (save_safetensors, "x.safetensors"),
    (save_parquet, "x.parquet"),
    (save_fixed_parquet, "x.parquet"),
    (save_wide_parquet, "x.parquet"),
    (save_torch, "x.pt"),
    (save_old_torch, "x.pth"),
    (save_hdf5, "x.h5"),
]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_every_format_gives_the_rows_that_were_given(tmp_path, write, name):
    x, y = make_features()
    write(tmp_path / name, x, y)
    accepted("cache", "import", tmp_path / "c", "--train", tmp_path / name)
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
    beside = ("--train-labels", tmp_path / "y.npy", "--classes", tmp_path / "names.txt")
    accepted("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npy", *beside)
    with open_cache(tmp_path / "c") as cache:
        assert (cache.spec.maps, cache.spec.dtype) == (((4, 2, 2),), "float16")
        assert cache.spec.provenance["classes"] == ["dog", "owl", "cat"]


def from_npy(tmp_path, x, *more):
    """Imports the array with what is given beside it."""
    np.save(tmp_path / "x.npy", x)
    return invoke("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npy", *more)


LABEL_FILES = {
    "numbers.txt": "".join(f"{k}\n" for k in (2, 0, 1, 0)).encode(),
    "words.txt": "owl\r\nwren\r\nkōkako\r\nwren".encode("utf-8-sig"),
    "one column.csv": b"kind\nowl\nwren\ntit\nwren\n",
    "columns.csv": b"path;label\na.jpg;owl\nb.jpg;wren\nc.jpg;tit\nd.jpg;wren\n",
    "columns.tsv": b"class\tfile\nowl\ta\nwren\tb\ntit\tc\nwren\td\n",
    "lines.jsonl": b'{"y": "owl"}\n{"y": "wren"}\n{"y": "tit"}\n{"y": "wren"}\n',
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_labels_beside_an_npy_file(tmp_path, name):
    (tmp_path / name).write_bytes(LABEL_FILES[name])
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    done = from_npy(tmp_path, x, "--train-labels", tmp_path / name)
    assert done.exit_code == 0, done.output
    with open_cache(tmp_path / "c") as cache:
        names = cache.spec.provenance["classes"]
        assert names[0] == ("0" if name == "numbers.txt" else "wren")
        assert cache.spec.provenance["counts"] == [2, 1, 1]
        np.testing.assert_array_equal(cache.read([0, 1])[:, :, 0, 0], x[[1, 3]])
        if name == "columns.csv":
            assert sorted(cache.rows["source"].to_pylist()) == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bfloat16_becomes_float32_of_the_same_values(tmp_path, suffix):
    x = torch.randn(6, 4).bfloat16()
    content = {"features": x, "labels": torch.tensor([0, 0, 0, 1, 1, 2])}
    (torch.save if suffix == ".pt" else save_tensors)(content, tmp_path / f"x{suffix}")
    accepted("cache", "import", tmp_path / "c", "--train", tmp_path / f"x{suffix}")
    with open_cache(tmp_path / "c") as cache:
        np.testing.assert_array_equal(cache.read(np.arange(6))[:, :, 0, 0], x.float().numpy())


AXES = {"NTC": ((4, 5, 3), (3, 5, 1)), "NCT": ((4, 3, 5), (3, 5, 1)), "nhwc": ((4, 2, 7, 3), (3, 2, 7)),
        "NCHW": ((4, 3, 2, 7), (3, 2, 7)), "nchw": ((4, 2, 2, 7), (2, 2, 7)), "CN": ((3, 4), (3, 1, 1))}  # fmt: skip


@pytest.mark.parametrize(("axes", "shapes"), AXES.items(), ids=AXES)
def test_axes_are_named(tmp_path, axes, shapes):
    given, expected = shapes
    x = np.random.default_rng(0).standard_normal(given).astype(np.float32)
    np.save(tmp_path / "y.npy", np.array([0, 0, 0, 1]))
    done = from_npy(tmp_path, x, "--train-labels", tmp_path / "y.npy", "--axes", axes)
    assert done.exit_code == 0, done.output
    letters = axes.upper().lower()
    wanted = np.einsum(f"{letters}->nc{letters.translate(dict.fromkeys(map(ord, 'nc')))}", x).reshape(4, *expected)
    with open_cache(tmp_path / "c") as cache:
        assert cache.spec.maps == (expected,)
        np.testing.assert_array_equal(cache.read(np.arange(4)), wanted)


def test_wide_columns_of_two_kinds_are_named(tmp_path):
    x, y = make_features()
    columns = {f"{kind}_{j:03d}": x[:, j] for kind in ("clip", "dino") for j in range(5)}
    pq.write_table(pa.table({**columns, "label": y}), tmp_path / "x.parquet")
    command = ["cache", "import", tmp_path / "c", "--train", tmp_path / "x.parquet"]
    done = invoke(*command)
    assert "no features called" in done.stderr
    assert "it holds label, clip_*, dino_*; name the right one by --features-key" in done.stderr
    accepted(*command, "--features-key", "dino_*")


def imported(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        save_npz(tmp_path / f"{split}.npz", *make_features(seed=seed))
    out = tmp_path / "features"
    accepted("cache", "import", out, "--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz")
    return out


@pytest.mark.parametrize("host", ["crt", "ncm", "logistic_regression"])
def test_hosts_without_a_warm_start_train_on_imported_features(tmp_path, host):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml")
    entry = f"hosts.{host}={{backbone: ce_mixup, batchnorm: stage1}}"
    common = ["--params", params, "--set", entry, "--device", "cpu"]
    accepted("train-classifier", host, cache, "none", tmp_path / "heads", *common)
    accepted("evaluate", host, cache, tmp_path / "heads", "none", tmp_path / "evaluate", *common)
    metrics = json.loads((tmp_path / "evaluate/metrics.json").read_text())
    assert metrics["stage1"] is None
    assert metrics["without_h2t"]["top1"] > 60


def test_hosts_with_a_warm_start_say_so(tmp_path):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml", hosts__dr__batchnorm="stage1")
    line = refused(
        "train-classifier", "dr", cache, "none", tmp_path / "heads", "--params", params, "--device", "cpu", code=1
    )
    assert "this backbone has none, like features that were imported" in line


def test_a_backbone_for_imported_features_is_refused(tmp_path, backbone_dir):
    cache = imported(tmp_path)
    params = write_params(tmp_path / "params.yaml", hosts__dr__batchnorm="stage1")
    line = refused("train-classifier", "dr", cache, backbone_dir, tmp_path / "heads", "--params", params, code=1)
    assert "give none as the backbone" in line


def test_importing_again_does_nothing_and_other_features_are_refused(tmp_path):
    cache = imported(tmp_path)
    before = (cache / "cache.json").read_bytes()
    imported(tmp_path)
    save_npz(tmp_path / "other.npz", *make_features(seed=5))
    line = refused("cache", "import", cache, "--train", tmp_path / "other.npz", code=1)
    assert "holds another cache" in line
    assert (cache / "cache.json").read_bytes() == before
    accepted("cache", "import", cache, "--train", tmp_path / "other.npz", "--replace")
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


def linked(path):
    """A dataset whose values lie in another file, as HDF5 allows."""
    path.with_name("other.bin").write_bytes(bytes(64))
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (4, 4), "f4", external=[(str(path.with_name("other.bin")), 0, 64)])
        file["labels"] = [0, 0, 1, 1]


def missing(path):
    pq.write_table(pa.table({"f0": [1.0, None], "f1": [1.0, 2.0], "label": [0, 1]}), path)


THREE = np.zeros((3, 2), np.float32)
OBJECTS = np.array([Evil()], dtype=object)
HOSTILE = {
    "pickled": (lambda path: np.save(path, OBJECTS, allow_pickle=True), "x.npy", "Python objects"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Evil())), "x.npy", "cannot be read"),
    "pickled in npz": (features(OBJECTS, [0]), "x.npz", "it holds Python objects or is damaged"),
    "cut": (cut, "x.npy", "cannot be read"),
    "no npz": (garbage, "x.npz", "cannot be read"),
    "no safetensors": (garbage, "x.safetensors", "cannot be read"),
    "no parquet": (garbage, "x.parquet", "cannot be read"),
    "no torch file": (garbage, "x.pt", "cannot be read"),
    "objects in torch": (lambda path: torch.save({"features": Evil()}, path), "x.pt", "Python objects"),
    "a list in torch": (lambda path: torch.save([torch.zeros(2)], path), "x.pt", "a tensor or a dict of tensors"),
    "no HDF5": (garbage, "x.h5", "cannot be read"),
    "HDF5 of other files": (linked, "x.hdf5", "features lies in other files"),
    "a hole in wide columns": (missing, "x.parquet", "column 'f0' has 1 missing value"),
    "tokens without axes": (lambda path: np.save(path, np.zeros((9, 2, 4))), "x.npy", "--axes NTC where each row has"),
    "another name": (garbage, "x.pkl", "must be one of .npy"),
    "ragged": (
        lambda path: pq.write_table(pa.table({"embedding": [[1.0], [1.0, 2.0]], "label": [0, 1]}), path),
        "x.parquet",
        "different lengths",
    ),
    "nan": (features([[1.0, 2.0], [1.0, np.nan]], [0, 1]), "x.npz", "row 1 (x.npz/000000001) holds NaN"),
    "infinity": (features([[1.0, -np.inf]], [0]), "x.npz", "holds NaN, infinity"),
    "too large": (features(np.full((3, 2), 1e300), [0, 0, 0]), "x.npz", "beyond float32"),
    "rounded": (features([[5, -(2**24)], [0, 2**24 + 1]], [0, 1]), "x.npz", "row 1 (x.npz/000000001) holds 16777217"),
    "channels last": (features(np.zeros((3, 7, 7, 4)), [0, 0, 0]), "x.npz", "--axes NHWC if they do"),
    "complex": (features([[1j]], [0]), "x.npz", "must be numbers"),
    "text": (features([["1"]], [0]), "x.npz", "must be numbers"),
    "no rows": (features(THREE[:0], np.zeros(0, int)), "x.npz", "got float32 (0, 2)"),
    "cube": (features(THREE[:, :, None], [0, 0, 0]), "x.npz", "features have three axes, (3, 2, 1); name them: --axes"),
    "five axes": (features(np.zeros((3, 1, 1, 1, 1)), [0, 0, 0]), "x.npz", "(n, C) or (n, C, H, W)"),
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
    assert str(tmp_path / name) in line
    assert "pickle" not in line
    assert "code ran" not in done.output + capfd.readouterr().out
    assert not (tmp_path / "c").exists()


WRONG_LABELS = {
    "labels.csv": (b"kind,site\nowl,A\n", "no labels called"),
    "few.csv": (b"label\nowl\n", "one label for each of 4 rows is needed; got shape (1,)"),
    "empty.txt": (b"owl\n\nwren\nwren\n", "line 2 is empty"),
    "Latin.txt": (b"caf\xe9\n", "cannot be read"),
    "Latin.csv": (b"label\ncaf\xe9\n", "is not UTF-8"),
    "a hole.csv": (b"label,x\n,1\nowl,1\n", "row 1, column 'label'"),
    "labels.xlsx": (b"PK", "must be one of .npy"),
    "pickled.npy": (pickle.dumps(["owl"]), "cannot be read"),
    "damaged.npy": (b"\x93NUMPY", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels_are_one_line_that_names_their_file(tmp_path, name):
    data, says = WRONG_LABELS[name]
    (tmp_path / name).write_bytes(data)
    done = from_npy(tmp_path, np.zeros((4, 3)), "--train-labels", tmp_path / name)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / name}:")
    assert says in line
    assert "pickle" not in line.replace("pickled.npy", "")
    assert "x.npy" not in line
    assert not (tmp_path / "c").exists()


def test_axes_that_do_not_fit_are_refused(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros(4, int))
    for axes in ("NTCC", "NC", "XYZ", "NHC"):
        done = from_npy(tmp_path, np.zeros((4, 3, 2)), "--train-labels", tmp_path / "y.npy", "--axes", axes)
        assert (
            "--axes must name each of the 3 axes of (4, 3, 2) once: N and C, with H and W for maps or T" in done.stderr
        )
        assert f"got '{axes}'" in done.stderr


def test_an_archive_that_claims_too_much_is_refused_unread(tmp_path, monkeypatch):
    save_npz(tmp_path / "x.npz", *make_features())
    monkeypatch.setattr(feature_files, "available_memory", lambda: 100)
    line = refused("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npz", code=1)
    assert "B of memory" in line


def test_labels_without_training_rows_are_refused(tmp_path):
    save_npz(tmp_path / "train.npz", *make_features((3, 4)))
    save_npz(tmp_path / "test.npz", *make_features((3, 4, 5)))
    line = refused(
        "cache", "import", tmp_path / "c", "--train", tmp_path / "train.npz", "--test", tmp_path / "test.npz", code=1
    )
    assert "label 2 occurs in no training row" in line


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
        line = refused(*command, leaves=tmp_path / "c", code=1)
    assert "changed while it was imported; import again once the file is finished" in line
    accepted(*command)
    assert verify(tmp_path / "c") == []


def test_rows_that_are_trained_on_and_tested_are_said(tmp_path):
    x, y = make_features()
    np.savez(tmp_path / "train.npz", features=x, labels=y)
    np.savez(tmp_path / "test.npz", features=np.concatenate([x[:1], x[1:] + 1]), labels=y)
    given = ["cache", "import", tmp_path / "c", "--train", tmp_path / "train.npz"]
    said = invoke(*given, "--test", tmp_path / "test.npz").stdout
    assert "note: 1 validation or test row equals a training row in every value, such as test.npz/000000000: " in said
    said = invoke(*given, "--replace", "--test", tmp_path / "train.npz").stdout
    assert f"note: {len(y)} validation or test rows equal training rows" in said


def test_the_option_for_missing_labels_can_be_typed(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 3)))
    done = invoke("cache", "import", tmp_path / "c", "--train", tmp_path / "x.npy")
    assert "give them by --train-labels, --val-labels or --test-labels FILE" in done.stderr

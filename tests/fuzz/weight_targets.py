"""Targets among weights and features: the keys of a checkpoint, checkpoint files, feature files."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzz import mutation
from fuzz.cache_targets import mutated_parquet
from fuzz.oracle import Finding
from fuzz.target import Parse, Target
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors

from h2t.pipeline.networks import weights as checkpoints
from h2t.pipeline.sharing import feature_files, importing

# Keys of a checkpoint: JSON with a shape in place of each tensor.


def _state(names: dict[str, list[int]]) -> dict[str, Any]:
    norm = {f"bn1.{name}": [2] for name in ("weight", "bias", "running_mean", "running_var")}
    return {"conv1.weight": [2, 3, 1, 1], **norm, **names}


def _key_seeds() -> list[bytes]:
    plain = _state({"fc.weight": [3, 2], "fc.bias": [3]})
    experts = _state({"linears.0.weight": [2, 3], "linears.1.weight": [2, 3]})
    reslt = _state(
        {"classifier.weight": [3, 2], **{f"BN{b}.{n}": [2] for b in "HMT" for n in checkpoints.NORMS.values()}}
    )
    found = [
        plain,
        {"state_dict": {f"module.{k}": v for k, v in plain.items()}},
        {"state_dict_model": _state({}), "state_dict_classifier": {"fc.weight": [3, 2]}},
        {"feat_model": _state({}), "classifier": {"fc.weight": [3, 2], "fc.bias": [3]}, "epoch": 3},
        {"model": {f"backbone.{k}": v for k, v in experts.items()}},
        reslt,
    ]
    return [mutation.as_json(f) for f in found]


NAMES = [*checkpoints.WRAPPERS, *(n for pair in checkpoints.PAIRS for n in pair), "fc.weight", "fc.bias",
         "fc.0.weight", "fc.1.weight",
         "linears.0.bias", "linear.weight", "head.weight", "module.", "module.fc.weight", "backbone.fc.weight",
         "model.classifier.weight",
         "BNH.weight", "classifier.classifier.weight", "conv1.num_batches_tracked", "fc.10.weight",
         "fc.\u0663.weight"]  # fmt: skip


def _mutated_keys(data: bytes, random: Random) -> bytes:
    return mutation.as_json(mutation.tree(json.loads(data), random, NAMES))


def _tensors(value: Any, depth: int = 0) -> Any:
    """Lists of whole numbers become tensors of that shape, up to a few kilobytes; lists with others stay."""
    if isinstance(value, dict):
        return {k: _tensors(v, depth + 1) for k, v in value.items()} if depth < 50 else {}
    if isinstance(value, list) and all(type(n) is int for n in value) and len(value) < 6:
        return torch.zeros([abs(n) % 7 for n in value], dtype=torch.float64 if 5 in value else torch.float32)
    return value


def _open_keys(folder: Path) -> Parse:
    own = {"weight": torch.zeros(1, 3, 2), "bias": torch.zeros(1, 3)}
    model = torch.nn.Sequential()
    model.add_module("conv1", torch.nn.Conv2d(3, 2, 1, bias=False))
    model.add_module("bn1", torch.nn.BatchNorm2d(2))

    def parse(data: bytes) -> object:
        state = checkpoints.state_dict_in(_tensors(mutation.from_json(data)), Path("x.pt"))
        body, head = checkpoints.split_head(state)
        checkpoints.fit_head(head, own if "bias" in head else {"weight": own["weight"]}, "x.pt")
        checkpoints.fill(model, body, "x.pt")
        return head

    return parse


# Checkpoint files: kind, uint8 (.pt, .safetensors, a file of ours), then the file.


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a checkpoint ran",)


def _checkpoint_seeds() -> list[bytes]:
    state = {"fc.weight": torch.arange(6.0).reshape(2, 3), "conv.weight": torch.zeros(2, 1)}
    found = []
    for content in (state, {"state_dict": state, "epoch": 1}, {"state_dict": _Code()}):
        for modern in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=modern)
            found.append(b"\0" + file.getvalue())
    found.append(b"\0" + pickle.dumps(_Code()))
    found.append(b"\1" + save_tensors(state))
    found.append(b"\2" + save_tensors(state, {"h2t": '{"arch":"resnet20"}'}))
    return found


def _rezipped(data: bytes, random: Random) -> bytes:
    """The archive with one member's bytes changed."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        names = old.namelist()
        chosen = random.choice(names)
        for name in names:
            body = old.read(name)
            if name == chosen:
                body = mutation.raw(body, random)
            method = zipfile.ZIP_DEFLATED if random.random() < 0.1 else zipfile.ZIP_STORED
            new.writestr(name if random.random() < 0.99 else f"../{name}", body, method)
    return target.getvalue()


def _reheaded(data: bytes, random: Random) -> bytes:
    """The safetensors file with a changed header of the right length."""
    length = int.from_bytes(data[:8], "little")
    header = mutation.as_json(
        mutation.tree(json.loads(data[8 : 8 + length]), random, ["__metadata__", "dtype", "shape"])
    )
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _mutated_checkpoint(data: bytes, random: Random) -> bytes:
    kind, body = data[:1], data[1:]
    if kind in (b"\1", b"\2"):
        return kind + _reheaded(body, random)
    return kind + (_rezipped(body, random) if body[:2] == b"PK" else mutation.raw(body, random))


def _open_checkpoint(folder: Path) -> Parse:
    places = [folder / "x.pt", folder / "x.safetensors", folder / "ours.safetensors"]

    def parse(data: bytes) -> object:
        kind = (data[0] if data else 0) % 3
        places[kind].write_bytes(data[1:])
        if kind == 2:
            return checkpoints.load_weights(places[kind])
        return checkpoints.split_head(checkpoints.load_checkpoint(places[kind]))

    return parse


# Features: kind, uint8 (.npy, .npz, .safetensors, .parquet), then the file.


def _feature_seeds() -> list[bytes]:
    x, y = np.arange(12, dtype="<f4").reshape(4, 3), np.array([0, 1, 0, 1])
    found = []
    for features, labels in ((x, y), (x.reshape(4, 3, 1, 1).astype("<f2"), np.array(["a", "b", "a", "c"]))):
        npy, npz, deflated, parquet = (io.BytesIO() for _ in range(4))
        np.save(npy, features)
        np.savez(npz, features=features, labels=labels)
        np.savez_compressed(deflated, features=features, labels=labels)
        pq.write_table(
            pa.table({"embedding": list(features.reshape(4, -1)), "label": labels, "path": list("wxyz")}), parquet
        )
        found += [
            b"\0" + npy.getvalue(),
            b"\1" + npz.getvalue(),
            b"\1" + deflated.getvalue(),
            b"\3" + parquet.getvalue(),
        ]
    objects = io.BytesIO()
    np.save(objects, np.array([_Code()], object), allow_pickle=True)
    return [*found, b"\0" + objects.getvalue(), b"\2" + save_arrays({"embeddings": x, "y": y})]


def _reshaped(data: bytes, random: Random) -> bytes:
    """The .npy file with other words in its header."""
    length = int.from_bytes(data[8:10], "little")
    words = ["(4, 3)", "(2**62, 3)", "(4611686018427387904, 3)", "(-1, 3)", "(0, 3)", "()", "'|O'", "'<f8'", "'<U9'",
             "'|V9'", "[('a','<f4')]",
             "True", "False", "4" * 30, "__import__('os')", "("]  # fmt: skip
    header = mutation.lines(data[10 : 10 + length].decode("latin-1"), random, words, " ").encode(
        "latin-1", errors="replace"
    )
    return data[:8] + (len(header) & 0xFFFF).to_bytes(2, "little") + header + data[10 + length :]


def _mutated_features(data: bytes, random: Random) -> bytes:
    kind, body = data[:1], data[1:]
    if kind == b"\0" and random.random() < 0.7:
        return kind + _reshaped(body, random)
    if kind == b"\1" and random.random() < 0.7:
        return kind + _rezipped(body, random)
    if kind == b"\2":
        return kind + _reheaded(body, random)
    return kind + (mutated_parquet if kind == b"\3" else mutation.raw)(body, random)


def _open_features(folder: Path) -> Parse:
    places = [folder / f"x{suffix}" for suffix in (".npy", ".npz", ".safetensors", ".parquet")]
    labels = folder / "y.npy"
    np.save(labels, np.array([0, 1, 0, 1]))

    def parse(data: bytes) -> object:
        kind = (data[0] if data else 0) % 4
        places[kind].unlink(missing_ok=True)  # never truncate a file that an earlier execution has mapped
        places[kind].write_bytes(data[1:])
        part = feature_files.read_part(places[kind], labels if kind == 0 else None, feature_files.Keys())
        if not len(part.features) == len(part.labels) == len(part.sources) > 0:
            raise Finding("features, labels and sources of different length")
        return importing.class_order({"train": part})

    return parse


TARGETS = [
    Target(
        "keys",
        "pipeline/networks/weights.py: split_head, fit_head, fill",
        _open_keys,
        _key_seeds,
        mutation.mostly(_mutated_keys, 0.98),
    ),
    Target(
        "checkpoint",
        "pipeline/networks/weights.py: load_checkpoint",
        _open_checkpoint,
        _checkpoint_seeds,
        mutation.mostly(_mutated_checkpoint, 0.95),
        8192,
    ),
    Target(
        "features",
        "pipeline/sharing/feature_files.py: read_part",
        _open_features,
        _feature_seeds,
        mutation.mostly(_mutated_features, 0.95),
        8192,
    ),
]

"""Golden results: what each stage and each built-in plug-in gives for tiny fixed inputs, under its number.

Stages run by the command line on the outputs in tests/golden/first, which version 0.1.0 wrote; plug-ins are loaded by
name and called by their contract. So a result does not depend on where code lies or on the stages before.
`python tests/golden_cases.py` writes the results of whatever is new or has a new number, and refuses everything else.
"""

import contextlib
import importlib.metadata
import json
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from zlib import crc32

import image_builders
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
import zarr
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from h2t.cache.format.spec import parse_record
from h2t.pipeline.base import numbers, plugins
from h2t.pipeline.data.classes import ClassIndex
from h2t.pipeline.heads.batches import law
from h2t.pipeline.heads.host import TrainingBatch

HERE = Path(__file__).parent / "golden"
FIRST, RESULTS = HERE / "first", HERE / "results"

FLOATS = 1e-5  # of the largest value of an array
LONG = 2048  # entries, or characters; of longer ones a summary is kept
COUNTS = (30, 12, 3, 1)

#: Name -> an array, compared within FLOATS (float16: one unit in the last place), or a text, compared exactly.
Result = dict[str, Any]


# --- what is kept of a result


def kept(name: str, value: Any) -> Result:
    """`value` (an array, a tensor or a JSON value) under `name`, a summary of it where it is long."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        if value.size <= LONG or value.dtype == np.float16:
            return {name: value}
        if value.dtype.kind == "f":
            return {name: _summary(value)}
        return {name: f"{value.shape} {sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"}
    floats: list[float] = []

    def walk(part: Any) -> Any:
        if isinstance(part, dict):
            return {str(k): walk(v) for k, v in sorted(part.items())}
        if isinstance(part, list | tuple):
            return [walk(v) for v in part]
        if isinstance(part, float):
            floats.append(part)
            return "a float"
        return part

    text = value if isinstance(value, str) else json.dumps(walk(value))
    text = text if len(text) <= LONG else f"{len(text)} characters {sha256(text.encode()).hexdigest()}"
    return {name: text, **({f"{name} floats": np.array(floats)} if floats else {})}


def _summary(values: np.ndarray) -> np.ndarray:
    """The length of the vector, eight projections of it, and its first entries."""
    flat = values.ravel().astype(np.float64)
    steps = np.arange(flat.size)
    projections = [float(flat @ np.sin((0.7 + k) * steps)) for k in range(8)]
    return np.array([np.linalg.norm(flat), *projections, *flat[:64]])


def tables(folder: Path, *names: str) -> Result:
    """Columns and metadata of Parquet files."""
    found: Result = {}
    for name in names:
        table = pq.read_table(folder / name)
        metadata = {k.decode(): json.loads(v) for k, v in (table.schema.metadata or {}).items() if k == b"h2t"}
        found |= kept(f"{name} schema", {"columns": [f"{f.name} {f.type}" for f in table.schema], **metadata})
        for column in table.column_names:
            values = table[column].to_pylist()
            number = pa.types.is_floating(table.schema.field(column).type) and None not in values
            found |= kept(f"{name} {column}", np.array(values, np.float64) if number else values)
    return found


def weights(path: Path) -> Result:
    found: Result = {}
    for key, value in load_file(path).items():
        found |= kept(f"{path.name} {key}", value)
    header = path.read_bytes()
    length = int.from_bytes(header[:8], "little")
    return found | kept(f"{path.name} about", json.loads(header[8 : 8 + length]).get("__metadata__"))


def documents(folder: Path, *names: str) -> Result:
    """JSON files by value, others as text."""
    found: Result = {}
    for name in names:
        text = (folder / name).read_text(encoding="utf-8")
        found |= kept(name, json.loads(text) if name.endswith(".json") else text)
    return found


def differences(found: Result, expected: Result) -> list[str]:
    """What differs, a line each; empty where the results are the same."""
    lines = [f"{name}: {'missing' if name in expected else 'new'}" for name in sorted(set(found) ^ set(expected))]
    for name in sorted(set(found) & set(expected)):
        a, b = np.asarray(found[name]), np.asarray(expected[name])
        if a.dtype.kind != b.dtype.kind or a.shape != b.shape or (a.dtype.kind == "f" and a.dtype != b.dtype):
            lines.append(f"{name}: {a.dtype} {a.shape} in place of {b.dtype} {b.shape}")
        elif a.dtype.kind != "f":
            if not np.array_equal(a, b):
                lines.append(f"{name}: {_where_they_part(str(a), str(b))}")
        elif not np.array_equal(np.isfinite(a), np.isfinite(b)):
            lines.append(f"{name}: other entries are finite")
        elif a.size and (far := _far(a, b)):
            lines.append(f"{name}: {far}")
    return lines


def _where_they_part(a: str, b: str) -> str:
    """What two different texts say around the first place where they differ."""
    first = next((at for at, pair in enumerate(zip(a, b, strict=False)) if len(set(pair)) == 2), min(len(a), len(b)))
    start = max(0, first - 60)
    return f"{a[start : start + 160]!r} in place of {b[start : start + 160]!r}"


def _far(a: np.ndarray, b: np.ndarray) -> str:
    """How far two arrays of floats are apart, or nothing if that may be rounding."""
    finite = np.isfinite(b)
    if not finite.any():
        return ""
    a, b = a[finite], b[finite]
    largest = float(np.abs(b.astype(np.float64)).max())
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
    # float16: what was computed in float32 may round to the neighbour, and has an error of its own where it is near 0.
    allowed = np.maximum(np.spacing(np.abs(b)).astype(np.float64), 1e-6 * largest) if b.dtype == np.float16 else None
    too_far = apart > (FLOATS * largest if allowed is None else allowed)
    return f"{int(too_far.sum())} of {b.size} entries, by up to {apart.max():.3g}" if too_far.any() else ""


# --- stages, by the command line


def h2t(*arguments: str) -> None:
    """Runs the installed command `h2t` in this process."""
    (command,) = importlib.metadata.distribution("h2t").entry_points.select(group="console_scripts", name="h2t")
    code: Any = None
    with patch.object(sys, "argv", ["h2t", *arguments]):
        try:
            command.load()()
        except SystemExit as end:
            code = end.code
    if code:
        raise RuntimeError(f"h2t {' '.join(arguments)}: exit {code}")


def _with_input() -> None:
    """An input of two files, which a backbone names as its weights."""
    Path("photos/a").mkdir(parents=True)
    Path("photos/a/1.png").write_bytes(b"one")
    Path("photos/2.png").write_bytes(b"two")
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["inputs"] = {"photos": "photos"}
    values["backbones"]["few"]["weights"] = "inputs/photos/2.png"
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def watch() -> Result:
    _with_input()
    h2t("watch", "photos", "out/photos.json")
    return documents(Path("out"), "photos.json")


def inputs() -> Result:
    _with_input()
    Path("digests").mkdir()
    Path("digests/photos.json").write_text('{"sha256": "ab", "also": []}', encoding="utf-8")
    h2t("inputs", "digests", "out")
    return documents(Path("out"), "prepare.json", "extract.json", "backbones/few.json")


def prepare(*settings: str) -> Result:
    h2t("prepare", "out", *[word for setting in settings for word in ("--set", setting)])
    return tables(Path("out"), "samples.parquet") | documents(Path("out"), "classes.json")


def train_backbone() -> Result:
    h2t("train-backbone", "few", "data/prepare", "out")
    curves = [f"plots/metrics/train/{name}.tsv" for name in ("loss", "accuracy", "lr")]
    points = {n: [float(line.split("\t")[1]) for line in Path("out", n).read_text().splitlines()[1:]] for n in curves}
    return weights(Path("out/backbone.safetensors")) | weights(Path("out/head.safetensors")) | kept("curves", points)


def extract() -> Result:
    h2t("extract", "few", "data/prepare", "data/train_backbone/few", "out")
    found = _cache(Path("out"))
    found["every fourth map"] = found["maps"][::4]
    found["maps"] = _summary(found["maps"])
    return found | weights(Path("out/batchnorm.safetensors"))


def replicates() -> Result:
    """One more replicate: names of its files, its samples and stage-I head; digests of floats vary by machine."""
    h2t("replicates", "data/inputs", "out", "--set", "replicates=[0, 1]")
    digests = json.loads(Path("out/few.json").read_text(encoding="utf-8"))
    files = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file())
    found = kept("digests", {number: sorted(entry) for number, entry in digests.items()}) | kept("files", files)
    return (
        found
        | tables(Path("out/1/prepare"), "samples.parquet")
        | weights(Path("out/1/train_backbone/few/head.safetensors"))
    )


def pool() -> Result:
    h2t("pool", "few", "data/extract/few", "out")
    return _cache(Path("out"))


def _cache(folder: Path) -> Result:
    record = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
    record["fingerprint_inputs"].get("batchnorm", {}).pop("statistics", None)  # a digest of floats
    record["provenance"].pop("versions", None)
    if "pooled_with" in record["provenance"]:
        assert record["provenance"].pop("pooled_with") == {"numpy": np.__version__}
    about = {key: record[key] for key in ("format", "fingerprint_inputs", "layout", "experts", "rows", "provenance")}
    maps = np.asarray(zarr.open_group(folder / "maps.zarr", mode="r")["expert_0"])
    return {**kept("cache.json", about), **tables(folder, "rows.parquet"), **kept("maps", maps)}


def probe() -> Result:
    """Of a backbone whose head is left out; its weights are those of the cache."""
    settings = ("--set", "backbones.few.head=probe")
    with safe_open("data/train_backbone/few/head.safetensors", "np") as file:
        about = json.loads(file.metadata()["h2t"])
    about |= {"head": "probe", "probe": {"l2": 1e-3, "scale": 25.0, "iterations": 1000}, "classifier": "none"}
    save_file({}, "data/train_backbone/few/head.safetensors", {"h2t": json.dumps(about)})
    h2t("probe", "few", "data/extract/few", "out", *settings)
    found = documents(Path("out"), "probe.json")
    rows = pq.read_table("data/extract/few/rows.parquet").to_pandas()
    train = rows[(rows.split == "train") & (rows.statistics == "stage1") & (rows["view"] == 0)]
    maps = np.asarray(zarr.open_group("data/extract/few/maps.zarr", mode="r")["expert_0"])[train["row"]]
    x, y = maps.astype(np.float64).mean((2, 3)), train["label"].to_numpy()
    # Solvers that stop near the minimum differ in the weights; what is minimised is flat there.
    for name in ("head", "cosine"):
        state = load_file(f"out/{name}.safetensors")
        weight, bias = state["weight"][0].astype(np.float64), state.get("bias", np.zeros((1, 1)))[0]
        found |= kept(f"{name} about", [f"{key} {value.shape} {value.dtype}" for key, value in state.items()])
        lengths = np.linalg.norm(x, axis=1, keepdims=True) * np.linalg.norm(weight, axis=1)
        logits = x @ weight.T + bias if name == "head" else 25 * x @ weight.T / lengths
        losses = np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(y)), y]
        found |= kept(f"{name} loss", np.array([losses.mean() + (name == "head") * 5e-4 * (weight**2).sum()]))
    return found


def train_classifier() -> Result:
    h2t("train-classifier", "dr", "data/extract/few", "data/train_backbone/few", "out")
    return weights(Path("out/heads.safetensors")) | tables(Path("out"), "heads.parquet", "history.parquet")


EVALUATE = ("evaluate", "dr", "data/extract/few", "data/train_classifier/dr", "data/train_backbone/few")


def evaluate() -> Result:
    h2t(*EVALUATE, "out")
    names = ("heads", "differences", "per_class", "confusion", "predictions")
    found = documents(Path("out"), "metrics.json") | tables(Path("out"), *(f"{name}.parquet" for name in names))
    record = Path("data/extract/few/cache.json")
    made = parse_record(record.read_bytes())
    threes = {"test_groups": [i // 3 for i in range(40)]}  # of its 40 test images
    grouped = replace(made.spec, provenance={**made.spec.provenance, **threes})
    record.write_bytes(grouped.record(made.files))
    h2t(*EVALUATE, "grouped")
    return found | {f"grouped {name}": value for name, value in documents(Path("grouped"), "metrics.json").items()}


def report() -> Result:
    h2t(*EVALUATE, "data/evaluate/dr")  # version 0.1.0 wrote no differences.parquet
    h2t("report", "data/evaluate", "out")
    return documents(
        Path("out"),
        "results.md",
        "results.csv",
        "results.tex",
        "metrics.json",
        "summary.json",
        "plots/ratio.csv",
        "plots/per_class.csv",
    )


STAGES: dict[str, Callable[[], Result]] = {
    "watch": watch,
    "inputs": inputs,
    "prepare": prepare,
    "train_backbone": train_backbone,
    "extract": extract,
    "replicates": replicates,
    "pool": pool,
    "probe": probe,
    "train_classifier": train_classifier,
    "evaluate": evaluate,
    "report": report,
}


# --- plug-ins, by their contract


def waves(*shape: int, step: float = 0.7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Values in [-1, 1] that need no random generator."""
    return torch.sin(step * torch.arange(int(np.prod(shape)), dtype=torch.float64)).reshape(shape).to(dtype)


def _cifar_files(root: Path) -> dict[str, Any]:
    def batch(path: Path, size: int, classes: int, key: str) -> None:
        path.parent.mkdir(exist_ok=True)
        data = (np.arange(size * 3072) * 31 % 251).astype(np.uint8).reshape(size, 3072)
        path.write_bytes(pickle.dumps({"data": data, key: (np.arange(size) % classes).tolist()}))

    ten, hundred = root / "cifar-10-batches-py", root / "cifar-100-python"
    for i in range(1, 6):
        batch(ten / f"data_batch_{i}", 20, 10, "labels")
    batch(ten / "test_batch", 10, 10, "labels")
    (ten / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {j}" for j in range(10)]}))
    batch(hundred / "train", 200, 100, "fine_labels")
    batch(hundred / "test", 100, 100, "fine_labels")
    (hundred / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {j}" for j in range(100)]}))
    return {"root": str(root), "download": False}


def _parquet_files(root: Path) -> dict[str, Any]:
    for name, labels in (("train.parquet", [0, 0, 0, 1, 1]), ("test.parquet", [0, 1])):
        images = []
        for i in range(len(labels)):
            picture = Image.fromarray(np.full((32, 32, 3), 20 * i, np.uint8))
            images.append({"bytes": image_builders.encoded(picture, "bmp"), "path": None})
        pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), root / name)
    return {"train": [str(root / "train.parquet")], "test": [str(root / "test.parquet")]}


def _listed_images(root: Path, **named: str) -> dict[str, Any]:
    """Five images, two lists of them and a table; returns the options with `named`."""
    lines = [(f"img/{i}.png", ("wren", "wren", "rook")[i % 3]) for i in range(5)]
    image_builders.make_tree(root, dict.fromkeys([path for path, _ in lines], 0))
    image_builders.write_list(root / "train.txt", lines[:3])
    image_builders.write_list(root / "test.txt", lines[3:])
    splits = ("train", "train", "train", "test", "val")
    table = [f"{path},{label},{split}\n" for (path, label), split in zip(lines, splits, strict=True)]
    (root / "table.csv").write_text("file,bird,part\n" + "".join(table), encoding="utf-8")
    return {"root": str(root), "transform": {"size": 32, "resize": 36}, **named}


FILES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cifar10": _cifar_files,
    "cifar100": _cifar_files,
    "image_folder": image_builders.make_image_folder,
    "imagenet_lt": image_builders.make_imagenet_lt,
    "inaturalist18": image_builders.make_inaturalist18,
    "list_file": partial(_listed_images, train="train.txt", test="test.txt"),
    "parquet": _parquet_files,
    "places_lt": partial(image_builders.make_places_lt, style="data_256"),
    "table": partial(_listed_images, table="images/table.csv", path="file", label="bird", split="part"),
}


def datasets(name: str) -> Result:
    """The table that prepare makes of a few tiny files, and the first image where the plug-in decodes it itself."""
    if name not in FILES:
        found = prepare(f"prepare.dataset={name}")
        options: dict[str, Any] = {}
    else:
        # BMP under every name: how other formats are encoded hangs on the version of a library.
        as_bmp = partial(image_builders.write_image, format="BMP")
        with patch.object(image_builders, "write_image", as_bmp):
            Path("images").mkdir()
            options = FILES[name](Path("images"))
        with patch("torchvision.datasets.cifar.check_integrity", lambda *_: True):
            found = prepare(
                f"prepare.dataset={name}",
                f"prepare.options={json.dumps(options)}",
                "prepare.imbalance={profile: none}",
                "prepare.test_per_class=0",
                "prepare.validation_per_class=0",
            )
    module = plugins.load("datasets", name)
    if hasattr(module, "decode"):
        opened = module.Options.model_validate(options)
        source = pq.read_table("out/samples.parquet")["source"][0].as_py()
        found |= kept("first image", module.decode(module.reader(opened)(source)))
    return found


BACKBONE_OPTIONS: dict[str, dict[str, Any]] = {
    "torchvision": {"model": "resnet18"},
    "timm": {"model": "test_resnet"},
    "huggingface": {
        "config": {
            "model_type": "vit",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
    },
}


def backbones(name: str) -> Result:
    """The fresh weights, and the maps of two images under given weights."""
    module = plugins.load("backbones", name)
    torch.manual_seed(0)
    network = module.build(module.Options(**BACKBONE_OPTIONS.get(name, {}))).eval()
    state = network.state_dict()
    found = kept("weights", [f"{key} {tuple(value.shape)}" for key, value in state.items()])
    found |= kept("fresh", np.array([[float(v.double().sum()), float(v.double().abs().sum())] for v in state.values()]))
    for key, value in state.items():
        if value.is_floating_point():
            wave = waves(value.numel(), dtype=torch.float32).reshape(value.shape)
            spread = (4 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1
            value.copy_(spread * wave + (1 if value.ndim == 1 and "bias" not in key and "mean" not in key else 0))
    with torch.no_grad():
        maps = network(waves(2, 3, 32, 32, dtype=torch.float32))
    for expert, values in enumerate(maps):
        found |= kept(f"maps of expert {expert} {tuple(values.shape)}", values)
    return found | kept("about", {"channels": network.channels, "experts": network.experts})


def objectives(name: str) -> Result:
    """The fresh classifier, and loss and gradients of a batch in the first epoch and in a late one."""
    module = plugins.load("objectives", name)
    torch.manual_seed(0)
    objective = module.Objective(module.Loss(), 8, 2, torch.tensor(COUNTS))
    found: Result = kept("about", {"classifier": objective.classifier, "scale": float(objective.scale)})
    for key, value in objective.state_dict().items():
        found |= kept(f"fresh {key}", value)
    maps = tuple(waves(6, 8, 2, 2, step=step, dtype=torch.float32).abs() for step in (0.7, 0.9))
    parameters = dict(objective.named_parameters())
    for epoch in (0, 1000):
        loss = objective.loss(maps, torch.arange(6) % len(COUNTS), epoch)
        found |= kept(f"epoch {epoch} loss", loss)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for key, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                found |= kept(f"epoch {epoch} gradient of {key}", gradient)
    return found


def samplers(name: str) -> Result:
    counts = np.array(COUNTS, np.int64)
    classes = ClassIndex(np.cumsum(counts) - counts, counts)

    def streams(*key: int | str) -> np.random.Generator:
        return np.random.default_rng([7, *(crc32(part.encode()) if isinstance(part, str) else part for part in key)])

    draw = law(name, epochs=2)
    drawn = [draw(classes, streams, epoch, step, 16) for epoch in (0, 1) for step in (0, 1)]
    return kept("positions", [d.tolist() for d in drawn])


def pools(name: str) -> Result:
    module = plugins.load("pools", name)
    made = module.Pool(module.Options(), 6)
    state = {k: t.double() for k, t in made.initial().items()}
    found = kept(
        "about",
        {"commutes": made.commutes, "linear": getattr(made, "linear", False), "numbers": getattr(made, "numbers", 1)},
    )
    for key, value in state.items():
        found |= kept(f"initial {key}", value)
    return found | kept("features", made(state, waves(2, 5, 6, 3, 3).abs()))


def hosts(name: str) -> Result:
    """Start, loss, gradients, updates and logits of two experts for both classifiers, as far as the host takes them."""
    module = plugins.load("hosts", name)
    context = SimpleNamespace(counts=torch.tensor(COUNTS), classes=len(COUNTS), channels=6, experts=2, pixels=4)
    found: Result = {}
    for kind, scale in (("linear", 1.0), ("cosine", 20.0)):
        try:
            host = module.Host(module.Loss(), kind, scale, context)
        except Exception as refusal:  # noqa: BLE001 - a host may refuse a classifier, in words of its own
            found |= kept(f"{kind}: refused", type(refusal).__name__)
            continue
        found |= {f"{kind}: {key}": value for key, value in _host(host, context).items()}
    return found


def _host(host: Any, context: Any) -> Result:
    state = {"weight": waves(2, 4, 6), "bias": waves(2, 4, step=0.3)}
    if host.classifier == "cosine":
        del state["bias"]
    if host.classifier == "branches":
        state |= {
            "norm_weight": 1 + waves(3, 6) / 2,
            "norm_bias": waves(3, 6, step=0.4),
            "running_mean": waves(3, 6, step=0.5),
            "running_var": 1 + waves(3, 6, step=0.6) / 2,
        }
    stage1 = SimpleNamespace(state=state, classifier=host.classifier, scale=1.0)
    features = waves(2, 12, 6).abs()
    if host.numbers == 2:
        features = torch.stack([features, features.square() + 0.1], -1)
    labels = torch.arange(12) % context.classes
    about = {"classifier": host.classifier, "receiver": host.receiver, "numbers": host.numbers}
    if hasattr(host, "fit"):
        start = host.fit(features.float(), labels.sort().values, stage1)
        start = {key: value.double() for key, value in start.items()}
        found = kept("about", about)
    else:
        if host.prepares:
            sorted_by_class = torch.arange(len(COUNTS)).repeat_interleave(context.counts)
            host.prepare(waves(2, sum(COUNTS), 6, step=0.8).abs(), sorted_by_class, stage1)
        start = {k: t.double() for k, t in host.initial(stage1, np.random.default_rng(1)).items()}
        found = kept("about", {**about, "rates": dict(host.rates), "fixed": sorted(host.fixed)})
        moving = {k: t.requires_grad_() for k, t in start.items() if k not in host.fixed}
        noise = host.noise(np.random.default_rng(2), 12)
        noise = None if noise is None else noise.double()
        first = context.counts.cumsum(0) - context.counts
        batch = TrainingBatch(features, labels, noise, first[labels], progress=0.5)
        if host.partner:
            batch = batch._replace(partners=features.flip(1), partner_labels=labels.flip(0))
        loss = host.batch_loss(start, _augmented(host, batch))
        gradients = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
        found |= kept("loss", loss)
        for key, gradient in zip(moving, gradients, strict=True):
            if gradient is not None:
                found |= kept(f"gradient of {key}", gradient)
        for key, value in host.update(start, features, labels).items():
            found |= kept(f"update of {key}", value)
    for key, value in start.items():
        found |= kept(f"start {key}", value)
    return found | kept("logits", host.logits(start, features))


def _augmented(host: Any, batch: TrainingBatch) -> TrainingBatch:
    """The batch as the loss gets it; a host that reads maps gets some of 2 x 2 whose means are the features."""
    if host.reads != "maps":
        return batch._replace(features=host.augment(batch))
    uneven = torch.tensor([[0.5, 1.5], [1.75, 0.25]], dtype=torch.float64)
    maps = [x[..., None, None] * uneven for x in (batch.features, batch.partners)]
    changed = host.augment(batch._replace(features=maps[0], partners=maps[1]))
    return batch._replace(features=changed.mean((-2, -1)))


PLUGINS: dict[str, Callable[[str], Result]] = {
    "datasets": datasets,
    "backbones": backbones,
    "objectives": objectives,
    "samplers": samplers,
    "pools": pools,
    "hosts": hosts,
}


# --- the committed results


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A copy of tests/golden/first as the working directory."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FIRST, folder, dirs_exist_ok=True)
        with contextlib.chdir(folder):
            yield


def all_cases() -> list[str]:
    """`extract`, `hosts.dr`, ...: every stage and built-in plug-in, as stages.yaml names them."""
    return sorted(numbers.built_in())


def run(case: str) -> Result:
    kind, _, name = case.partition(".")
    with workplace():
        return PLUGINS[kind](name) if name else STAGES[kind]()


def path_of(case: str) -> Path:
    return RESULTS / f"{case}.npz"


def load(case: str) -> tuple[int, Result]:
    """(number, result) as committed."""
    with np.load(path_of(case), allow_pickle=False) as file:
        found = {key: file[key] for key in file.files}
    return int(found.pop("NUMBER")), found


def main() -> int:
    """Writes results that are missing or whose number was raised. Refuses (exit 1) other results of the same number."""
    torch.set_num_threads(1)
    refused = 0
    for case in all_cases():
        number, found = numbers.built_in()[case], run(case)
        if path_of(case).exists():
            before, expected = load(case)
            if number == before:
                if lines := differences(found, expected):
                    print(f"{case}: other results under the same number {number}: {lines[0]}")
                    refused += 1
                continue
            if number < before:
                print(f"{case}: number {number} is lower than {before}; numbers only rise")
                refused += 1
                continue
        RESULTS.mkdir(exist_ok=True)
        np.savez_compressed(path_of(case), NUMBER=np.int64(number), **found)
        print(f"{case}: written under number {number}")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())

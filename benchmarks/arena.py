"""Every method of stage II on one cache, tuned alike, in one table: without and with H2T.

    make arena                                                  # handwritten digits, from images to the table
    python -m benchmarks.arena --cache CACHE --backbone FOLDER  # a cache that exists, and its stage I
    python -m benchmarks.arena --only dr isda --set hosts.dr.grid.lr=[0.02]

Settings: presets/arena.yaml. Plug-ins of your own in plugins/hosts/ take part with their default constants. Constants
are chosen by cross-validation on the training rows, or on validation images if the cache has any; never on test images.
What is finished is left alone while its settings stay the same. Writes OUT/arena.json and OUT/arena.md: a line for each
method without and with H2T, best first. `rank` is 1 + the number of lines whose top-1 is higher beyond doubt (95 %
interval over seeds and test images, paired), so lines of equal rank cannot be told apart from the best of them. `H2T's
gain` is with minus without H2T, paired alike. A step's cost is the processor time of one classifier at ratio 0.3.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import measure, paper
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base import clock, device, params, plugins
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.command_line import presets
from h2t.pipeline.heads.host_entry import Grid
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.inspection import settings
from h2t.pipeline.networks.trained import backbone_digest
from h2t.pipeline.reporting.results import HostResult, load_result, rows_apart
from h2t.pipeline.stages import evaluate, train_classifier

ROWS = {"without_h2t": "without", "with_h2t": "with"}
FIGURES = ("top1", "head", "medium", "tail", "balanced_accuracy", "ece")
REFERENCE = "dr"
STEP_EPOCHS = (1, 1, 4)  # the first training imports what a step needs; the difference of the others has no preparation


def parameters(only: Sequence[str] = (), overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The arena's parameters, complete and checked, with plug-ins of the project's own. Raises UserError."""
    values = params.load(presets.FOLDER / "arena.yaml")
    backbone = next(iter(values["backbones"]))
    built_in = {path.stem for path in plugins.folders("hosts")[0].glob("*.py")}
    for name in plugins.names("hosts"):
        if name not in built_in:
            values["hosts"][name] = {"host": name, "backbone": backbone}
    for name in only:
        if name not in values["hosts"]:
            raise UserError(f"--only {name}: must be one of {', '.join(values['hosts'])}")
    if only:
        values["hosts"] = {name: values["hosts"][name] for name in only}
    for override in overrides:
        params.apply(values, override)
    settings.check(values)
    return values


class Arena:
    """All methods in `values` on one cache; everything is written below `out`."""

    def __init__(self, values: dict[str, Any], cache: Path, backbone: Path, out: Path) -> None:
        self.values, self.cache, self.backbone, self.out = values, cache, backbone, out
        self.device = device.choose(values["device"])
        self.residency = params.build(Residency, "train_classifier", values["train_classifier"])
        self.hosts = {
            name: params.build(train_classifier.Params, f"hosts.{name}", host)
            for name, host in settings.complete(values, "hosts").items()
        }

    def run(self) -> list[dict[str, Any]]:
        """The lines of the table. A method that fails is named, and the others go on."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "params.yaml").write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        results, steps, failed = {}, {}, {}
        with open_cache(self.cache) as cache:
            for name in self.hosts:
                try:
                    result, step = self._result(name, cache), self._step(name, cache)
                except UserError as error:
                    failed[name] = str(error).replace(str(cache.files), "CACHE")
                    print(f"{name}: left out: {error}", flush=True)
                    continue
                results[name], steps[name] = result, step
        lines = ranked(
            results, [line for name, result in results.items() for line in self._lines(name, result, steps[name])]
        )
        measure.save(self.out / "arena.json", {"lines": lines, "left_out": failed})
        (self.out / "arena.md").write_text(table(lines) + "\n", encoding="utf-8")
        return lines

    def _result(self, name: str, cache: Cache) -> HostResult:
        """Trains, tunes and evaluates one method, unless that is done."""
        host, heads, scores = self.hosts[name], self.out / "heads" / name, self.out / "evaluate" / name
        if "val" in set(cache.rows["split"].unique().to_pylist()):
            host = host.model_copy(update={"folds": None})
        section = params.build(evaluate.Params, "evaluate", self.values["evaluate"])
        about = [host.model_dump(), section.model_dump(), cache.spec.fingerprint, backbone_digest(self.backbone)]

        def work() -> None:
            begun = time.process_time()
            train_classifier.run(host, Run(name, heads, self.device), self.residency, cache, self.backbone)
            evaluate.run(section, Run(name, scores, self.device), cache, heads, self.backbone)
            spent = time.process_time() - begun
            self._cost(name, "step").unlink(missing_ok=True)  # of other settings
            self._cost(name, "seconds").write_text(json.dumps({"cpu_seconds": round(spent, 2)}), encoding="utf-8")
            print(f"{name}: {spent:.0f} CPU seconds", flush=True)

        paper.unless_done(self.out / "runs" / f"{name}.json", scores, about, work)
        return load_result(name, scores)

    def _step(self, name: str, cache: Cache) -> float | None:
        """Processor milliseconds of a step of one classifier with H2T, its constants the default ones, measured once.

        None for a method without steps.
        """
        host = self.hosts[name]
        if plugins.load("hosts", host.host).Host.fitted:
            return None
        saved = self._cost(name, "step")
        if not saved.is_file():
            grid = Grid(ratio=[0.3], seed=[0], lr=host.grid.lr and host.grid.lr[:1])
            spent, steps = [], []
            for epochs in STEP_EPOCHS:
                optimiser = host.optimiser.model_copy(update={"epochs": epochs})
                short = host.model_copy(update={"folds": None, "grid": grid, "optimiser": optimiser})
                with tempfile.TemporaryDirectory() as folder:
                    run = Run(name, Path(folder) / "heads", self.device)
                    before = _training_seconds()
                    steps.append(train_classifier.run(short, run, self.residency, cache, self.backbone).steps)
                    spent.append(_training_seconds() - before)
            each = 1e3 * (spent[-1] - spent[-2]) / (steps[-1] - steps[-2])
            saved.write_text(json.dumps({"step_ms": round(each, 3)}), encoding="utf-8")
        found: float = json.loads(saved.read_text(encoding="utf-8"))["step_ms"]
        return found

    def _cost(self, name: str, of: str) -> Path:
        """The file of a method's seconds, or of its step's."""
        return self.out / "evaluate" / f"{name}.{of}.json"

    def _lines(self, name: str, result: HostResult, step: float | None) -> list[dict[str, Any]]:
        host = self.hosts[name]
        kind = plugins.load("hosts", host.host).Host
        seconds = json.loads(self._cost(name, "seconds").read_text(encoding="utf-8"))["cpu_seconds"]
        return [
            {
                "method": name,
                "h2t": words,
                "batches": "–" if kind.fitted else host.receiver or kind.receiver,
                "needs": kind.needs() or "–",
                **{f: None if entry.get(f) is None else round(entry[f], 2) for f in FIGURES},
                "chosen": (entry.get("chosen") or {}).get("values", {}),
                "cpu_seconds": seconds,
                "step_ms": step,
            }
            for row, words in ROWS.items()
            if (entry := result.metrics[row])
        ]


def _training_seconds() -> float:
    """Processor seconds that this process has spent on training."""
    return clock.parts().get("training", {"cpu": 0.0})["cpu"]


def ranked(results: Mapping[str, HostResult], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines, best top-1 first, with `rank`, the `difference` of top-1 from the reference without H2T, and `gain`.

    `gain`: with minus without H2T, in the lines with it.
    """
    row_of = {words: row for row, words in ROWS.items()}

    def apart(after: Mapping[str, Any], name: str, row: str) -> Any:
        found = rows_apart(results[after["method"]], row_of[after["h2t"]], results[name], row)
        return found["top1"] if found else None

    lines = sorted(lines, key=lambda line: -line["top1"])
    for place, line in enumerate(lines):
        higher = (apart(better, line["method"], row_of[line["h2t"]]) for better in lines[:place])
        line["rank"] = 1 + sum(found is not None and found.verdict == "higher" for found in higher)
        against = apart(line, REFERENCE, "without_h2t") if REFERENCE in results else None
        itself = (line["method"], line["h2t"]) == (REFERENCE, "without")
        line["difference"] = None if against is None or itself else against.as_dict()
        gain = apart(line, line["method"], "without_h2t") if line["h2t"] == "with" else None
        line["gain"] = gain and gain.as_dict()
    return lines


def widest_gains(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Method -> H2T's gain in top-1 (mean, low, high) from the two `difference`s, for records without paired gains.

    The gain is the difference with H2T minus the one without it. How the two vary together is not recorded, so their
    half-widths are added, as the standard deviation of a difference is at most the sum of both: the widest case.
    """
    found = {(line["method"], line["h2t"]): line["difference"] for line in lines}
    found[REFERENCE, "without"] = dict.fromkeys(("mean", "low", "high"), 0.0)  # from itself
    gains = {}
    for method, h2t in found:
        after, before = found[method, h2t], found.get((method, "without"))
        if h2t == "with" and after and before:
            mean = after["mean"] - before["mean"]
            reach = (after["high"] - after["low"] + before["high"] - before["low"]) / 2
            gains[method] = {"mean": mean, "low": mean - reach, "high": mean + reach}
    return gains


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a Markdown table. Older records have no step's cost, and no gains, so these are `widest_gains`."""
    paired = any(line.get("gain") for line in lines)
    widest = {} if paired else widest_gains(lines)
    gain, step_cost = "H2T's gain" if paired else "H2T's gain, at the widest", f"step / {REFERENCE}'s"
    header = ["rank", "method", "H2T", "batches", "needs", *(f.replace("_", " ") for f in FIGURES)]
    header += [f"top1 minus {REFERENCE}", gain, "chosen", "CPU s", step_cost]
    of_reference = next((line.get("step_ms") for line in lines if line["method"] == REFERENCE), None)
    rows = []
    for line in lines:
        figures = ["–" if line[f] is None else f"{line[f]:.2f}" for f in FIGURES]
        gained = widest.get(line["method"]) if line["h2t"] == "with" else None
        apart = [_interval(line["difference"]), _interval(line.get("gain") or gained)]
        step = line.get("step_ms")
        times = f"{step / of_reference:.1f}" if step and of_reference else "–"
        chosen = ", ".join(f"{key.removeprefix('loss.')} {value:g}" for key, value in line["chosen"].items()) or "–"
        first = [str(line["rank"]), line["method"], line["h2t"], line["batches"], line["needs"]]
        rows.append([*first, *figures, *apart, chosen, f"{line['cpu_seconds']:.0f}", times])
    kept = [i for i, name in enumerate(header) if name not in (gain, step_cost) or any(row[i] != "–" for row in rows)]
    return measure.table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _interval(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a cache that exists; by default one of the digits is made")
    parser.add_argument("--backbone", type=Path, help="the folder that train-backbone wrote for this cache")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="these entries of the parameters")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other parameter")
    parser.add_argument("--out", type=Path, default=Path("data/arena"), help="where everything is written")
    given = parser.parse_args()
    if bool(given.cache) != bool(given.backbone):
        parser.error("--cache and --backbone go together")
    with measure.errors_in_one_line():
        values = parameters(given.only, given.set)
        cache, backbone = given.cache, given.backbone
        if cache is None:
            made = paper.Reproduction("arena", values, given.out, {})
            made.sources()
            name = next(iter(values["backbones"]))
            cache, backbone = given.out / "extract" / name, given.out / "train_backbone" / name
        lines = Arena(values, cache, backbone, given.out).run()
    print(table(lines))


if __name__ == "__main__":
    main()

"""One analysis of the paper on a finished cache: train and evaluate the hosts of a parameter set, and report.

    python -m benchmarks.analyses donors --data data          # presets/analyses/donors.yaml; or the path of a file
    python -m benchmarks.analyses grid --published 3          # and the published way, measured for 3 steps

Reads `extract` and `train_backbone` in the folder --data and writes `analyses/<name>` beside them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from cache.reader import open_cache
from pipeline import device, params
from pipeline.outputs import write_run_record
from pipeline.stages import evaluate, report, train_classifier

PRESETS = Path(__file__).parent.parent / "presets" / "analyses"
PUBLISHED_PASSES = 2  # forward passes of the backbone a step: receivers and donors


def analyse(values: dict[str, Any], data: Path, out: Path) -> None:
    """Trains, evaluates and reports every host in `values` into `out`."""
    hosts = values["hosts"]
    residency = params.build(train_classifier.Residency, "train_classifier", values.get("train_classifier", {}))
    section = params.build(evaluate.Params, "evaluate", values.get("evaluate", {}))
    chosen = device.choose(values.get("device", "auto"))
    for name, given in hosts.items():
        host = params.build(train_classifier.Params, f"hosts.{name}", given)
        backbone = data / "train_backbone" / host.backbone
        with open_cache(data / "extract" / host.backbone) as cache:
            trained = out / "train_classifier" / name
            started, used = time.perf_counter(), time.process_time()
            summary = train_classifier.run(host, residency, name, cache, backbone, chosen, trained, print)
            taken = {"seconds": round(time.perf_counter() - started, 2), "cpu": round(time.process_time() - used, 2)}
            write_run_record(out / "runs" / "train_classifier" / f"{name}.json", {**vars(summary), **taken})
            evaluate.run(section, name, cache, trained, backbone, chosen, out / "evaluate" / name, print)
    about = params.build(report.Params, "report", values.get("report", {}))
    report.run(about, list(hosts), out / "evaluate", out / "report", print, out / "runs")


def published(data: Path, backbone: str, heads: int, epochs: int, batch: int, steps: int) -> dict[str, float]:
    """What the published way would take for `heads`: one run each, two backbone passes a step, from `steps` measured.

    A lower bound: reading and augmenting images, the head's own step and the evaluation are left out.
    """
    from pipeline.network import load_backbone

    network, _ = load_backbone(data / "train_backbone" / backbone)
    samples = sum(json.loads((data / "extract" / backbone / "cache.json").read_text())["provenance"]["counts"])
    size = json.loads((data / "extract" / backbone / "cache.json").read_text())["fingerprint_inputs"]["transform"][
        "size"
    ]
    images = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        network(images)
        started, used = time.perf_counter(), time.process_time()
        for _ in range(steps * PUBLISHED_PASSES):
            network(images)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    total = heads * epochs * -(-samples // batch) / steps
    return {"step_seconds": seconds / steps, "step_cpu": cpu / steps, "seconds": seconds * total, "cpu": cpu * total}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(sorted(p.stem for p in PRESETS.glob('*.yaml')))}, or a file")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, help="by default DATA/analyses/NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--published", type=int, default=0, metavar="STEPS", help="measure the published way as well")
    given = parser.parse_args()
    path = Path(given.name) if given.name.endswith(".yaml") else PRESETS / f"{given.name}.yaml"
    values = params.load(path, given.set)
    out = given.out or given.data / "analyses" / path.stem
    analyse(values, given.data, out)
    if given.published:
        name, host = next(iter(values["hosts"].items()))
        chosen = params.build(train_classifier.Params, f"hosts.{name}", host)
        heads, optimiser = len(train_classifier.heads_of(chosen.grid)), chosen.optimiser
        found = published(given.data, chosen.backbone, heads, optimiser.epochs, optimiser.batch_size, given.published)
        write_run_record(
            out / "runs" / "published" / f"{name}.json", {**found, "heads": heads, "steps": given.published}
        )
        print(f"the published way, estimated: {found['seconds']:,.0f} s of backbone passes for {heads} heads")


if __name__ == "__main__":
    main()

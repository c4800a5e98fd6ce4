"""One analysis of the paper on a finished cache: train and evaluate the hosts of a parameter set, and report.

    python -m benchmarks.analyses donors --data data          # presets/analyses/donors.yaml; or the path of a file

Reads `extract`, `train_backbone` and the record of the extraction in the folder --data, writes `analyses/<name>` there.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from benchmarks.measure import timed
from h2t.cache.errors import CacheError
from h2t.cache.reader import Cache, open_cache
from h2t.pipeline.base import device, params
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import write_run_record
from h2t.pipeline.base.run import Run
from h2t.pipeline.extraction.recipes import RECIPES
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.inspection import settings
from h2t.pipeline.stages import evaluate, report, train_classifier

PRESETS = Path(__file__).parent.parent / "presets" / "analyses"


def analyse(values: dict[str, Any], data: Path, out: Path) -> None:
    """Trains, evaluates and reports every host in `values` into `out`; one whose rows the cache lacks is left out."""
    hosts = settings.complete(values, "hosts")
    residency = params.build(Residency, "train_classifier", values.get("train_classifier", {}))
    section = params.build(evaluate.Params, "evaluate", values.get("evaluate", {}))
    chosen = device.choose(values.get("device", "auto"))
    done = []
    for name, given in hosts.items():
        host = params.build(train_classifier.Params, f"hosts.{name}", given)
        backbone = data / "train_backbone" / host.backbone
        with open_cache(data / "extract" / host.backbone) as cache:
            missing = lacking(host, cache)
            if missing:
                print(f"note: {name}: left out, the cache has no rows under {missing}; see extract.batchnorm")
                continue
            done.append(name)
            # The record of the cache's extraction beside those of the analysis, so that the page can reckon with both.
            record = Path("runs", "extract", f"{host.backbone}.json")
            if (data / record).exists():
                (out / record).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(data / record, out / record)
            trained = out / "train_classifier" / name
            with timed() as spent:
                summary = train_classifier.run(host, Run(name, trained, chosen, say=print), residency, cache, backbone)
            taken = {clock: round(seconds, 2) for clock, seconds in spent.items()}
            write_run_record(out / "runs" / "train_classifier" / f"{name}.json", {**vars(summary), **taken})
            evaluate.run(section, Run(name, out / "evaluate" / name, chosen, say=print), cache, trained, backbone)
    about = params.build(report.Params, "report", values.get("report", {}))
    if not done:
        raise UserError(f"{out.name}: no host is left; add what the notes name to extract.batchnorm and extract again")
    report.run(about, Run("report", out / "report", say=print), done, out / "evaluate", out / "runs")


def lacking(host: train_classifier.Params, cache: Cache) -> str:
    """The statistics that `host` reads training rows under and the cache has none of, in words; empty if it has all."""
    recipe = RECIPES[host.batchnorm]
    wanted = {recipe.receiver, *(recipe.read_under(d) for d in host.grid.donor)}
    train = cache.rows.filter(pc.field("split") == "train")
    return ", ".join(sorted(wanted - set(train["statistics"].unique().to_pylist())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of {', '.join(sorted(p.stem for p in PRESETS.glob('*.yaml')))}, or a file")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, help="by default DATA/analyses/NAME")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    path = Path(given.name) if given.name.endswith(".yaml") else PRESETS / f"{given.name}.yaml"
    out = given.out or given.data / "analyses" / path.stem
    try:
        analyse(params.load(path, given.set), given.data, out)
    except CacheError as error:
        raise SystemExit(f"error: {error} (the first lines of {path} say which caches it needs)") from None
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

"""replicates: prepare, train_backbone and extract once more for each replicate but 0, from seeds of its own.

Writes the tree of replicate r into the folder `r` (`prepare`, `train_backbone/<name>`, `extract/<name>`), and for each
backbone a file `<name>.json` with the digests of its files by replicate. Stage II depends on that file alone, so a
change of another backbone does not train its classifiers again.

The work is done in `.<name>` beside the output `<name>` and stays there, as hard links to the same files. So a killed
run resumes, and another replicate or backbone leaves finished ones as they are. It can be removed at any time.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from h2t.cache.write.staging import file_sha256
from h2t.pipeline.base import numbers, params, plugins
from h2t.pipeline.base.outputs import fresh_directory, replace_file, write_json
from h2t.pipeline.base.replicates import further, seed_of
from h2t.pipeline.base.run import Run

NUMBER = 2026112601  # other results, another number: docs/numbers.md

#: What stage II reads of a replicate, by the key in `<name>.json`; `{}` is the backbone's name.
READ = {
    "cache": "extract/{}/cache.json",  # holds the digests of the cache's other files
    "backbone": "train_backbone/{}/backbone.safetensors",
    "head": "train_backbone/{}/head.safetensors",
}

SAMPLERS = ("samplers.balanced", "samplers.instance", "samplers.reverse")  # those that extraction draws batches by


def run(values: Mapping[str, Any], run: Run, inputs: Path) -> dict[str, int]:
    """Writes the further replicates of the checked parameters `values` into the directory `run.out`.

    `inputs`: the directory that stage `inputs` wrote; if it is missing, files from outside are not watched. Raises what
    the stages raise.
    """
    work = run.out.with_name(f".{run.out.name}")
    names = list(values["backbones"])
    replicates = [_Replicate(values, run, number, work / str(number), inputs) for number in further(values)]
    for replicate in replicates:
        replicate.make()
    with fresh_directory(run.out) as into:
        for replicate in replicates:
            for part in ("prepare", *(f"{stage}/{name}" for stage in ("train_backbone", "extract") for name in names)):
                shutil.copytree(replicate.folder / part, into / str(replicate.number) / part, copy_function=_link)
        for name in names:
            write_json(into / f"{name}.json", {str(r.number): r.digests(name) for r in replicates})
    for path in work.iterdir() if work.is_dir() else ():
        if path not in {replicate.folder for replicate in replicates}:
            shutil.rmtree(path)
    return {"replicates": len(replicates)}


def _link(source: str, target: str) -> None:
    """A hard link, or a copy where the file system has none: files of outputs are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@dataclass(frozen=True)
class _Replicate:
    """The replicate `number`, whose outputs lie in `folder`."""

    values: Mapping[str, Any]
    run: Run
    number: int
    folder: Path
    inputs: Path

    def make(self) -> None:
        """Runs the stages whose outputs are missing or of other parameters, data or code."""
        from h2t.pipeline.stages import prepare

        section = params.build(prepare.Params, "prepare", self.values["prepare"])
        dataset = plugins.load("datasets", section.dataset)
        made_of = {
            "section": section.model_dump(mode="json"),
            "inputs": self._input("prepare"),
            **_made_of(["prepare"], datasets=dataset),
        }
        self._once("prepare", made_of, lambda run: prepare.run(section, run))
        for name in self.values["backbones"]:
            self._make_backbone(name)

    def _make_backbone(self, name: str) -> None:
        from h2t.pipeline.data.samples import load_samples
        from h2t.pipeline.stages import extract, train_backbone

        entry = params.build(train_backbone.Params, f"backbones.{name}", self.values["backbones"][name])
        settings = params.build(extract.Params, "extract", self.values["extract"])
        settings = settings.model_copy(update={"statistics_from": None})  # those of another backbone
        dataset = plugins.load("datasets", self.values["prepare"]["dataset"])
        arch = plugins.load("backbones", entry.arch)
        objective = plugins.load("objectives", entry.objective)
        samples = load_samples(self.folder / "prepare")
        images = samples.images(self.values["prepare"])
        made_of = {
            "entry": entry.model_dump(mode="json"),
            "samples": self._digest("prepare/samples.parquet"),
            "classes": self._digest("prepare/classes.json"),
            "inputs": self._input(f"backbones/{name}"),
            **_made_of(["train_backbone"], datasets=dataset, backbones=arch, objectives=objective),
        }
        trained, cache = f"train_backbone/{name}", f"extract/{name}"
        self._once(trained, made_of, lambda run: train_backbone.run(entry, run, samples, images))
        made_of = {
            "section": settings.model_dump(mode="json", exclude={"cluster"}),
            "samples": made_of["samples"],
            "classes": made_of["classes"],
            "backbone": self._digest(f"{trained}/backbone.safetensors"),
            **_made_of(["extract", *SAMPLERS], datasets=dataset, backbones=arch),
        }
        self._once(cache, made_of, lambda run: extract.run(settings, run, samples, images, self.folder / trained))

    def digests(self, name: str) -> dict[str, str]:
        """The digests of what stage II reads of the backbone `name`."""
        return {key: self._digest(path.format(name)) for key, path in READ.items()}

    def _once(self, part: str, made_of: Mapping[str, Any], stage: Callable[[Run], Any]) -> None:
        """Runs `stage` for the output `part`, unless it is there and was made of the same.

        An unfinished output of the stage, which lies beside its place, is the stage's own to resume or to drop.
        """
        out, seed = self.folder / part, seed_of(self.run.seed, self.number)
        note = out.with_name(f".{out.name}.made")
        text = json.dumps({"seed": seed, **made_of}, sort_keys=True)
        if out.is_dir() and note.is_file() and note.read_text(encoding="utf-8") == text:
            return
        note.unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)

        def say(line: str) -> None:
            self.run.say(f"replicate {self.number}: {line}")

        stage(replace(self.run, name=out.name, out=out, seed=seed, say=say))
        partial = note.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        replace_file(partial, note)

    def _input(self, stage: str) -> str:
        """The digests of the files from outside that `stage` reads, as stage `inputs` wrote them."""
        path = self.inputs / f"{stage}.json"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _digest(self, part: str) -> str:
        return file_sha256(self.folder / part)


def _made_of(keys: list[str], **used: ModuleType) -> dict[str, Any]:
    """The numbers of stages and plug-ins: `keys`, and by kind the plug-ins in use."""
    built_in = numbers.built_in()
    return {
        "numbers": {key: built_in[key] for key in keys}
        | {kind: [module.__name__, numbers.of_plugin(kind, module)] for kind, module in used.items()}
    }

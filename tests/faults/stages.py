"""The seven commands of the pipeline on presets/tiny.yaml, and folders in which one of them can run."""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "presets" / "tiny.yaml"
BACKBONE, HOST = "ce_mixup", "dr"


@dataclass(frozen=True)
class Stage:
    """A command as dvc.yaml gives it: what it reads and what it writes, below `data/`.

    `other` makes a whole output of other content: what stood there before. Caches are replaced when asked to only.
    """

    name: str
    arguments: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str
    other: tuple[str, ...] = ()

    @property
    def record(self) -> tuple[str, ...]:
        return ("--record", f"data/runs/{self.name}/record.json")


def _stages() -> dict[str, Stage]:
    backbone, cache, pooled = f"train_backbone/{BACKBONE}", f"extract/{BACKBONE}", f"pool/{BACKBONE}"
    heads, evaluated = f"train_classifier/{HOST}", f"evaluate/{HOST}"

    def stage(name: str, named: str, reads: tuple[str, ...], writes: str, other: tuple[str, ...] = ()) -> Stage:
        command = (name.replace("_", "-"), *filter(None, [named]), *(f"data/{path}" for path in (*reads, writes)))
        return Stage(name, command, reads, writes, other)

    return {
        s.name: s
        for s in (
            stage("prepare", "", (), "prepare"),
            stage("train_backbone", BACKBONE, ("prepare",), backbone),
            stage("extract", BACKBONE, ("prepare", backbone), cache, ("--set", "extract.codec=zstd")),
            stage("pool", BACKBONE, (cache,), pooled, ("--set", "pool.codec=zstd")),
            stage("train_classifier", HOST, (cache, backbone), heads),
            stage("evaluate", HOST, (cache, heads, backbone), evaluated),
            Stage("report", ("report", "data/evaluate", "data/report"), (evaluated,), "report"),
        )
    }


STAGES = _stages()


def tree(root: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file below `root`; run records, which depend on the hour, are left out."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith("runs/"):
            found[name] = path.read_bytes()
    return found


def litter(data: Path) -> list[str]:
    """What no stage should leave behind: hidden names (staging, partial outputs) and unfinished files."""
    return [p.name for p in data.rglob("*") if p.name.startswith(".") or ".partial" in p.name]


def furnish(folder: Path, stage: Stage, whole: Path) -> None:
    """The folder in which `stage` can run: parameters and copies of what it reads."""
    shutil.copy(whole / "params.yaml", folder / "params.yaml")
    for name in stage.reads:
        shutil.copytree(whole / "data" / name, folder / "data" / name)

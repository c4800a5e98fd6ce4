"""Every stage undisturbed: the outputs to compare with, how long each works, and older outputs to begin over."""

import gc
import importlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from process import COLD, Command, Measured
from stages import PRESET, STAGES, Stage, furnish, tree


class Undisturbed:
    """Runs every stage twice, in order, in `folder`; what the first round imports, the second has from its start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.whole = folder / "whole"
        self.warm: dict[str, Measured] = {}
        self._cold: dict[str, Measured] = {}
        self._old: dict[str, Path] = {}
        self.whole.mkdir(parents=True)
        shutil.copy(PRESET, self.whole / "params.yaml")
        for stage in STAGES.values():
            for module in self._run(stage, self.whole).modules:
                with suppress(Exception):  # some are loadable in the place alone where they are needed
                    importlib.import_module(module)
        gc.freeze()  # forks share what is never looked at
        self.outputs = {s.name: tree(self.whole / "data" / s.writes) for s in STAGES.values()}
        for stage in STAGES.values():
            with self._furnished(stage) as work:
                command = self._run(stage, work)
                assert tree(work / "data" / stage.writes) == self.outputs[stage.name], f"{stage.name}: not repeatable"
            self.warm[stage.name] = command.measured

    def cold(self, stage: Stage) -> Measured:
        """The same in a new interpreter, which must give the same bytes."""
        if stage.name not in self._cold:
            with self._furnished(stage) as work:
                command = self._run(stage, work, cold=COLD)
                assert tree(work / "data" / stage.writes) == self.outputs[stage.name], f"{stage.name}: cold differs"
            self._cold[stage.name] = Measured(command.seconds)
        return self._cold[stage.name]

    def old(self, stage: Stage) -> Path:
        """Another whole output of `stage`, as an earlier run may have left it."""
        if stage.name not in self._old:
            kept = self._folder / "old" / stage.name
            if stage.other:
                with self._furnished(stage) as work:
                    self._run(stage, work, *stage.other)
                    shutil.copytree(work / "data" / stage.writes, kept)
            else:
                shutil.copytree(self.whole / "data" / stage.writes, kept)
                for path in [p for p in kept.rglob("*") if p.is_file()]:
                    path.write_bytes(b"an older output: " + path.read_bytes())
            assert tree(kept) != self.outputs[stage.name]
            self._old[stage.name] = kept
        return self._old[stage.name]

    def _run(self, stage: Stage, work: Path, *more: str, cold: Sequence[str] | None = None) -> Command:
        command = Command((*stage.arguments, *stage.record, *more), work, self._folder / "log", cold=cold)
        code = command.wait()
        assert code == 0, f"{stage.name}, undisturbed: exit {code}\n{command.errors}"
        return command

    @contextmanager
    def _furnished(self, stage: Stage) -> Iterator[Path]:
        work = self._folder / "work"
        work.mkdir()
        furnish(work, stage, self.whole)
        try:
            yield work
        finally:
            shutil.rmtree(work)

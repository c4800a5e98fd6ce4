"""Trains the classifiers of a task in several processes, each a share of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import torch

from h2t.pipeline.base import clock, progress
from h2t.pipeline.base.device import choose
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.run import silent
from h2t.pipeline.base.side_by_side import side_by_side
from h2t.pipeline.base.text import counted
from h2t.pipeline.heads.parts import shares_of
from h2t.pipeline.heads.residency import host_room
from h2t.pipeline.heads.stored import Heads, load_heads
from h2t.pipeline.heads.task import Diverged, Made, Summary, Task, backbone_start, table, together, train_task
from h2t.pipeline.heads.training import Trained, joined
from h2t.pipeline.networks.trained import HEAD, save_head
from h2t.pipeline.training.resume import Checkpoint


def train_spread(task: Task) -> Made:
    """Trains the classifiers of `task` here, or in the processes that its residency asks for.

    Those of a closed-form fit are always trained here.
    """
    run, heads = task.run, task.heads
    one_process = task.params.kind.fitted
    shares = shares_of(heads, 1 if one_process else task.residency.processes)
    if len(shares) == 1:
        return train_task(task)
    devices = devices_of(run.device, len(shares))
    run.say(f"{run.name}: {counted(len(heads), 'classifier')} in {len(shares)} processes")
    clock.begins("training")
    with TemporaryDirectory(prefix="h2t-start-") as folder:
        start = Path(folder)
        # Once for all: fitting a probe can take as long as training.
        save_head(start / HEAD, backbone_start(task), {})
        return _train(task, shares, devices, start)


def _train(task: Task, shares: Sequence[Sequence[int]], devices: Sequence[str], start: Path) -> Made:
    """Trains each share in a process of its own and puts the classifiers together."""
    run, heads = task.run, task.heads
    jobs = [
        _Share(
            replace(
                task,
                start=start,
                run=replace(run, out=share_of(run.out, number, len(shares)), say=silent, chosen=None),
                heads=[heads[place] for place in share],
                host=host_room() // len(shares),
            ),
            devices[number],
            max(1, torch.get_num_threads() // len(shares)),
        )
        for number, share in enumerate(shares)
    ]
    try:
        summary = together(side_by_side(jobs, "train_classifier.processes"))
    except Diverged:
        Checkpoint(run.out, "").clear()  # of all shares: the others may have met the same maps
        raise
    first = load_heads(jobs[0].task.run.out)
    trained = joined(shares, (job.trained() for job in jobs))
    lines = table(heads, [h.replaced(task.cache.spec.maps[0][0]) for h in heads], first.about)
    return Made(Heads(trained.state, lines, first.about, first.frozen), trained.history, summary)


def share_of(out: Path, number: int, of: int) -> Path:
    """Where a share of the heads of output `out` is written, inside the folder of its unfinished training."""
    return Checkpoint(out, "").folder / f"share-{number + 1}-of-{of}"


def devices_of(device: torch.device, count: int) -> list[str]:
    """The device of each of `count` processes: the CPU, or a GPU of its own. Raises UserError if there are fewer."""
    if device.type == "cpu":
        return ["cpu"] * count
    there = torch.cuda.device_count() if device.index is None else 1
    if count > there:
        more = "" if device.index is None else ", or set device: cuda to use all GPUs"
        raise UserError(
            f"train_classifier.processes: must be at most {there}, one for each GPU in use; {count} would be needed; "
            f"lower it{more}"
        )
    return [f"cuda:{number}" for number in range(count)]


@dataclass(frozen=True)
class _Share:
    """The training of some of the classifiers in a process of its own, on `device`, with so many `threads` of torch."""

    task: Task
    device: str
    threads: int

    def __call__(self) -> Summary:
        """Trains the classifiers and writes them to `task.run.out`."""
        torch.set_num_threads(self.threads)
        run = replace(self.task.run, chosen=choose(self.device))
        with progress.hidden(True):  # the bars of several processes would overwrite each other
            made = train_task(replace(self.task, run=run))
        with fresh_directory(run.out) as into:
            made.write(into)
        return made.summary

    def trained(self) -> Trained:
        """The classifiers that were written."""
        out = self.task.run.out
        return Trained(load_heads(out).state, pq.ParquetFile(out / "history.parquet").read())

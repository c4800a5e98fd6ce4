"""train_classifier (stage II): trains all classifiers of one host, the combinations of its grid, on the cached maps.

Writes `heads.safetensors` (each parameter stacked over the classifiers), `heads.parquet` (a line per classifier with
its settings; the host's settings in the schema's metadata), `history.parquet` (loss per classifier and epoch) and, with
`folds`, `folds.parquet` (how well each setting does on held-out training samples).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.outputs import fresh_directory
from h2t.pipeline.base.replicates import seed_of
from h2t.pipeline.base.run import Run, silent
from h2t.pipeline.base.text import counted
from h2t.pipeline.evaluation.folds import FOLDS, cross_validate
from h2t.pipeline.extraction.recipes import RECIPES
from h2t.pipeline.heads.host_entry import Params as Params  # every stage module has its `Params`
from h2t.pipeline.heads.host_entry import check_grid, check_start, heads_of
from h2t.pipeline.heads.replicate import Replicate
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.heads.setting import HeadSetting
from h2t.pipeline.heads.spread import train_spread
from h2t.pipeline.heads.start import check_backbone
from h2t.pipeline.heads.stored import Heads
from h2t.pipeline.heads.task import Made, Summary, Task, together
from h2t.pipeline.networks.trained import load_head
from h2t.pipeline.training.resume import Checkpoint

NUMBER = 2026112601  # other results, another number: docs/numbers.md


def run(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    further: Sequence[Replicate] = (),
) -> Summary:
    """Trains all classifiers of host `run.name` and writes them into the directory `run.out`.

    Those of `further` replicates, with seeds of their own, go to `replicates/r` inside it. An interrupted run resumes
    from its last saved step. Raises UserError for settings or caches that do not fit.
    """
    replicates = [Replicate(0, cache, backbone_dir), *further]
    with _named(f"hosts.{run.name}"):
        done = [_replicate(params, run, residency, replicate) for replicate in replicates]
    with fresh_directory(run.out) as into:
        for replicate, found in zip(replicates, done, strict=True):
            found.write(replicate.inside(into))
    for replicate in replicates:
        place = _place(run, replicate)
        for number in range(params.folds or 0):
            Checkpoint(_out_of_fold(place, number), "").clear()
        Checkpoint(place, "").clear()
    return together([each.made.summary for each in done])


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of one host among many name its entry, `where`."""
    try:
        yield
    except UserError as error:
        if where in str(error):
            raise
        raise UserError(f"{where}: {error}") from error


@dataclass(frozen=True)
class _Replicate:
    """What is written for one replicate. `folds`: what cross-validation found, if there was one."""

    made: Made
    folds: pa.Table | None

    def write(self, into: Path) -> None:
        """Writes the stage's files into the directory `into`, which is made if need be."""
        self.made.write(into)
        if self.folds is not None:
            pq.write_table(self.folds, into / FOLDS)


def _replicate(params: Params, run: Run, residency: Residency, replicate: Replicate) -> _Replicate:
    """Trains the classifiers of one replicate; only their unfinished training is written."""
    cache, backbone_dir = replicate.cache, replicate.backbone
    kind = params.kind
    if replicate.number:
        said = run.say
        if not kind.fitted:
            seeds = [seed_of(seed, replicate.number) for seed in params.grid.seed]
            params = params.model_copy(update={"grid": params.grid.model_copy(update={"seed": seeds})})
        run = replace(run, out=_place(run, replicate), say=lambda line: said(f"replicate {replicate.number}: {line}"))
    check_backbone(cache, backbone_dir)
    params = _with_recipe(params, run.name, cache)
    own_head = load_head(backbone_dir)
    head = own_head.about.get("head", "trained" if own_head.state else "none")
    check_start(params, run.name, head)
    settings = heads_of(params.grid, params.rounding, fitted=kind.fitted)
    check_grid(params, run.name, cache, settings)
    folds = _cross_validated(params, run, residency, cache, backbone_dir, settings, head) if params.folds else None
    made = train_spread(Task(params, run, residency, cache, backbone_dir, settings))
    epochs = params.optimiser.epochs
    outcome = counted(len(settings), "classifier") + " fitted" if kind.fitted and len(settings) > 1 else "fitted"
    run.say(f"{run.name}: {outcome if kind.fitted else _outcome(made.history, epochs, len(settings))}")
    return _Replicate(made, folds)


def _place(run: Run, replicate: Replicate) -> Path:
    """The place whose neighbour holds the unfinished training of a replicate: the output itself for replicate 0."""
    return run.out.with_name(f"{run.out.name}.replicate-{replicate.number}") if replicate.number else run.out


def _out_of_fold(out: Path, number: int) -> Path:
    """The place whose neighbour holds the unfinished training of a fold; nothing is written to the place itself."""
    return out.with_name(f"{out.name}.fold-{number}")


def _cross_validated(
    params: Params,
    run: Run,
    residency: Residency,
    cache: Cache,
    backbone_dir: Path,
    settings: list[HeadSetting],
    head: str,
) -> pa.Table:
    """How well each setting does on held-out training samples, as `evaluation.folds` describes."""
    assert params.folds is not None
    recipe, kind = RECIPES[params.batchnorm], params.kind
    under = [recipe.read_under(params.receiver or kind.receiver)]
    if not kind.fitted:
        under += [recipe.read_under(donor) for donor in params.grid.donor]
    tried = [(number, s) for number, s in enumerate(settings) if kind.fitted or s.seed == params.grid.seed[0]]
    run.say(f"{run.name}: cross-validation of {counted(len(tried), 'setting')} in {params.folds} folds")
    if head == "trained":
        run.say(
            f"note: {run.name}: stage I was trained on the samples that are held out here, so they look easier than "
            "new ones; where there are enough images, choose on validation images"
        )

    def train_on(rows: pa.Table, fold: int) -> Heads:
        quiet = replace(run, out=_out_of_fold(run.out, fold), say=silent)
        return train_spread(Task(params, quiet, residency, cache, backbone_dir, [s for _, s in tried], rows)).heads

    numbers = [number for number, _ in tried]
    return cross_validate(cache, list(dict.fromkeys(under)), params.folds, numbers, train_on, run.device)


def _with_recipe(params: Params, name: str, cache: Cache) -> Params:
    """The parameters with recipe `stage1` if the cache holds no other statistics and no other recipe is asked for.

    Raises UserError if one is.
    """
    if params.batchnorm == "stage1" or cache.index.statistics() != ["stage1"]:
        return params
    if "batchnorm" in params.model_fields_set:
        raise UserError(
            f"hosts.{name}.batchnorm: must be stage1, the only statistics in {cache.files}; got {params.batchnorm}; "
            "set it to stage1 or, if the backbone has batch norm, add the recipe to extract.batchnorm and extract again"
        )
    return params.model_copy(update={"batchnorm": "stage1"})


def _outcome(history: pa.Table, epochs: int, heads: int) -> str:
    """What was trained, in words, for the terminal."""
    final = history["loss"].slice(len(history) - heads).to_pylist()
    trained = f"{counted(heads, 'classifier')}, {counted(epochs, 'epoch')}"
    return f"{trained}, final loss {min(final):.3f} to {max(final):.3f}"

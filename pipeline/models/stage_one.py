"""Stage I's own classifier as a stack of one head, so that it is exported like any other.

Logit adjustment with tau 0 changes nothing: its logits are those of stage I, or of the probe that stands for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from h2t.cache.reader import Cache
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.params import build
from h2t.pipeline.base.run import Run
from h2t.pipeline.heads.residency import Residency
from h2t.pipeline.stages import train_classifier


def is_asked(heads_dir: Path, backbone_dir: Path) -> bool:
    """Whether the backbone's folder is named in place of a host's. Raises UserError for that of another classifier."""
    if heads_dir.resolve() == backbone_dir.resolve():
        return True
    if all((heads_dir / f"{name}.safetensors").exists() for name in ("backbone", "head")):
        raise UserError(
            f"{heads_dir}: must be a folder that train-classifier wrote; got one with a classifier of stage I; to "
            f"export that, name {backbone_dir} in its place"
        )
    return False


@contextmanager
def as_heads(run: Run, cache: Cache, backbone_dir: Path) -> Iterator[Path]:
    """A folder, for as long as the context lasts, that holds stage I's classifier as train_classifier would write it.

    Raises UserError if the backbone has no classifier.
    """
    entry = {"host": "logit_adjustment", "backbone": "stage1", "batchnorm": "stage1", "loss": {"tau": 0.0}}
    with TemporaryDirectory(prefix="h2t-") as folder:
        out = Path(folder) / "stage1"
        own = Run("stage1", out, run.device, run.seed)
        train_classifier.run(build(train_classifier.Params, "stage1", entry), own, Residency(), cache, backbone_dir)
        yield out

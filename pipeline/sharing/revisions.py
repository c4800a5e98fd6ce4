"""Evaluated hosts of a revision of the repository here, by DVC: what its `dvc.lock` names, from cache or remote."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.sharing.repository import in_one_line, repository

EVALUATED = "data/evaluate"


@contextmanager
def evaluated(place: str) -> Iterator[Path]:
    """The folder that `place` names or, where there is none of that name, what the revision `place` has evaluated.

    A revision is whatever DVC knows: a commit, a branch, a tag, an experiment of `dvc exp run`. Its files lie in a
    temporary directory until the block ends. Raises UserError.
    """
    if Path(place).exists():
        yield Path(place)
        return
    from dvc.fs import download
    from dvc.repo import Repo
    from dvc.scm import RevError, resolve_rev

    root = repository(Path.cwd())
    with tempfile.TemporaryDirectory(prefix="h2t-revision-") as scratch:
        into = Path(scratch) / "evaluate"
        with in_one_line(f"revision {place}"):
            with Repo.open(str(root)) as here:
                try:
                    commit = resolve_rev(here.scm, place)
                except RevError as error:
                    if str(error).startswith("ambiguous"):
                        raise UserError(
                            f"{place}: several experiments have this name; check out the commit that the one you mean "
                            "was run on, or give the commit of its own (git for-each-ref refs/exps)"
                        ) from None
                    raise UserError(f"{place}: is neither a folder nor a revision of {root.name}") from None
            # An index of our own: a shared one can be damaged by others.
            with Repo.open(str(root), rev=commit, config={"core": {"site_cache_dir": f"{scratch}/site"}}) as repo:
                try:
                    download(repo.dvcfs, EVALUATED, str(into))
                except FileNotFoundError:
                    raise UserError(
                        f"{place}: has no {EVALUATED} here or at the remote; where it was made, dvc repro, commit "
                        "dvc.lock and dvc push"
                    ) from None
        yield into

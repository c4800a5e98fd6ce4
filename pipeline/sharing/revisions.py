"""Fetches the evaluated hosts of another revision of this repository, from DVC's cache or the remote."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.sharing.repository import dvc_folder, in_one_line, repository

EVALUATED = "data/evaluate"


@contextmanager
def evaluated(place: str) -> Iterator[Path]:
    """The folder `place` or, if there is no such folder, a folder with the evaluated hosts of the revision `place`.

    A revision is a commit, a branch, a tag or an experiment of `dvc exp run`. Its files are in a temporary directory,
    which is removed when the block ends. Raises UserError if `place` is neither, or its files cannot be fetched.
    """
    if Path(place).exists():
        yield Path(place)
        return
    from dvc.fs import download
    from dvc.repo import Repo
    from dvc.scm import RevError, resolve_rev

    root = repository(Path.cwd())
    top = dvc_folder(root).parent
    with tempfile.TemporaryDirectory(prefix="h2t-revision-") as scratch:
        into = Path(scratch) / "evaluate"
        with in_one_line(f"revision {place}"):
            with Repo.open(str(top)) as here:
                try:
                    commit = resolve_rev(here.scm, place)
                except RevError as error:
                    if str(error).startswith("ambiguous"):
                        raise UserError(
                            f"{place}: several experiments have this name; give the experiment's commit "
                            "(git for-each-ref refs/exps), or check out the commit it was run on"
                        ) from None
                    raise UserError(
                        f"{place}: neither a folder nor a revision of {root.name}; give a folder, commit, branch, tag "
                        "or experiment"
                    ) from None
            # With its own index: a shared one can be damaged by other processes.
            with Repo.open(str(top), rev=commit, config={"core": {"site_cache_dir": f"{scratch}/site"}}) as repo:
                try:
                    download(repo.dvcfs, str(root.relative_to(top) / EVALUATED), str(into))
                except FileNotFoundError:
                    raise UserError(
                        f"{place}: has no {EVALUATED}, neither in DVC's cache here nor at the remote; where it was "
                        "made, type dvc repro, commit dvc.lock, and type dvc push"
                    ) from None
        yield into

"""A cache in a DVC repository at a revision, read by ranges from the DVC remote, without downloading it whole.

    open_cache("dvc+https://example.org/lab/project.git@v1#data/extract/ce_mixup")

Git gives the output at that path and DVC the object of each file in its remote; the objects are then read like files
behind any URL. DVC's own file system is not used: it cannot read ranges of cached files, and simultaneous readers
damage its index.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

from h2t.cache.errors import CacheError
from h2t.cache.read.remote import RemoteFiles
from h2t.cache.redaction import without

PREFIX = "dvc+"
MAX_LISTING_BYTES = 32 * 1024**2  # enough for a directory of 250,000 files
DIRECTORY = ".dir"  # the end of DVC's digest of a directory


def split_revision(text: str) -> tuple[str, str | None]:
    """(URL, revision or None) of `URL[@REV]`; an @ in git@host:... or https://user@host/... starts no revision."""
    url, at, rev = text.rpartition("@")
    if at and rev and not re.search(r"[/:\\]", rev):
        return url, rev
    return text, None


class Address(NamedTuple):
    """A directory in a git repository at a revision; None is the head of the default branch."""

    repository: str
    revision: str | None
    path: str


def parse_address(text: str) -> Address:
    """The address in `dvc+REPOSITORY[@REVISION]#PATH`. Raises ValueError."""
    repository, _, path = text.removeprefix(PREFIX).partition("#")
    url, revision = split_revision(repository)
    path = path.strip("/")
    if not url or not path:
        raise ValueError(
            "address: dvc+REPOSITORY[@REVISION]#PATH expected, as in dvc+https://host/lab.git@v1#data/extract/NAME"
        )
    return Address(url, revision, path)


class DvcFiles(RemoteFiles):
    """The files below a path of a DVC repository at a revision, read as objects of its remote."""

    def _start(self, url: str) -> None:
        super()._start(url)
        self.digests: Mapping[str, str] = {}  # name of a file -> its md5
        self.most_bytes = 0  # no file is longer: the size of the whole output, as dvc.lock records it
        self._place_of: Any = None

    @classmethod
    def of(cls, repo: Any, url: str, path: str) -> Self:
        """The files below `path` of the open DVC repository `repo`, which `url` names. Raises CacheError."""
        files = cls.__new__(cls)
        files._start(f"{PREFIX}{url}#{path}")
        files._look_up(repo, path)
        return files

    def _connect(self) -> None:
        from dvc.repo import Repo

        address = parse_address(self._given)
        try:
            with tempfile.TemporaryDirectory(prefix="h2t-index-") as scratch:  # other readers can damage a shared index
                where, config = address.repository, {"core": {"site_cache_dir": scratch}}
                with Repo.open(where, rev=address.revision, subrepos=True, uninitialized=True, config=config) as repo:
                    self._look_up(repo, address.path)
        except CacheError:
            raise
        except Exception as error:  # noqa: BLE001 - git, DVC and every protocol raise their own exceptions
            said = without(" ".join(str(error).split())[:300], self._secrets) or type(error).__name__
            raise CacheError(
                "unreachable", f"{self._url}: cannot be looked up ({said}); check the address and your access"
            ) from None

    def _look_up(self, repo: Any, path: str) -> None:
        """Connects to the remote of the output that contains `path`, and finds the object of each file below `path`."""
        out, inside = _output(repo, path)
        digest = out.hash_info.value
        if not digest.endswith(DIRECTORY):
            raise CacheError("missing", f"{path}: is a file, but a cache is a directory; check the path")
        odb = repo.cloud.get_remote_odb(out.remote)
        self._store, self._place_of = odb.fs.fs, odb.oid_to_path
        if self.digests:  # another process keeps the files that were opened, even if the branch has moved
            return
        size = out.meta.size if out.meta else None
        self.most_bytes = sys.maxsize if size is None else size
        try:
            place = odb.oid_to_path(digest)
            listing = self._ask(digest, lambda patience: self._at.whole(place, MAX_LISTING_BYTES, patience)).data
        except CacheError as error:
            if error.reason != "missing":
                raise
            raise CacheError(
                "missing", f"{path}: was not published, the remote lacks it; run h2t cache publish in that repository"
            ) from None
        if hashlib.md5(listing, usedforsecurity=False).hexdigest() + DIRECTORY != digest:
            raise CacheError(
                "damaged",
                f"{path}: the list of its files in the remote is not the one recorded; run h2t cache publish --repair "
                "in that repository",
            )
        below = {name: md5 for name, md5 in members(listing).items() if name.startswith(inside)}
        self.digests = {name[len(inside) :]: md5 for name, md5 in below.items()}

    def _opened(self) -> dict[str, Any]:
        return {**super()._opened(), "digests": self.digests, "most_bytes": self.most_bytes}

    def _check_record(self, *, content: bool = False) -> None:
        """Nothing: objects are named by their digest, so another cache has other objects."""

    def names(self) -> set[str]:
        return set(self.digests)

    def listed_sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        return {}  # DVC does not record the sizes of the files in a directory

    def _path(self, name: str) -> str:
        if name not in self.digests:
            raise FileNotFoundError(name)
        return str(self._place_of(self.digests[name]))


def folders(repo: Any, path: str) -> list[str]:
    """Names of the folders directly in `path` that are or hold outputs of the open DVC repository, sorted."""
    inside = (place.removeprefix(f"{path}/") for place in _outputs(repo) if place.startswith(f"{path}/"))
    return sorted({rest.partition("/")[0] for rest in inside})


def of_projects_below(repo: Any, path: str) -> list[str]:
    """Paths of the outputs directly in `path` of projects that have a folder of their own in `repo`, sorted."""
    return sorted(place for place in _outputs(repo) if place.rpartition("/")[0].endswith(f"/{path}"))


def members(listing: bytes) -> dict[str, str]:
    """Name -> md5 of the files of a directory, from DVC's JSON `listing` of it.

    Raises CacheError `damaged` if the listing is invalid or a digest is not an md5, because it becomes part of a path.
    """
    try:
        digests = {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(listing)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError("damaged", f"DVC's list of files: cannot be read ({error}); publish the cache again") from None
    for name, digest in digests.items():
        if not re.fullmatch("[0-9a-f]{32}", digest):
            raise CacheError(
                "damaged", f"DVC's list of files: {name!r} must have an md5; got {digest!r}; publish the cache again"
            )
    return digests


def _outputs(repo: Any) -> dict[str, Any]:
    """Path in the repository -> output, of every output with a recorded digest."""
    return {repo.fs.relpath(out.fs_path, repo.root_dir): out for out in repo.index.outs if out.hash_info.value}


def _output(repo: Any, path: str) -> tuple[Any, str]:
    """The output that contains `path`, and the rest of `path` inside it: empty, or ending with a slash."""
    outputs = _outputs(repo)
    for place, out in outputs.items():
        if path == place:
            return out, ""
        if path.startswith(f"{place}/"):
            return out, f"{path[len(place) + 1 :]}/"
    known = ", ".join(sorted(place for place in outputs if place.startswith(path.split("/")[0]))[:5])
    raise CacheError("missing", f"{path}: not an output of this repository; its outputs: {known or 'none'}")

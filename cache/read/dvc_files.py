"""A cache in a DVC repository at a revision, read from the repository's remote by ranges, without a copy.

    open_cache("dvc+https://example.org/lab/project.git@v1#data/extract/ce_mixup")

Git says which output lies at that path, DVC which object of its remote each file is; the objects are then read like
files behind any URL. Not through DVC's own file system, which cannot read ranges of what is in its cache and keeps an
index that simultaneous readers damage.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from typing import Any, NamedTuple

from h2t.cache.errors import CacheError
from h2t.cache.read.remote import RemoteFiles
from h2t.cache.read.transfer import Pace, Patience, Unasked, read_whole
from h2t.cache.redaction import without

PREFIX = "dvc+"
MAX_LISTING_BYTES = 32 * 1024**2  # 250,000 files of a directory
DIRECTORY = ".dir"  # what DVC's digests of directories end in


def split_revision(text: str) -> tuple[str, str | None]:
    """(URL, revision) of `URL[@REV]`; the @ of git@host:... and of https://user@host/... is none."""
    url, at, rev = text.rpartition("@")
    if at and rev and not re.search(r"[/:\\]", rev):
        return url, rev
    return text, None


class Address(NamedTuple):
    """A directory in a git repository at a revision, None being that of its default branch."""

    repository: str
    revision: str | None
    path: str


def parse_address(text: str) -> Address:
    """The address in `dvc+REPOSITORY[@REVISION]#PATH`. Raises ValueError."""
    repository, _, path = text.removeprefix(PREFIX).partition("#")
    url, revision = split_revision(repository)
    path = path.strip("/")
    if not url or not path:
        raise ValueError("dvc+REPOSITORY[@REVISION]#PATH expected, as in dvc+https://host/lab.git@v1#data/extract/NAME")
    return Address(url, revision, path)


class DvcFiles(RemoteFiles):
    """The files below a path of a DVC repository at a revision, as objects of its remote."""

    def _start(self, url: str) -> None:
        super()._start(url)
        self._places: dict[str, str] = {}

    def _connect(self) -> None:
        address = parse_address(self._given)
        try:
            self._store, places = _resolve(address)
        except CacheError:
            raise
        except Exception as error:  # noqa: BLE001 - git, DVC and every protocol raise their own
            said = without(" ".join(str(error).split())[:300], self._secrets) or type(error).__name__
            raise CacheError("unreachable", f"{self._url}: cannot be looked up ({said})") from None
        if not self._places:  # in another process it is what was opened, whatever a branch names by now
            self._places = places

    def _opened(self) -> dict[str, Any]:
        return {**super()._opened(), "_places": self._places}

    def _check_record(self, *, content: bool = False) -> None:
        """Nothing: objects are named by their digest, so another cache has others."""

    def names(self) -> set[str]:
        return set(self._places)

    def listed_sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Nothing: DVC records no sizes of the files in a directory."""
        return {}

    def _path(self, name: str) -> str:
        try:
            return self._places[name]
        except KeyError:
            raise FileNotFoundError(name) from None


def _resolve(address: Address) -> tuple[Any, dict[str, str]]:
    """The file system of the remote, and for each file below the path, relative to it, its object there."""
    from dvc.repo import Repo

    with tempfile.TemporaryDirectory(prefix="h2t-index-") as scratch:  # a shared index can be damaged by others
        where, config = address.repository, {"core": {"site_cache_dir": scratch}}
        with Repo.open(where, rev=address.revision, subrepos=True, uninitialized=True, config=config) as repo:
            out, inside = _output(repo, address.path)
            odb = repo.cloud.get_remote_odb(out.remote)
            digest = out.hash_info.value
            fs = odb.fs.fs
            if not digest.endswith(DIRECTORY):
                raise CacheError("missing", f"{address.path}: a file, where a cache is a directory")
            try:
                listing = read_whole(fs, odb.oid_to_path(digest), MAX_LISTING_BYTES, Patience(Pace())).data
            except Unasked as error:
                raise CacheError("damaged", f"{address.path}: the remote's list of its files: {error}") from None
            except FileNotFoundError:
                raise CacheError(
                    "missing", f"{address.path}: was not published, the remote lacks it; type there: h2t cache publish"
                ) from None
            if hashlib.md5(listing, usedforsecurity=False).hexdigest() + DIRECTORY != digest:
                raise CacheError("damaged", f"{address.path}: the remote's list of its files is not the one recorded")
            files = {name: odb.oid_to_path(digest) for name, digest in members(listing).items()}
    return fs, {name[len(inside) :]: place for name, place in files.items() if name.startswith(inside)}


def members(listing: bytes) -> dict[str, str]:
    """Name -> md5 of the files of a directory, from DVC's list of them. Raises CacheError, as an md5 becomes a path."""
    try:
        found = {str(entry["relpath"]): str(entry["md5"]) for entry in json.loads(listing)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CacheError("damaged", f"DVC's list of files: cannot be read ({error})") from None
    for name, digest in found.items():
        if not re.fullmatch("[0-9a-f]{32}", digest):
            raise CacheError("damaged", f"DVC's list of files: {name!r} has {digest!r} where an md5 belongs")
    return found


def _output(repo: Any, path: str) -> tuple[Any, str]:
    """The output that holds `path`, and what of `path` lies within it, with a slash behind or empty."""
    held = {repo.fs.relpath(out.fs_path, repo.root_dir): out for out in repo.index.outs if out.hash_info.value}
    for place, out in held.items():
        if path == place:
            return out, ""
        if path.startswith(f"{place}/"):
            return out, f"{path[len(place) + 1 :]}/"
    known = ", ".join(sorted(place for place in held if place.startswith(path.split("/")[0]))[:5])
    raise CacheError("missing", f"{path}: no output of this repository; there are: {known or 'none'}")

"""Files at URLs: tables, lists and images, which are read whole, and Parquet files, of which ranges are read as needed.

No copy is made. A Parquet file is pinned when it is opened: if the server then sends another version, reading raises
CacheError `replaced`. What changed before that is noticed by the digests of images, as on a disk.
"""

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import quote, unquote

import pyarrow as pa

from h2t.cache.errors import CacheError
from h2t.cache.memory import available_memory
from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError

if TYPE_CHECKING:
    from h2t.cache.read.remote import RemoteFiles  # imported where it is used, as it takes long

#: A path, or a URL as text.
Place = Path | str

SIGNS = "*["  # ? begins a query
AT_ONCE = 32  # images that are read at the same time: an answer takes time, and little of the processor's
LARGEST_IMAGE = 2**28  # bytes of an image file; a server may send more than it should
#: Protocol -> the extra that installs its package.
EXTRAS = {"s3": "s3", "s3a": "s3", "ssh": "ssh", "sftp": "ssh", "hf": "huggingface"}


def is_url(place: str | Path) -> TypeGuard[str]:
    """Whether `place` is a URL and not a path."""
    return isinstance(place, str) and "://" in place and not place.startswith("file:")


def name_of(url: str) -> str:
    """The last part of the path in `url`."""
    return posixpath.basename(url.partition("?")[0])


def found(key: str, pattern: str) -> list[str]:
    """The URLs that `pattern`, the value of the parameter `key`, names. Stores that list files take * and [].

    Raises UserError if nothing matches, or for a pattern on a web server, which lists nothing.
    """
    if not any(sign in pattern.partition("?")[0] for sign in SIGNS):
        return [pattern]
    if "?" in pattern:
        raise UserError(f"{key}: {redacted(pattern)}: a pattern at a URL takes * and [], as ? begins a query; got ?")
    if pattern.startswith("http"):
        raise UserError(f"{key}: {redacted(pattern)}: web servers list no files, so name each one; got a pattern")
    from h2t.cache.read.protocols import file_system

    try:
        store, path = file_system(pattern)
        matches = sorted(str(match) for match in store.glob(path))
    except Exception as error:  # noqa: BLE001 - stores raise anything
        raise UserError(f"{key}: {redacted(pattern)}: {_told(error)}; check the URL and your access") from None
    if not matches:
        raise UserError(f"{key}: no file matches {redacted(pattern)}; correct the pattern")
    before = pattern.removesuffix(path)  # the protocol; for SSH also login and host
    return [f"{before}{match}" for match in matches]


def folder(url: str) -> str:
    """The folder of `url`, with the same query."""
    base, sign, query = url.partition("?")
    return f"{base.rpartition('/')[0]}{sign}{query}"


def inside(folder: str, path: str) -> str:
    """The URL of `path` in the folder at the URL `folder`, with the same query."""
    base, sign, query = folder.partition("?")
    return f"{base.rstrip('/')}/{path}{sign}{query}"


def common_folder(urls: Sequence[str]) -> str | None:
    """The URL of the innermost folder that holds all `urls`; None for several servers or queries."""
    parts = [url.partition("?") for url in urls]
    if len({query for _, _, query in parts}) > 1:
        return None
    shared = posixpath.commonprefix([base.rpartition("/")[0].split("/") for base, _, _ in parts])
    return f"{'/'.join(shared)}{''.join(parts[0][1:])}" if len(shared) > 2 else None  # more than ["s3:", ""]


def relative(path: str, root: str, base: str) -> str | None:
    """`path`, which starts from the folder `base` or is a URL below `root`, relative to `root`.

    None if it leads out, or is a URL with a query. Back-slashes separate folders, as in tables from Windows.
    """
    top = root.partition("?")[0].rstrip("/")
    plain = unquote if root.startswith("http") else str  # names are plain text; only URLs of web servers are quoted
    if path.startswith(f"{top}/"):
        if "?" in path:
            return None
        path = plain(path.removeprefix(f"{top}/"))
    else:
        path = posixpath.join(plain(base.partition("?")[0].rstrip("/")[len(top) :].lstrip("/")), path)
    source = posixpath.normpath(path.replace("\\", "/"))
    out = source.startswith(("/", "~", "../")) or source in ("..", ".") or "://" in path or "\0" in source
    return None if out else source


def opened(key: str, url: str) -> tuple[Any, int]:
    """(the file at `url` as a pyarrow file, its size in bytes). Raises UserError, with the parameter `key`."""
    from h2t.cache.read.stored_file import StoredFile

    with _refusals_in_one_line(key, url):
        files, name = _files_of(url)
        size = files.size(name)
    return pa.PythonFile(StoredFile(files, name, size), mode="r"), size


class UrlFile:
    """The file at `url`, named by the parameter `key`, where a Path is expected: `str()` of it stands in messages.

    With `whole` it is read once and kept, else by ranges. Methods raise UserError.
    """

    def __init__(self, key: str, url: str, *, whole: bool = True) -> None:
        self._key, self._url, self._whole = key, url, whole
        self.suffix = posixpath.splitext(name_of(url))[1]

    def __str__(self) -> str:
        return redacted(self._url)

    @cached_property
    def _data(self) -> bytes:
        with _refusals_in_one_line(self._key, self._url):
            files, name = _files_of(self._url)
            return files.read_unpinned(name, available_memory() // 4)

    def read_bytes(self) -> bytes:
        """All bytes."""
        return self._data

    def parquet(self) -> Any:
        """The file as pyarrow reads it."""
        return pa.BufferReader(self._data) if self._whole else opened(self._key, self._url)[0]

    @property
    def digest(self) -> str:
        """sha256 of all bytes."""
        return hashlib.sha256(self._data).hexdigest()


class UrlImages:
    """Reads images below the URL `root`, the value of the parameter `key`, by their path relative to it.

    Calls raise FileNotFoundError for an image that is missing, OSError for one of more than `LARGEST_IMAGE` bytes, and
    UserError if the server fails or refuses: that says nothing about the image, so it is not left out as a bad one.
    """

    at_once = AT_ONCE

    def __init__(self, key: str, root: str) -> None:
        self._key, self._root = key, root
        self._web = root.startswith("http")
        with _refusals_in_one_line(key, root):
            self._files = _remote_files(root)

    def __call__(self, source: str) -> bytes:
        try:
            return self._files.read_unpinned(self._name(source), LARGEST_IMAGE)
        except CacheError as error:
            if error.reason == "missing":
                raise FileNotFoundError from None
            if error.reason == "damaged":  # longer than any image
                raise OSError(str(error)) from None
            raise UserError(f"image {source!r}: {error}") from None

    def exists(self, source: str) -> bool:
        """Whether there is an image. Raises UserError if the server fails or refuses."""
        with _refusals_in_one_line(self._key, self._root):
            return self._files.exists(self._name(source))

    def _name(self, source: str) -> str:
        name = posixpath.normpath(source)
        return quote(name) if self._web else name  # % and ? may be part of a file's name


def _files_of(url: str) -> tuple["RemoteFiles", str]:
    """(the folder of `url`, the name of the file in it)."""
    return _remote_files(folder(url)), url.partition("?")[0].rpartition("/")[2]


def _remote_files(url: str) -> "RemoteFiles":
    from h2t.cache.read.remote import RemoteFiles

    return RemoteFiles(url)


@contextmanager
def _refusals_in_one_line(key: str, url: str) -> Iterator[None]:
    """Turns the errors of a store, and of a package that is missing, into UserError."""
    try:
        yield
    except CacheError as error:
        if error.reason == "missing":
            raise UserError(f"{key}: {redacted(url)}: no such file; correct the URL") from None
        raise UserError(f"{key}: {error}") from None
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0])
        way_out = f"; pip install 'h2t[{extra}]'" if extra else ""
        raise UserError(f"{key}: {redacted(url)}: {_told(error)}{way_out}") from None
    except ValueError as error:
        raise UserError(f"{key}: {redacted(url)}: {_told(error)}") from None


def _told(error: BaseException) -> str:
    return redacted(" ".join(str(error).split())) or type(error).__name__

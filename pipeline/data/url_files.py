"""Files at URLs that images are read from: ranges of them are fetched as they are needed, and no copy is made.

A file is pinned when it is opened: if the server then sends another version, reading raises CacheError `replaced`. A
file that changed before that is noticed by the digests of its images, like a file on a disk.
"""

import posixpath
from pathlib import Path
from typing import Any

import pyarrow as pa

from h2t.cache.redaction import redacted
from h2t.pipeline.base.errors import UserError

SIGNS = "*["  # ? begins a query


def is_url(place: str | Path) -> bool:
    """Whether `place` is a URL and not a path."""
    return isinstance(place, str) and "://" in place


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


def opened(url: str) -> tuple[Any, int]:
    """(the file at `url` as a pyarrow file, its size in bytes).

    Raises CacheError `missing`, `unreachable`, and ValueError or ImportError if the protocol cannot be read.
    """
    from h2t.cache.read.remote import RemoteFiles
    from h2t.cache.read.stored_file import StoredFile

    base, sign, query = url.partition("?")
    folder, _, name = base.rpartition("/")
    files = RemoteFiles(f"{folder}{sign}{query}")
    size = files.size(name)
    return pa.PythonFile(StoredFile(files, name, size), mode="r"), size


def _told(error: BaseException) -> str:
    return redacted(" ".join(str(error).split())) or type(error).__name__

"""Which version of each remote file an open cache belongs to, so that reads never mix two caches."""

import warnings

from h2t.cache.errors import CacheError, CacheWarning
from h2t.cache.format.spec import RECORD, sha256
from h2t.cache.read.transfer import Version


class Pins:
    """The first version seen of each file below `url`; any other raises CacheError `replaced`.

    `record`: sha256 of the commit record, once it was read. `placed`: files whose pinned version is known to belong to
    it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.versions: dict[str, Version] = {}
        self.record: str | None = None
        self.placed: set[str] = set()

    def copy(self) -> "Pins":
        """The same pins, to be sent to another process while threads add to these."""
        same = Pins(self.url)
        same.versions, same.record, same.placed = dict(self.versions), self.record, set(self.placed)
        return same

    def known(self, name: str) -> bool:
        """True if a replaced `name` would have another version."""
        return self.versions.get(name, Version()).known

    def pin(self, name: str, version: Version) -> None:
        """Remembers the version of `name`. Raises CacheError `replaced` if it is not the one remembered."""
        held = self.versions.setdefault(name, version)
        if held.differs(version):
            raise self.replaced(f"{name} has another version than before")
        if version.known and not held.known:
            self.versions[name] = version

    def pin_record(self, data: bytes, version: Version) -> None:
        """Remembers the commit record. Raises CacheError `replaced` if it is not the one remembered."""
        digest = sha256(data)
        if self.record is None:
            self.record = digest
            if not version.known:
                warnings.warn(
                    f"{self.url}: the store tells neither ETag nor time of a file; if the cache is replaced while it "
                    "is open, this is noticed only if its bytes do not match",
                    CacheWarning,
                    stacklevel=4,
                )
        elif digest != self.record:
            raise self.replaced(f"{RECORD} differs from the one read before")

    def replaced(self, what: str) -> CacheError:
        """The error for a cache that is no longer the one that was opened."""
        return CacheError("replaced", f"{self.url}: was replaced while it was open ({what}); open the cache again")

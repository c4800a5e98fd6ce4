"""What the reader needs of the files of a cache, whether they are local, behind a URL, or in a DVC remote."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol


class FileStore(Protocol):
    """The files of one cache, by their path relative to it; `str()` of it names the place in messages.

    A store is pinned: once a file was seen, another file in its place is CacheError `replaced`. Stores can be used
    from several threads, in forked processes and after pickling. Every method raises CacheError.
    """

    #: True for a local directory: reads do not wait for a network, and reading again gives the same bytes.
    local: bool

    def expect(self, recorded: Mapping[str, tuple[int, str]]) -> None:
        """Tells the store what the commit record says, name -> (bytes, sha256), the record itself included."""

    def check_record(self) -> None:
        """Raises `replaced` if the commit record is no longer the one that was read.

        Nothing for a store that looks after the first answer for each file.
        """
        return

    def exists(self, name: str) -> bool:
        """True if `name` is a plain file or a link to one; raises `unreachable` if a store does not answer."""

    def size(self, name: str) -> int:
        """Size of `name` in bytes; raises `missing`, `replaced`."""

    def known_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those `names` whose size needs no request of its own; raises `missing`, `replaced`."""

    def listed_sizes(self, names: Iterable[str]) -> dict[str, int | None]:
        """Sizes in bytes from listings of folders, None for a file that its folder's listing lacks.

        Files whose folder cannot be listed are left out; all of them where listing is no faster than `size`.
        """
        return {}

    def names(self) -> set[str]:
        """Every file of the store; empty if it cannot be listed.

        In a local directory also links to folders, which are not followed.
        """

    def read_all(self, name: str, at_most: int) -> bytes:
        """All bytes of `name`; raises `damaged` if there are more than `at_most`, `missing`, `replaced`."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes | memoryview]:
        """For each range (start, stop), its bytes; raises `damaged` if they are not exactly as many as asked for."""

    def forget(self, name: str) -> None:
        """Drops local copies of `name`, whose bytes were wrong, so that it is read from the store again."""
        return

    def after_fork(self) -> None:
        """Resets locks and connections in a forked child; calling it again does nothing."""

    def close(self) -> None:
        """Releases what the store holds open."""

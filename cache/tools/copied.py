"""Copies a cache to a URL, byte by byte and with the commit protocol of `cache.write.remote`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import MAX_RECORD_BYTES, RECORD, sha256
from h2t.cache.reader import Cache
from h2t.cache.write.remote import RemoteShards, RemoteStaging

THREADS = 4  # each holds a shard of one expert


def copied(cache: Cache, url: str, *, replace: bool = False, progress: Callable[[int], None] | None = None) -> int:
    """Copies `cache` to `url` (`s3://` or `ssh://`); returns the number of shards that had to be sent.

    Every file is compared with the commit record before it is sent. A repeated copy sends only the missing shards.
    `progress` is called with the rows of each shard sent. Raises CacheError: `exists`, `busy`, `damaged`,
    `unreachable`, and whatever reading `cache` raises.
    """
    spec, recorded = cache.spec, cache.commit.files
    record = cache.files.read_all(RECORD, MAX_RECORD_BYTES)

    def checked(name: str) -> bytes:
        size, digest = recorded[name]
        data = cache.files.read_all(name, size)
        if sha256(data) != digest:
            raise CacheError("damaged", f"{cache.files}/{name}: sha256 differs from {RECORD}; restore it from a copy")
        return data

    with RemoteStaging(url) as staging:
        if staging.record() == record:
            staging.discard()
            return 0
        if staging.committed() is not None and not replace:
            raise CacheError("exists", f"{staging.target}: holds another cache; remove it or pass --replace")
        shards = RemoteShards(staging, spec, {"copy_of": sha256(record)})

        def send(shard: int) -> None:
            shards.put(shard, (checked(spec.shard_file(expert, shard)) for expert in range(spec.experts)))
            if progress:
                progress(len(spec.shard_range(shard)))

        pending = shards.pending
        with ThreadPoolExecutor(THREADS, "send") as threads:
            list(threads.map(send, pending))
        sources = {name: source for name, (source, _, _) in shards.chosen().items()}
        small = {name: checked(name) for name in recorded if name not in sources}
        staging.publish(sources, small, record, replace=replace)
    return len(pending)

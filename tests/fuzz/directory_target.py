"""A whole cache as a target: JSON with the text of its files (latin-1), and links in the place of some."""

import json
import shutil
import tempfile
from pathlib import Path
from random import Random

import numpy as np
from builders import make_cache, make_rows, tree
from fuzz import mutation
from fuzz.cache_targets import KEYS, mutated_parquet, resealed
from fuzz.oracle import Finding
from fuzz.target import Parse, Target

from h2t.cache.format.spec import sha256
from h2t.cache.reader import open_cache
from h2t.cache.tools.audit import describe
from h2t.cache.tools.verify import verify


def _directory_seeds() -> list[bytes]:
    found = []
    for given in ({}, {"codec": "zstd", "chunk_rows": 2}, {"codec": "blosc-lz4", "maps": ((1, 1, 1), (2, 1, 1))}):
        with tempfile.TemporaryDirectory() as folder:
            make_cache(Path(folder, "c"), rows=make_rows(5), **{"maps": ((2, 1, 1),), **given})
            files = {name: data.decode("latin-1") for name, data in tree(Path(folder, "c")).items()}
            found.append(mutation.as_json({"files": files, "links": {}}))
    return found


LINKS = ["/etc/passwd", "/dev/zero", "/dev/null", ".", "..", "nowhere", "rows.parquet", "/proc/self/mem"]


def _mutated_directory(data: bytes, random: Random) -> bytes:
    body = json.loads(data)
    files, links = body["files"], body["links"]
    name = random.choice(sorted(files))
    changed = files[name].encode("latin-1")
    record = json.loads(files["cache.json"].encode("latin-1"))
    kind = random.random()
    if kind < 0.35:
        files["cache.json"] = resealed(mutation.tree(record, random, KEYS)).decode("latin-1")
        return mutation.as_json(body)
    if kind < 0.45:
        links[name] = random.choice(LINKS)
    elif name.endswith(".parquet"):
        changed = mutated_parquet(changed, random)
    elif "/c." in name and random.random() < 0.7:
        at = random.choice([0, 16, len(changed) // 2])
        changed = changed[:at] + mutation.raw(changed[at:], random)
    elif name.endswith(".json") and name != "cache.json":
        changed = mutation.as_json(mutation.tree(json.loads(changed), random))
    else:
        changed = mutation.raw(changed, random)
    files[name] = changed.decode("latin-1")
    if random.random() < 0.8 and name in record["files"]:  # a consistent lie
        size = 0 if name in links and random.random() < 0.5 else len(changed)
        record["files"][name] = {"bytes": size, "sha256": sha256(changed)}
        files["cache.json"] = resealed(record).decode("latin-1")
    return mutation.as_json(body)


def _open_directory(folder: Path) -> Parse:
    place = folder / "cache"

    def parse(data: bytes) -> object:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        body = mutation.from_json(data)
        files, links = (body.get(k) if isinstance(body, dict) else None for k in ("files", "links"))
        for name, text in (files if isinstance(files, dict) else {}).items():
            target = place / name
            if (
                not isinstance(text, str)
                or not target.resolve().is_relative_to(place)
                or len(name) > 200
                or "\0" in name
            ):
                continue
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(links, dict) and isinstance(links.get(name), str) and links[name] in LINKS:
                    target.symlink_to(links[name])
                else:
                    target.write_bytes(text.encode("latin-1", errors="replace"))
            except (OSError, UnicodeEncodeError):
                continue
        if len(data) % 16 == 0:
            for fault in verify(str(place)):
                if not str(fault).isprintable():
                    raise Finding(f"a fault of more than one line: {str(fault)[:200]!r}")
        with open_cache(place) as cache:
            describe(cache)
            if cache.spec.value_bytes < 2**20:
                for expert in range(min(cache.experts, 3)):
                    cache.read(np.arange(cache.spec.rows), expert=expert)
            return cache.statistics

    return parse


TARGETS = [
    Target(
        "directory",
        "cache/reader.py: open_cache, read",
        _open_directory,
        _directory_seeds,
        mutation.mostly(_mutated_directory, 0.98),
        65536,
    )
]

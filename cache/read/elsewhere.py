"""A directory that stands for a cache elsewhere: it holds one small file with that cache's URL and fingerprint.

The pipeline writes one in the place of a cache that it does not extract. To open the directory is to open that cache.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD, CacheSpec

STAND_IN = "elsewhere.json"
MOST_BYTES = 65_536


@dataclass(frozen=True)
class Elsewhere:
    """`url`: path or URL of a cache. `fingerprint`: the one it must have."""

    url: str
    fingerprint: str


def elsewhere(location: str | Path) -> Elsewhere | None:
    """What the local directory `location` stands for; None if it is a cache itself, or a URL.

    Raises CacheError `damaged` if its file cannot be understood, or stands beside a cache.
    """
    text = str(location).removeprefix("file://")
    path = Path(text) / STAND_IN
    if "://" in text or text.startswith("dvc+") or not path.is_file():
        return None
    if (path.parent / RECORD).exists():
        raise CacheError(
            "damaged",
            f"{path.parent}: holds both {RECORD} and {STAND_IN}; remove {STAND_IN} to use the cache here, or {RECORD} "
            "to use the one elsewhere",
        )
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MOST_BYTES))
        if isinstance(found["url"], str) and isinstance(found["fingerprint"], str):
            return Elsewhere(found["url"], found["fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CacheError("damaged", f"{path}: must name the URL and fingerprint of a cache; it does not; run h2t extract")


def check_fingerprint(place: object, spec: CacheSpec, expected: str | None) -> None:
    """Raises CacheError `mismatch` if the cache at `place` has another fingerprint than `expected`, if any is."""
    if expected is not None and spec.fingerprint != expected:
        raise CacheError(
            "mismatch",
            f"{place}: must be the cache with fingerprint {expected[:12]}; got one with {spec.fingerprint}; correct "
            "the URL, or state this fingerprint to use this cache",
        )

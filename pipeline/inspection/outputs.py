"""Checks of `h2t doctor` on the outputs: each file against DVC's cache, each feature cache by its own checksums."""

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from h2t.cache.errors import CacheError
from h2t.cache.format.spec import RECORD
from h2t.pipeline.base.text import counted, some
from h2t.pipeline.inspection.findings import Finding
from h2t.pipeline.sharing import repository


def data(root: Path, known: Collection[str], *, full: bool) -> list[Finding]:
    """Checks each file of each output in dvc.lock, and its DVC object. Skips `known`, the caches already reported."""
    outs = repository.outs(root)
    gone = [out.path for out in outs if not os.path.lexists(root / out.path)]
    findings = []
    if gone:
        findings.append(Finding("data", "fault", f"missing here: {some(gone, 3)}", "dvc repro --pull"))
    store = repository.dvc_cache(root)
    files = 0
    for out in outs:
        if out.path in gone or out.path in known:
            continue
        about = _Output(out, root / out.path, store)
        files += about.examine(full=full)
        if about.faults:
            detail = f"{out.path}: {some(about.faults, 1)}"
            findings.append(Finding("data", "fault", detail, about.remedy, out.path))
    if findings:
        return findings
    how = "every byte compared" if full else "sizes compared"
    detail = f"{counted(len(outs), 'output')} with {counted(files, 'file')}, complete here and in DVC's cache; {how}"
    return [Finding("data", "ok", detail)]


class _Output:
    """One output of dvc.lock: compares its files at `place` with the objects in DVC's cache `store`."""

    def __init__(self, out: repository.Out, place: Path, store: Path) -> None:
        self.out, self.place, self.store = out, place, store
        self.here: list[str] = []  # faults in the workspace
        self.objects: list[str] = []  # faults in DVC's cache

    @property
    def faults(self) -> list[str]:
        """All faults, those in the workspace first."""
        return self.here + self.objects

    @property
    def remedy(self) -> str:
        """The command that repairs the output."""
        if not self.objects:
            return f"dvc checkout {self.out.path}"
        if self.here:
            return f"dvc fetch {self.out.path} && dvc checkout {self.out.path}, or dvc repro"
        return "dvc commit, which stores the files here in DVC's cache again"

    def examine(self, *, full: bool) -> int:
        """Fills the lists of faults and returns the number of files compared."""
        self._dangling()
        members = self._members()
        total = 0
        for name, digest in sorted(members.items()):
            path, stored = self.place / name, self._object(digest)
            size = stored.stat().st_size if stored.is_file() else None
            total += size or 0
            if size is None:
                self.objects.append(f"the DVC object of {name or self.out.path} is missing")
            elif full and _md5(stored) != digest:
                self.objects.append(f"the DVC object of {name or self.out.path} is damaged")
            if not path.is_file():
                if not path.is_symlink():  # `_dangling` reports the link
                    self.here.append(f"{name or 'the file'} is missing")
            elif size is not None and path.stat().st_size != size:
                self.here.append(f"{name or 'the file'} has {path.stat().st_size} bytes, but {size} in DVC's cache")
            elif full and not (size is not None and path.samefile(stored)) and _md5(path) != digest:
                self.here.append(f"{name or 'the file'} has other content than dvc.lock records")
        if not self.objects and members and self.out.size not in (0, total):
            self.objects.append(f"its DVC objects have {total} bytes, but {self.out.size} in dvc.lock")
        return len(members)

    def _dangling(self) -> None:
        """Adds a fault for each link whose target is missing, also for links that dvc.lock does not list."""
        paths = [self.place, *(self.place.rglob("*") if self.place.is_dir() else ())]
        for path in sorted(path for path in paths if path.is_symlink() and not path.exists()):
            name = path.relative_to(self.place).as_posix()
            self.here.append(f"{name} is a link to {path.readlink()}, which does not exist")

    def _members(self) -> dict[str, str]:
        """The md5 of each file, by its path within the output; an output that is one file has the empty path."""
        if not self.out.digest.endswith(".dir"):
            return {"": self.out.digest}
        try:
            listing = json.loads(self._object(self.out.digest).read_bytes())
            return {str(entry["relpath"]): str(entry["md5"]) for entry in listing}
        except FileNotFoundError:
            self.objects.append("its list of files is missing in DVC's cache")
        except (OSError, ValueError, TypeError, KeyError):
            self.objects.append("its list of files in DVC's cache is damaged")
        return {}

    def _object(self, digest: str) -> Path:
        """Where DVC's cache stores the object with this md5."""
        return self.store / "files/md5" / digest[:2] / digest[2:]


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def caches(root: Path, full: bool) -> list[Finding]:
    """Verifies every cache below `data` by its own checksums."""
    from h2t.cache.tools.verify import verify

    findings = []
    places = ("*/*", "replicates/*/*/*")
    for record in sorted(path for place in places for path in (root / "data").glob(f"{place}/{RECORD}")):
        place = record.parent.relative_to(root)
        try:
            faults = [str(fault) for fault in verify(str(record.parent), quick=not full)]
        except (CacheError, OSError) as error:
            faults = [str(error)]
        if faults:
            remedy = f"rm -r {place} && dvc checkout {place}, or dvc repro --pull"
            findings.append(Finding("cache", "fault", f"{place}: {some(faults, 1)}", remedy, str(place)))
        else:
            how = "every byte checked" if full else "quick check; --full reads every byte"
            findings.append(Finding("cache", "ok", f"{place} is sound ({how})"))
    return findings

"""watch: computes the digest of one file or folder that the parameters name under `inputs`.

DVC watches the input and runs this stage again when a file is added, removed or replaced. Later stages depend only on
the digest. So training heads needs no images, and moving the images makes no later stage run again.
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from h2t.cache.sizes import sized
from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.outputs import creating, fresh_file, write_json
from h2t.pipeline.base.run import Say
from h2t.pipeline.base.text import counted

NUMBER = 2026112601  # other results, another number: docs/numbers.md

THREADS = 8  # files read at the same time; helps on network file systems


def run(name: str, inputs: Mapping[str, str], out: Path, say: Say) -> None:
    """Writes the facts about input `name` to the JSON file `out`. Raises UserError if DVC cannot watch the input."""
    if name not in inputs:
        raise UserError(
            f"inputs: no input {name!r}{nearest(name, inputs)}; add it to the parameters: inputs: {{{name}: PATH}}"
        )
    found = facts(name, inputs)
    with creating(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with fresh_file(out) as partial:
            write_json(partial, found)
    say(f"{name}: {counted(found['files'], 'file')}, {sized(found['bytes'])}")


def facts(name: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Reads every file of input `name`. Raises UserError for an input that DVC cannot watch.

    The keys are `files` (their number), `bytes`, `sha256` (over paths and contents), and `also`: the names of other
    inputs that links in this one lead to.
    """
    root = Path(inputs[name])
    paths = sorted(files(name, inputs))
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(_digest, [root / path for path in paths]))
        size = sum((root / path).stat().st_size for path in paths)
    except OSError as error:
        raise UserError(
            f"inputs.{name}: {error.filename}: cannot be read ({error.strerror}); make it readable or remove it"
        ) from None
    whole = hashlib.sha256()
    for path, digest in zip(paths, digests, strict=True):
        whole.update(os.fsencode(path) + b"\0" + digest)
    also = sorted(set(links(name, inputs).values()))
    return {"files": len(paths), "bytes": size, "sha256": whole.hexdigest(), "also": also}


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check(name: str, inputs: Mapping[str, str]) -> None:
    """Raises UserError if DVC cannot watch every file of input `name`."""
    for _ in files(name, inputs):
        pass
    links(name, inputs)


def files(name: str, inputs: Mapping[str, str]) -> Iterator[str]:
    """Yields the path of each file in input `name`, relative to the input; "" if the input itself is a file.

    Like DVC, does not follow links to folders. Raises UserError for a file that DVC cannot watch.
    """
    root = Path(inputs[name])
    if not root.exists():
        raise UserError(f"inputs.{name}: no file or folder {root}; correct the path in the parameters")
    if not root.is_dir():
        yield ""
        return
    for folder, _, entries in os.walk(root):
        for entry in entries:
            path = Path(folder) / entry
            try:
                os.fspath(path).encode()
                plain = stat.S_ISREG(path.stat().st_mode)
            except UnicodeEncodeError:
                text = os.fsencode(path).decode(errors="backslashreplace")
                raise UserError(f"inputs.{name}: {text}: file names must be UTF-8 for DVC; rename the file") from None
            except OSError as error:
                raise UserError(f"inputs.{name}: {path}: cannot be read ({error.strerror}); remove it") from None
            if not plain:
                raise UserError(f"inputs.{name}: {path}: must be a regular file for DVC to watch it; remove it")
            yield path.relative_to(root).as_posix()


def links(name: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Links in input `name` to folders outside it -> the name of the input that each one leads to.

    Raises UserError for a link to a folder that is in no input, as DVC would not watch it.
    """
    root = Path(inputs[name])
    real = {other: Path(path).resolve() for other, path in inputs.items()}
    found: dict[str, str] = {}
    for folder, inside, _ in os.walk(root):
        for entry in inside:
            path = Path(folder) / entry
            if not path.is_symlink() or path.resolve().is_relative_to(real[name]):
                continue
            target = next((o for o, place in real.items() if path.resolve().is_relative_to(place)), None)
            if target is None:
                raise UserError(
                    f"inputs.{name}: {path} is a link to the folder {path.resolve()}, which DVC does not follow; "
                    "add that folder to `inputs`"
                )
            found[str(path)] = target
    return found

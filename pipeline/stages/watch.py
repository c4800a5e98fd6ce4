"""watch: the digest of one file or folder that the parameters name under `inputs`.

DVC looks at the input and runs this stage again when a file there is added, removed or replaced. Later stages depend on
the digest alone. So nobody needs the images to train heads, and images that merely moved make no stage run again.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.outputs import write_json

NUMBER = 2026112601  # other results, another number: docs/numbers.md

THREADS = 8  # files read at a time, for folders on a network


def run(name: str, inputs: Mapping[str, str], out: Path, say: Callable[[str], None]) -> None:
    """Writes `files`, their number, `bytes`, `sha256` over paths and contents, and `also` to the JSON file `out`.

    `also` names the inputs that links to folders lead to. Raises UserError for an input that DVC cannot watch.
    """
    if name not in inputs:
        raise UserError(f"inputs: no input {name!r}{nearest(name, inputs)}; add it to the parameters (inputs: {{...}})")
    root = Path(inputs[name])
    found = sorted(files(name, inputs))
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = list(pool.map(_digest, [root / inside for inside in found]))
        size = sum((root / inside).stat().st_size for inside in found)
    except OSError as error:
        raise UserError(f"inputs.{name}: {error.filename}: cannot be read ({error.strerror})") from None
    whole = hashlib.sha256()
    for inside, digest in zip(found, digests, strict=True):
        whole.update(os.fsencode(inside) + b"\0" + digest)
    also = sorted(set(links(name, inputs).values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"files": len(found), "bytes": size, "sha256": whole.hexdigest(), "also": also})
    say(f"{name}: {len(found)} files, {size / 1e6:.1f} MB")


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def check(name: str, inputs: Mapping[str, str]) -> None:
    """Raises UserError if DVC cannot watch all that input `name` holds."""
    for _ in files(name, inputs):
        pass
    links(name, inputs)


def files(name: str, inputs: Mapping[str, str]) -> Iterator[str]:
    """The path of every file below input `name`, relative to it; "" where it is a file itself.

    Links to folders are not followed, as DVC does not follow them. Raises UserError for what stops DVC.
    """
    root = Path(inputs[name])
    if not root.exists():
        raise UserError(f"inputs.{name}: no file or folder {root}; mend the path in the parameters")
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
                raise UserError(f"inputs.{name}: {text}: DVC needs file names in UTF-8; rename it") from None
            except OSError as error:
                raise UserError(f"inputs.{name}: {path}: cannot be read ({error.strerror}); remove it") from None
            if not plain:
                raise UserError(f"inputs.{name}: {path}: DVC watches plain files only; remove it")
            yield path.relative_to(root).as_posix()


def links(name: str, inputs: Mapping[str, str]) -> dict[str, str]:
    """Link to a folder below input `name` -> the input that it leads to, unless it stays inside.

    Raises UserError for a link to where DVC does not look.
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
                    f"inputs.{name}: {path} leads to {path.resolve()}, and DVC does not follow links to folders; name "
                    "that folder under `inputs` as well"
                )
            found[str(path)] = target
    return found

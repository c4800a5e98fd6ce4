"""Networks of optional packages: by name, from a local folder, or from the Hugging Face hub pinned by a commit.

Code from a hub is never run, and weights are read as safetensors or with `weights_only`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from h2t.pipeline.base.errors import LONGEST_MESSAGE, UserError, first_line, in_brief, of_the_machine

#: Plug-in -> the package that builds its networks.
PACKAGES = {"timm": "timm", "huggingface": "transformers"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


def _commit(value: str | None) -> str | None:
    if value is not None and not _COMMIT.fullmatch(value):
        raise ValueError("must be a commit, 40 hexadecimal digits, as a branch or tag may move")
    return value


Revision = Annotated[str | None, pydantic.AfterValidator(_commit)]


def package(name: Literal["timm", "transformers", "huggingface_hub"]) -> Any:
    """The optional package `name`, whose extra has the name of the plug-in. Raises UserError if it is missing."""
    extra = {"transformers": "huggingface"}.get(name, name)
    try:
        if name == "timm":
            import timm as found
        elif name == "transformers":
            import transformers as found
        else:
            import huggingface_hub as found
    except ImportError as error:
        if error.name and error.name.partition(".")[0] != name:
            raise
        raise UserError(f"arch {extra}: needs the package {name}; type: pip install 'h2t[{extra}]'") from None
    return found


def made_with(arch: str) -> dict[str, str]:
    """The package that builds the networks of `arch`, if one does, and its version."""
    return {PACKAGES[arch]: version(PACKAGES[arch])} if arch in PACKAGES else {}


def other_version(arch: str, made: Mapping[str, str] | None = None) -> str:
    """What a refusal of weights may ask, too: packages rename the modules of a network from version to version.

    `made`: the versions that they were made with, if known.
    """
    asked = ""
    for name, here in made_with(arch).items():
        was = (made or {}).get(name)
        if was != here:
            asked += f", or made with another {name}{f' ({was})' if was else ''} than {here}"
    return asked


def is_folder(model: str) -> bool:
    """Whether `model` names a local folder and no hub id: it exists, or starts like a path."""
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()


def is_hub_id(model: str) -> bool:
    """Whether `model` is a hub id, owner/name."""
    return "/" in model and not is_folder(model)


def described(model: str, revision: str | None) -> dict[str, Any]:
    """config.json of a local folder or a hub id. Raises UserError if it is missing, malformed or not pinned."""
    if is_folder(model):
        path = Path(model).expanduser() / "config.json"
    else:
        pinned(model, revision)
        with offline(model):
            path = Path(package("huggingface_hub").hf_hub_download(model, "config.json", revision=revision))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"options.model: {path} must be the JSON file of a network's configuration ({error}); name a folder that "
            "holds config.json and model.safetensors"
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            f"options.model: {path} must hold a JSON object; got {str(config)[:60]!r}; save the model again"
        )
    if "auto_map" in config:
        raise UserError(
            f"options.model: {model} brings code of its own, which h2t never runs; choose a network that timm or "
            "transformers has, or write a plug-in (docs/adding-a-backbone.md)"
        )
    return config


def pinned(model: str, revision: str | None) -> None:
    """Raises UserError for a hub id without a commit."""
    if revision is None:
        raise UserError(
            f"options.revision: a hub id needs the commit of its files, 40 hexadecimal digits, got none for {model}; "
            "copy it from the history of the model's files on the hub"
        )


@contextmanager
def offline(model: str) -> Iterator[None]:
    """Turns the errors of loading files into one UserError: where to put them, or that a folder's do not fit."""
    try:
        yield
    except UserError:
        raise
    # The hub's client raises errors of several libraries; the first line of each says what went wrong.
    except Exception as error:
        if of_the_machine(error):
            raise
        if is_folder(model):
            reason = in_brief(error)
            raise UserError(
                f"options.model: the files in {model} cannot be loaded ({reason}); name a folder whose weights fit its "
                "config.json, and leave input.size out if the network was trained at another size"
            ) from None
        reason = first_line(error)[:LONGEST_MESSAGE]
        raise UserError(
            f"options.model: the files of {model} are not in the local cache of the hub and cannot be downloaded "
            f"({reason}); put config.json and model.safetensors into a folder and name it in options.model, or name "
            "the weights' file in backbones.NAME.weights"
        ) from None

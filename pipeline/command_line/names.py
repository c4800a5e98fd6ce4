"""Refuses paths that do not belong to a command's NAME, by what the files there record and by the folders' names.

The weights of two backbones of one architecture fit into each other, so mixing them up raises no error by itself. A
digest does not say which name is meant. Architecture, options and objective do where they differ, and so does a folder
that is called like another entry of the parameters.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from h2t.pipeline.base.errors import UserError


def folder_name(location: object) -> str:
    """The last part of a path or URL: `ce_mixup` of data/extract/ce_mixup and of dvc+URL#data/extract/ce_mixup."""
    text = str(location)
    if "://" in text:  # not urlsplit, which raises an error that quotes a malformed login
        before, _, fragment = text.partition("#")
        text = fragment or before.partition("?")[0]
    return text.rstrip("/").rpartition("/")[2]


def check_folders(values: Mapping[str, Any], section: str, name: str, *locations: object) -> None:
    """Raises UserError for a path or URL whose last part is another entry of `section` than `name`."""
    for location in locations:
        called = folder_name(location)
        if called != name and called in values[section]:
            raise UserError(
                f"{location}: is called like {section}.{called}, but {section}.{name} is what this command is for; "
                "give that one's folder, or rename this one"
            )


def check_backbone(values: Mapping[str, Any], name: str, folder: Path, say: Callable[[str], None]) -> None:
    """Raises UserError unless the backbone in `folder` is what `backbones.NAME` asks for, as far as it records that.

    A NAME that the parameters do not have is said aloud: nothing can be compared.
    """
    from h2t.pipeline.base import plugins
    from h2t.pipeline.base.params import build
    from h2t.pipeline.networks.trained import NONE
    from h2t.pipeline.networks.weights import load_weights
    from h2t.pipeline.stages.train_backbone import Params

    if str(folder) == NONE:
        return
    check_folders(values, "backbones", name, folder)
    if name not in values["backbones"]:
        say(f"note: backbones.{name}: not in the parameters, so nothing says whether {folder} is that backbone")
        return
    asked = build(Params, f"backbones.{name}", values["backbones"][name])
    head = folder / "head.safetensors"  # where it is missing, nothing records the objective
    recorded = load_weights(head if head.is_file() else folder / "backbone.safetensors")[1]
    kind = plugins.load("backbones", asked.arch).Options
    for key, found, wanted in (
        ("arch", recorded["arch"], asked.arch),
        ("objective", recorded.get("objective", asked.objective), asked.objective),
        ("options", recorded["options"], asked.options),
    ):
        if key == "options":
            found, wanted = (build(kind, f"{folder}: options", o).model_dump() for o in (found, wanted))
        if found != wanted:
            raise UserError(
                f"{folder}: is a backbone of {key} {found}, backbones.{name} asks for {wanted}; give the folder of "
                f"{name}, or train it again"
            )


def check_host(
    values: Mapping[str, Any],
    name: str,
    cache: str,
    backbone: Path,
    out: Path,
    say: Callable[[str], None],
    heads: Path | None = None,
) -> None:
    """Raises UserError unless cache and backbone are those of `hosts.NAME.backbone`, and the other folders NAME's."""
    from h2t.pipeline.heads.stored import load_heads
    from h2t.pipeline.networks.trained import NONE

    check_folders(values, "hosts", name, out, *([heads] if heads is not None else []))
    if heads is not None and (of := load_heads(heads).about.get("where", f"hosts.{name}")) != f"hosts.{name}":
        raise UserError(f"{heads}: holds the heads of {of}, not of hosts.{name}; give the folder of {name}")
    entry = values["hosts"].get(name)
    if entry is None or str(backbone) == NONE:  # imported features are of no backbone here
        return
    check_folders(values, "backbones", entry["backbone"], cache)
    check_backbone(values, entry["backbone"], backbone, say)


def check_evaluated(values: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError for an evaluation in `folder` of another kind of host than the parameters say."""
    for name, entry in values["hosts"].items():
        try:
            found = json.loads((folder / name / "about.json").read_text(encoding="utf-8"))["host"]["host"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # told by the report
        if found != entry["host"]:
            raise UserError(
                f"{folder / name}: is an evaluation of host {found}, hosts.{name}.host asks for {entry['host']}; "
                f"run h2t evaluate {name} again"
            )

"""Checks that the paths given to a command belong to its NAME, by the files' records and the folders' names.

Two backbones of the same architecture accept each other's weights, so a mix-up would raise no error. It is detected if
architecture, options or objective differ, or if the folder has the name of another entry in the parameters.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Say


def folder_name(location: object) -> str:
    """The last part of a path or URL: `ce_mixup` for data/extract/ce_mixup and for dvc+URL#data/extract/ce_mixup."""
    text = str(location)
    if "://" in text:  # not urlsplit: its error for a malformed login quotes the login
        before, _, fragment = text.partition("#")
        text = fragment or before.partition("?")[0]
    return text.rstrip("/").rpartition("/")[2]


def check_folders(values: Mapping[str, Any], section: str, name: str, *locations: object) -> None:
    """Raises UserError for a path or URL whose last part is the name of another entry of `section` than `name`."""
    for location in locations:
        called = folder_name(location)
        if called != name and called in values[section]:
            raise UserError(
                f"{location}: must be a folder of {section}.{name}; got one with the name of {section}.{called}; "
                f"give the folder of {name} or rename this one"
            )


def check_backbone(values: Mapping[str, Any], name: str, folder: Path, say: Say) -> None:
    """Raises UserError if the record of the backbone in `folder` differs from `backbones.NAME` in the parameters.

    If the parameters do not have NAME, `say` gets a note that nothing was compared.
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
        say(f"note: backbones.{name}: not in the parameters, so {folder} cannot be checked against it")
        return
    asked = build(Params, f"backbones.{name}", values["backbones"][name])
    head = folder / "head.safetensors"  # without it the objective is not recorded
    recorded = load_weights(head if head.is_file() else folder / "backbone.safetensors")[1]
    if "cache" in recorded:  # a probe, which names its cache
        return
    kind = plugins.load("backbones", asked.arch).Options
    compared: tuple[tuple[str, Any, Any], ...] = (
        ("arch", recorded["arch"], asked.arch),
        ("objective", recorded.get("objective", asked.objective), asked.objective),
        ("options", recorded["options"], asked.options),
        ("input", recorded.get("input", {}), asked.input.model_dump(exclude_none=True)),
        ("head", recorded.get("head", "trained"), asked.head),
        ("probe", recorded.get("probe"), asked.probe.model_dump() if asked.head == "probe" else None),
    )
    for key, actual, wanted in compared:
        if key == "options":
            actual, wanted = (build(kind, f"{folder}: options", o).model_dump() for o in (actual, wanted))
        if key in ("options", "input"):  # what the parameters leave open, the network's configuration decides
            assert isinstance(wanted, dict)
            stated = [k for k, v in wanted.items() if v is not None]
            actual, wanted = ({k: one.get(k) for k in stated} for one in (actual, wanted))
        if actual != wanted:
            raise UserError(
                f"{folder}: must be a backbone with {key} {wanted}, as in backbones.{name}; got {actual}; "
                f"give the folder of {name} or train it again"
            )


def check_host(
    values: Mapping[str, Any],
    name: str,
    cache: str,
    backbone: Path,
    out: Path,
    say: Say,
    heads: Path | None = None,
) -> None:
    """Raises UserError if cache or backbone are not those of `hosts.NAME.backbone`, or other folders are not NAME's."""
    from h2t.pipeline.heads.stored import load_heads
    from h2t.pipeline.networks.trained import NONE

    check_folders(values, "hosts", name, out, *([heads] if heads is not None else []))
    if heads is not None and (of := load_heads(heads).about.get("where", f"hosts.{name}")) != f"hosts.{name}":
        raise UserError(f"{heads}: must hold the heads of hosts.{name}; got those of {of}; give the folder of {name}")
    entry = values["hosts"].get(name)
    if entry is None or str(backbone) == NONE:  # imported features have no backbone
        return
    check_folders(values, "backbones", entry["backbone"], cache)
    check_backbone(values, entry["backbone"], backbone, say)


def check_evaluated(values: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if an evaluation in `folder` is of another host plug-in than the parameters name."""
    for name, entry in values["hosts"].items():
        try:
            host = json.loads((folder / name / "about.json").read_text(encoding="utf-8"))["host"]["host"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the report names what is missing
        if host != entry.get("host"):
            raise UserError(
                f"{folder / name}: must be an evaluation of host {entry.get('host')}, as in hosts.{name}; got {host}; "
                f"run h2t evaluate {name} again"
            )

"""All of params.yaml at once: every section is checked before any stage starts, so that a slip is found early."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pipeline import device, params, plugins
from pipeline.errors import UserError, nearest
from pipeline.extraction.cluster import ADDRESS
from pipeline.residency import Residency

SECTIONS = (
    "seed",
    "device",
    "inputs",
    "prepare",
    "backbones",
    "extract",
    "pool",
    "hosts",
    "train_classifier",
    "evaluate",
    "report",
    "run",
)

OPTIONAL = ("inputs", "pool", "run")  # complete by their defaults

#: (section, key) that change no byte. They belong into `run`, which DVC does not watch; their old place is accepted.
MOVED = (("extract", "cluster"),)


class Run(params.Section):
    """Section `run`: how stages run; it changes no result.

    `cluster`: where `extract` runs: null (this process), local:N for N processes here, or a dask scheduler's address.
    """

    cluster: Annotated[str | None, ADDRESS] = None


def check(values: dict[str, Any], say: Callable[[str], None] = lambda line: None) -> None:
    """Raises UserError for the first wrong, missing or unknown key.

    Fills in `host`, `arch` and `objective` by name, sections that may be left out, and what `run` says about a stage.
    """
    from pipeline.stages import evaluate, extract, pool, prepare, report, train_backbone, train_classifier

    for name in values:
        if name not in SECTIONS:
            raise UserError(f"{name}: unknown section{nearest(name, SECTIONS)} (there are: {', '.join(SECTIONS)})")
    for name in SECTIONS:
        if name in OPTIONAL:
            values.setdefault(name, {})
        if name not in values:
            raise UserError(f"{name}: missing; add the section to the parameter file")
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed: must be a whole number from 0 to 4294967295; got {seed!r}")
    device.check(values["device"])
    run = params.build(Run, "run", values["run"])
    for of, key in MOVED:
        entries = values[of] if isinstance(values[of], dict) else {}
        if entries.get(key) is not None:
            say(f"note: {of}.{key} belongs into the section run: where it is, DVC takes it for other results")
        elif (given := getattr(run, key)) is not None:
            values[of] = {**entries, key: given}
    for name in values["inputs"] or ():
        _check_name("inputs", name, "files")
    section = params.build(prepare.Params, "prepare", values["prepare"])
    params.build(plugins.load("datasets", section.dataset).Options, "prepare.options", section.options)
    extraction = params.build(extract.Params, "extract", values["extract"])
    copies = params.build(pool.Params, "pool", values["pool"])
    params.build(plugins.load("pools", copies.pool).Options, "pool.pool_options", copies.pool_options)
    params.build(Residency, "train_classifier", values["train_classifier"])
    params.build(evaluate.Params, "evaluate", values["evaluate"])
    params.build(report.Params, "report", values["report"])
    for name, entry in _entries(values, "backbones", ("arch", "objective")).items():
        backbone = params.build(train_backbone.Params, f"backbones.{name}", entry)
        where = f"backbones.{name}"
        params.build(plugins.load("backbones", backbone.arch).Options, f"{where}.options", backbone.options)
        params.build(plugins.load("objectives", backbone.objective).Loss, f"{where}.loss", backbone.loss)
    for name, entry in _entries(values, "hosts", ("host",)).items():
        where = f"hosts.{name}"
        host = params.build(train_classifier.Params, where, entry)
        if host.backbone not in values["backbones"]:
            known = list(values["backbones"])
            raise UserError(
                f"{where}.backbone: no backbone {host.backbone!r}{nearest(host.backbone, known)} "
                f"(there are: {', '.join(known)})"
            )
        if host.batchnorm not in extraction.batchnorm:
            raise UserError(
                f"{where}.batchnorm: must be one of extract.batchnorm ({', '.join(extraction.batchnorm)}); "
                f"got {host.batchnorm!r}; add it to extract.batchnorm"
            )
        params.build(plugins.load("hosts", host.host).Loss, f"{where}.loss", host.loss)
        params.build(plugins.load("pools", host.pool).Options, f"{where}.pool_options", host.pool_options)


def _entries(values: dict[str, Any], name: str, defaults: tuple[str, ...]) -> dict[str, Any]:
    """The entries of a mapping section, with the plug-in keys `defaults` set to the entry's own name where absent."""
    section = values[name]
    if not isinstance(section, dict) or not section:
        raise UserError(f"{name}: must be a mapping with at least one entry; got {section!r}")
    kinds = {"arch": "backbones", "objective": "objectives", "host": "hosts"}
    for key, entry in section.items():
        _check_name(name, key, "folders")
        if isinstance(entry, dict):
            for default in defaults:
                if default not in entry and key in plugins.names(kinds[default]):
                    entry[default] = key
    return section


def _check_name(section: str, key: Any, become: str) -> None:
    if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
        raise UserError(f"{section}: names are letters, digits, _ and -, as they become {become}; got {key!r}")

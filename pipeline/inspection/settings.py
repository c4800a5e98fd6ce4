"""Checks all sections of params.yaml before a stage starts, so that mistakes are found early."""

import re
from collections.abc import Iterable
from copy import copy
from typing import Annotated, Any

from h2t.pipeline.base import device, params, plugins, replicates
from h2t.pipeline.base.errors import UserError, nearest
from h2t.pipeline.base.run import Say, silent
from h2t.pipeline.extraction.cluster import ADDRESS

#: Every section of params.yaml, in the order of the data.
SECTIONS = (
    "seed",
    "replicates",
    "device",
    "inputs",
    "prepare",
    "backbone_defaults",
    "backbones",
    "extract",
    "pool",
    "host_defaults",
    "hosts",
    "train_classifier",
    "evaluate",
    "report",
    "run",
)
#: The values of sections that are left out. All other sections are required.
LEFT_OUT: dict[str, Any] = {"seed": 0, "replicates": [0], "device": "auto", **{name: {} for name in params.OPTIONAL}}
#: Section of named entries -> (section of their defaults, keys that default to the entry's name -> kind of plug-in).
ENTRIES = {
    "backbones": ("backbone_defaults", {"arch": "backbones", "objective": "objectives"}),
    "hosts": ("host_defaults", {"host": "hosts"}),
}
#: Sections of settings with fixed names.
PLAIN = ("prepare", "extract", "pool", "train_classifier", "evaluate", "report")
#: Keys of hosts that are trained. A host with a closed-form fit does not take them from `host_defaults`.
TRAINED_ONLY = ("optimiser", "grid")

#: (section, key) of settings that change no result. They belong in `run`, which DVC does not watch; both places work.
MOVED = (("extract", "cluster"),)


class RunSection(params.Section):
    """Section `run`: how stages run. It changes no result, and DVC does not watch it."""

    cluster: Annotated[str | None, ADDRESS] = None
    """Where `extract` runs: null (this process), local:N for N processes, or a dask scheduler at tcp://HOST:PORT."""


def check(values: dict[str, Any], say: Say = silent) -> None:
    """Checks `values` and completes them in place. Raises UserError for the first wrong, missing or unknown key.

    Fills in sections that are left out; `host`, `arch` and `objective`, by the entry's name; in each entry the values
    of `backbone_defaults` or `host_defaults`; and settings from `run` in the section of their stage.
    """
    from h2t.pipeline.extraction import settings as extract
    from h2t.pipeline.heads import host_entry
    from h2t.pipeline.heads.residency import Residency
    from h2t.pipeline.stages import evaluate, pool, prepare, report, train_backbone, train_classifier

    _check_sections(values, say)
    section = params.build(prepare.Params, "prepare", values["prepare"])
    params.build(plugins.load("datasets", section.dataset).Options, "prepare.options", section.options)
    extraction = params.build(extract.Params, "extract", values["extract"])
    copies = params.build(pool.Params, "pool", values["pool"])
    params.build(plugins.load("pools", copies.pool).Options, "pool.pool_options", copies.pool_options)
    params.build(Residency, "train_classifier", values["train_classifier"])
    params.build(evaluate.Params, "evaluate", values["evaluate"])
    params.build(report.Params, "report", values["report"])
    params.check_partial(train_backbone.Params, "backbone_defaults", values["backbone_defaults"])
    params.check_partial(train_classifier.Params, "host_defaults", values["host_defaults"])
    heads = {}
    for name, entry in complete(values, "backbones").items():
        backbone = params.build(train_backbone.Params, f"backbones.{name}", entry)
        where = f"backbones.{name}"
        arch = plugins.load("backbones", backbone.arch)
        params.build(arch.Options, f"{where}.options", backbone.options)
        if backbone.weights == "pretrained" and not hasattr(arch, "weights"):
            raise UserError(
                f"{where}.weights: {backbone.arch} has no pretrained weights; got pretrained; name a checkpoint file"
            )
        params.build(plugins.load("objectives", backbone.objective).Loss, f"{where}.loss", backbone.loss)
        heads[name] = backbone.head
        if backbone.cache is not None and backbone.head == "trained" and not backbone.has_weights:
            raise UserError(
                f"{where}.head: with a cache elsewhere, it must be probe or none, unless weights names the backbone's "
                "file; got trained; set it to probe"
            )
        if replicates.further(values) and not backbone.is_trained:
            raise UserError(
                f"replicates: backbones.{name} is not trained here, so there is no other training of it; got "
                f"{values['replicates']}; set replicates to [0], or train the backbone (weights: none)"
            )
        if backbone.head == "probe" and backbone.cache is None and "stage1" not in extraction.batchnorm:
            raise UserError(
                f"{where}.head: a probe is fitted to training rows under stage1 statistics; extract.batchnorm has "
                f"{', '.join(extraction.batchnorm)}; add stage1"
            )
    for name, entry in complete(values, "hosts").items():
        where = f"hosts.{name}"
        host = params.build(train_classifier.Params, where, entry)
        if host.backbone not in values["backbones"]:
            known = list(values["backbones"])
            raise UserError(
                f"{where}.backbone: no backbone {host.backbone!r}{nearest(host.backbone, known)} "
                f"(there are: {', '.join(known)})"
            )
        # A recipe that is left out is stage1 if the cache has no other.
        left_out = "batchnorm" not in host.model_fields_set and "stage1" in extraction.batchnorm
        there = values["backbones"][host.backbone].get("cache")  # what it stores is found when it is opened
        if there is None and host.batchnorm not in extraction.batchnorm and not left_out:
            raise UserError(
                f"{where}.batchnorm: must be one of extract.batchnorm ({', '.join(extraction.batchnorm)}); "
                f"got {host.batchnorm!r}; add it to extract.batchnorm"
            )
        params.build(plugins.load("hosts", host.host).Loss, f"{where}.loss", host.loss)
        host_entry.check_constants(host, name)
        host_entry.check_start(host, name, heads[host.backbone])
        params.build(plugins.load("pools", host.pool).Options, f"{where}.pool_options", host.pool_options)


def outline(values: dict[str, Any], say: Say = silent) -> None:
    """Completes `values` as `check` does, but checks only the section `prepare` and which other entries there are.

    It needs no torch. It serves stages that read names only; every stage that computes calls `check`. Hosts with a
    closed-form fit keep the keys of `host_defaults` that they do not take.
    """
    from h2t.pipeline.stages import prepare

    _check_sections(values, say)
    for name in (*PLAIN, *(defaults for defaults, _ in ENTRIES.values())):
        _check_mapping(name, values[name])
    section = params.build(prepare.Params, "prepare", values["prepare"])
    params.build(plugins.load("datasets", section.dataset).Options, "prepare.options", section.options)
    for name in ENTRIES:
        for key, entry in complete(values, name, narrow=False).items():
            _check_mapping(f"{name}.{key}", entry)


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{name}: must be a mapping; got {value!r}; write its settings as key: value below it")


def _check_sections(values: dict[str, Any], say: Say) -> None:
    """Checks the names of the sections and those that name no plug-in; fills in what is left out."""
    for name in values:
        if name not in SECTIONS:
            raise UserError(f"{name}: unknown section{nearest(name, SECTIONS)} (there are: {', '.join(SECTIONS)})")
    for name in SECTIONS:
        if name in LEFT_OUT:
            values.setdefault(name, copy(LEFT_OUT[name]))
        if name not in values:
            raise UserError(f"{name}: missing; add the section to the parameter file")
    seed = values["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed: must be a whole number from 0 to 4294967295; got {seed!r}")
    replicates.further(values)
    device.check(values["device"])
    run = params.build(RunSection, "run", values["run"])
    for of, key in MOVED:
        entries = values[of] if isinstance(values[of], dict) else {}
        if entries.get(key) is not None:
            say(f"note: {of}.{key} belongs in the section run; here a change of it makes DVC run {of} again")
        elif (given := getattr(run, key)) is not None:
            values[of] = {**entries, key: given}
    named = values["inputs"]
    if named is not None and not isinstance(named, dict):
        raise UserError(f"inputs: must be a mapping of names to files or folders; got {named!r}")
    _check_names("inputs", named or {}, "files")


def complete(values: dict[str, Any], name: str, *, narrow: bool = True) -> dict[str, Any]:
    """The entries of section `name` merged with their defaults; they also replace the entries in `values`.

    An entry named like a plug-in does not need a key that names the plug-in. With `narrow`, hosts are loaded to leave
    out defaults that they do not take. Raises UserError if the section is empty, is not a mapping, or has an entry
    whose name is not valid.
    """
    section = values[name]
    if not isinstance(section, dict) or not section:
        raise UserError(f"{name}: must be a mapping with at least one entry; got {section!r}")
    defaults_name, kinds = ENTRIES[name]
    defaults = values.get(defaults_name, {})
    _check_names(name, section, "folders")
    for key, entry in section.items():
        if isinstance(entry, dict):
            named = {k: key for k, kind in kinds.items() if key in plugins.names(kind)}
            own = {**named, **entry} if name == "hosts" else entry
            given = defaults if name == "hosts" else {**named, **defaults}
            section[key] = params.merged(_for_host(own, given) if name == "hosts" and narrow else given, own)
    return section


def _check_names(section: str, keys: Iterable[Any], become: str) -> None:
    """Checks the names of the entries of a section. Some disks, such as those of Macs, do not tell A from a."""
    seen: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", key):
            raise UserError(
                f"{section}: a name must consist of letters, digits, _ and -, as {become} are named after it; got "
                f"{key!r}; rename the entry"
            )
        if (other := seen.setdefault(key.lower(), key)) != key:
            raise UserError(
                f"{section}: two names must differ by more than upper and lower case, as {become} are named after them "
                f"and some disks take these for one; got {other!r} and {key!r}; rename one"
            )


def _for_host(host: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`defaults` without `optimiser` and `grid` if `host` has a closed-form fit."""
    name = host.get("host", defaults.get("host"))
    if isinstance(name, str) and name in plugins.names("hosts") and plugins.load("hosts", name).Host.fitted:
        return {k: v for k, v in defaults.items() if k not in TRAINED_ONLY}
    return defaults

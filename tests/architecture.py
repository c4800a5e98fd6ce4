"""Imports as a graph, and the plug-ins that each stage loads by name, which no import shows."""

from pathlib import Path

from h2t.pipeline.base.code import closure, imports, modules
from h2t.pipeline.base.plugins import KINDS as PLUGINS

ROOT = Path(__file__).parent.parent

__all__ = ["LOADED", "PLUGINS", "ROOT", "closure", "imports", "modules"]

#: Stage -> plug-ins it loads by name: folder -> how dvc.yaml names the one in use. None: the stage watches the whole
#: kind, because a value that params.yaml may leave out cannot be named.
LOADED = {
    "watch": {},
    "inputs": {"datasets": None},
    "prepare": {"datasets": ["${prepare.dataset}"]},
    "train_backbone": {
        "datasets": ["${prepare.dataset}"],
        "backbones": ["${item.arch}"],
        "objectives": ["${item.objective}"],
    },
    "extract": {
        "datasets": ["${prepare.dataset}"],
        "backbones": ["${item.arch}"],
        "samplers": ["balanced", "instance", "reverse"],
    },
    "replicates": {
        "datasets": ["${prepare.dataset}"],
        "backbones": None,
        "objectives": None,
        "samplers": ["balanced", "instance", "reverse"],
    },
    "pool": {"pools": None},
    "probe": {},
    "train_classifier": {"hosts": ["${item.host}"], "pools": None, "samplers": ["balanced", "instance", "reverse"]},
    "evaluate": {"hosts": ["${item.host}"], "pools": None},
    "report": {},
}

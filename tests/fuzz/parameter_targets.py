"""Targets in the parameters: the text of params.yaml with `--set`, and the values of all its sections."""

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

from fuzz import mutation
from fuzz.target import Parse, Target
from pipeline_builders import make_params

from h2t.pipeline.base import params
from h2t.pipeline.inspection import settings

PARTS = "\0"  # between the YAML and the overrides

YAML = [
    "seed: 0\nhosts: {dr: {ratio: [0.0, 1e-3]}}\n" + PARTS + "hosts.dr.ratio=[0.5]" + PARTS + "seed=1",
    "a: &x {b: 1, c: [1, 2]}\nd: *x\ne: {<<: *x, c: 3}\n",
    "a: |\n  text\n  more\nb: >-\n  folded\nc: 'it''s'\nd: \"\\u00e9\\n\"\n",
    "- 1\n- {a: 0x1F, b: 0o17, c: 1_000, d: 12:30:45, e: 2001-12-14t21:59:43.10-05:00, f: .inf, g: ~}\n",
    "!!map {a: !!str 1, b: !!int '2', c: !!float 3, d: !!binary aGk=, e: !!set {f, g}, h: !!omap [i: 1]}\n",
    "%YAML 1.1\n---\na: 1\n...\n",
    "? [a, b]\n: c\n? d\n",
    "a: " + "[" * 200,
    "a: 0x" + "f" * 400,
]
WORDS = ["&x", "*x", "*x, *x", "<<: *x", "<<: [*x, *x]", "!!python/object/apply:os.system [id]",
         "!!python/name:os.system",
         "!!timestamp x", "!!int ''", "!!float x", "!!bool x", "!!binary '?'", "2001-99-99", "0x" + "f" * 400,
         "9" * 400, "0b",
         "1e400", "190:20:30:99", "[" * 30, "{a: " * 20, "- " * 30, "---", "...", "%TAG ! !x", "a: 1\na: 2", "\t", "=",
         "\ufeff",
         "hosts.dr.ratio=*x", "a.b.c=1", "=", "x", "hosts=", "seed.x=1", "\"\\ud800\"", "\"\\x00\"",
         "? {a: b}"]  # fmt: skip


def _yaml_seeds() -> list[bytes]:
    return [text.encode() for text in YAML]


def _mutated_yaml(data: bytes, random: Random) -> bytes:
    text = data.decode()
    for _ in range(random.choice((1, 1, 2))):
        text = mutation.lines(text, random, [*WORDS, *YAML], random.choice(["\n", "\n", " ", PARTS]))
    return text.encode("utf-8", errors="surrogatepass")


def _open_yaml(folder: Path) -> Parse:
    path = folder / "params.yaml"

    def parse(data: bytes) -> object:
        text, *overrides = data.split(PARTS.encode())
        path.write_bytes(text)
        # What a shell hands over: bytes that are not UTF-8 come as lone surrogates.
        values = params.load(path, [o.decode(errors="surrogateescape") for o in overrides])
        if not set(values) >= set(settings.SECTIONS):  # nobody writes all of them into so few bytes
            return (
                params.section(values, next(iter(values), "hosts.dr"))
                if all(isinstance(k, str) for k in values)
                else None
            )
        return settings.check(values)

    return parse


_FULL = make_params()


def _settings_seeds() -> list[bytes]:
    found = [mutation.as_json(_FULL)]
    for host in ("gcl", "ride", "mislas", "logistic_regression", "tau_norm"):
        other = copy.deepcopy(_FULL)
        other["hosts"] = {host: {**next(iter(_FULL["hosts"].values())), "host": host}}
        found.append(mutation.as_json(other))
    return found


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {str(k) for k in value}.union(*map(_keys, value.values()))
    return set()


KEYS = sorted(
    _keys(_FULL) | {"options", "loss", "pool_options", "transform", "root", "train", "size", "mean", "statistics_from"}
)


def _mutated_settings(data: bytes, random: Random) -> bytes:
    return mutation.as_json(mutation.tree(json.loads(data), random, KEYS))


def _open_settings(folder: Path) -> Parse:
    def parse(data: bytes) -> object:
        values = mutation.from_json(data)
        if not isinstance(values, dict):
            values = {"seed": values}
        return settings.check(values)

    return parse


TARGETS = [
    Target("yaml", "pipeline/base/params.py: load", _open_yaml, _yaml_seeds, mutation.mostly(_mutated_yaml), 300),
    Target("settings", "pipeline/inspection/settings.py: check", _open_settings, _settings_seeds,
    mutation.mostly(_mutated_settings, 0.98), 16384),
]  # fmt: skip

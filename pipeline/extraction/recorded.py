"""Reads what a cache records of its extraction, and checks it, as any program may have written the cache."""

from collections.abc import Mapping
from typing import Any

import pydantic

from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision
from h2t.pipeline.networks.trained import NONE

MOST_IMAGES = 2**20  # per batch: more than any machine can hold, and few enough that byte counts do not overflow


class _Views(pydantic.BaseModel, strict=True):
    seed: int


class _Inputs(pydantic.BaseModel, strict=True):
    backbone: dict[str, Any]
    batchnorm: dict[str, Any]
    transform: dict[str, Any]
    views: _Views


class _Provenance(pydantic.BaseModel, strict=True):
    batch_size: int = pydantic.Field(1, ge=1, le=MOST_IMAGES)
    precision: Precision = "float32"
    statistics_from: str | None = None


class _Record(pydantic.BaseModel):
    fingerprint_inputs: _Inputs
    provenance: _Provenance


def backbone_of(files: object, spec: CacheSpec) -> str:
    """The digest of the weights that the cache at `files` was extracted with. Raises UserError if it records none."""
    backbone = spec.fingerprint_inputs.get("backbone")
    weights = backbone.get("weights") if isinstance(backbone, dict) else None
    if not isinstance(weights, str) or weights == NONE:
        raise UserError(
            f"{files}: must record the backbone that it was extracted with; it does not, as imported features; give "
            "another cache, or train on this one with h2t train-classifier NAME CACHE none OUT"
        )
    return weights


def ingredients(files: object, spec: CacheSpec) -> Mapping[str, Any]:
    """The `fingerprint_inputs` of the cache at `files`, as `stages.extract` writes them.

    Raises UserError if `h2t extract` did not write the cache: a pooled copy, imported features, or a malformed record.
    """
    inputs = spec.fingerprint_inputs
    if "parent" in inputs:
        parent = str(inputs["parent"])[:12]
        raise UserError(f"{files}: is a pooled copy of {parent}; name the cache that it was made from")
    if inputs.get("backbone") == {"weights": NONE}:
        raise UserError(f"{files}: holds imported features; name a cache that h2t extract wrote")
    try:
        _Record.model_validate({"fingerprint_inputs": inputs, "provenance": spec.provenance})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{files}/cache.json: {where}: {first['msg'].lower()}; h2t extract did not write this cache; extract again"
        ) from None
    return inputs

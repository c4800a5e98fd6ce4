"""What a cache's record says of its extraction, held against what extract writes: anybody may have written it."""

from collections.abc import Mapping
from typing import Any

import pydantic

from h2t.cache.format.spec import CacheSpec
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.precision import Precision
from h2t.pipeline.networks.trained import NONE

MOST_IMAGES = 2**20  # in a batch: no machine holds more, and a count of bytes must not overflow


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


def ingredients(files: object, spec: CacheSpec) -> Mapping[str, Any]:
    """The fingerprint's ingredients of the cache `files`.

    Raises UserError for a cache that no extraction wrote: a pooled copy, imported features, or what cannot be used as
    `stages.extract` writes it.
    """
    found = spec.fingerprint_inputs
    if "parent" in found:
        parent = str(found["parent"])[:12]
        raise UserError(f"{files}: is a pooled copy of {parent}; name the cache it was made from")
    if found.get("backbone") == {"weights": NONE}:
        raise UserError(f"{files}: holds imported features; name a cache that h2t extract wrote")
    try:
        _Record.model_validate({"fingerprint_inputs": found, "provenance": spec.provenance})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{files}/cache.json: {where}: {first['msg'].lower()}; no extraction wrote this, extract again"
        ) from None
    return found

"""`h2t extract ... --commit`: what it takes from parts that other processes wrote, and what it says of missing ones."""

import json
from collections.abc import Mapping
from typing import Any

from h2t.cache.format.spec import CacheSpec
from h2t.cache.write import parts
from h2t.cache.write.parts import Part
from h2t.cache.write.target import AnyStaging, Target
from h2t.pipeline.base.errors import UserError
from h2t.pipeline.base.run import Run
from h2t.pipeline.base.text import counted

SHOWN = 8  # parts named in a message


def written_with(staging: AnyStaging, asked: Mapping[str, Any], run: Run, target: Target) -> dict[str, Any]:
    """The settings that the parts were written with: the committing machine may have another device.

    `asked`: batch size and precision of the parameters. Raises UserError if there are no parts, or if these differ.
    """
    token = staging.kept(parts.TOKEN)
    if token is None:
        raise no_parts(run, target)
    try:
        settings: dict[str, Any] = dict(json.loads(token)["token"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{staging.root}: {parts.TOKEN} cannot be read; remove it, and run the parts again") from None
    for key, value in asked.items():
        if settings.get(key) != value:
            raise UserError(
                f"extract.{key}: must be {settings.get(key)}, with which the parts were written; got {value}; commit "
                "with the parameters of the parts"
            )
    return settings


def no_parts(run: Run, target: Target) -> UserError:
    """The error of a commit that finds no part."""
    return UserError(
        f"{run.name}: --commit needs parts written with the same parameters; got none at {target}; run h2t extract "
        "... --part 1/N to --part N/N first"
    )


def missing(pending: list[int], spec: CacheSpec, of: int | None, run: Run) -> str:
    """What a commit lacks: the parts that have `pending` shards, or the shards if the cache is not written in parts."""
    shards = f"{run.name}: --commit needs all {counted(spec.shards, 'shard')}; {len(pending):,} missing"
    if of is None:
        return f"{shards}; run h2t extract without --commit"
    numbers = [k for k in range(1, of + 1) if not set(pending).isdisjoint(Part(k, of).shards(spec))]
    listed = ", ".join(f"{k}/{of}" for k in numbers[:SHOWN]) + (", ..." if len(numbers) > SHOWN else "")
    return f"{shards}, of {counted(len(numbers), 'part')} ({listed}); run these with --part, then --commit again"

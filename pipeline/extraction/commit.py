"""`h2t extract ... --commit`: the settings of parts that other processes wrote."""

from collections.abc import Mapping
from typing import Any

from h2t.cache.write import parts
from h2t.cache.write.parts import StagingFolder
from h2t.pipeline.base.errors import UserError


def written_with(staging: StagingFolder, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the parts were written with: the committing machine may have another device.

    `asked`: batch size and precision of the parameters. Raises UserError if these differ, and as `parts.written_with`.
    """
    settings = parts.written_with(staging)
    for key, value in asked.items():
        if settings.get(key) != value:
            raise UserError(
                f"extract.{key}: must be {settings.get(key)}, with which the parts were written; got {value}; commit "
                "with the parameters of the parts"
            )
    return settings

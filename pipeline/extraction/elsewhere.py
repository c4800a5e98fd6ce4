"""A cache elsewhere in the place of one that is extracted here: `backbones.NAME.cache`.

The output of `extract` and `pool` is then a directory that stands for it (`cache.read.elsewhere`). DVC watches the
fingerprint in it, by way of the parameters; the maps are in no output.
"""

from pathlib import Path
from typing import Annotated

import pydantic

from h2t.cache.read.elsewhere import STAND_IN
from h2t.cache.redaction import redacted
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.params import Section


class CacheElsewhere(Section):
    """Keys of `backbones.NAME.cache`."""

    url: Annotated[str, pydantic.Field(min_length=1)]
    """Path or URL of a finished cache; an absolute path, so that experiments find it too."""
    fingerprint: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
    """Fingerprint that the cache must have, which `h2t cache info` prints. DVC watches it in place of the maps."""


def stand_in(out: Path, url: str, fingerprint: str) -> None:
    """Writes the directory `out`, which stands for the cache at `url`; a login or query of the URL is left out."""
    with fresh_directory(out) as into:
        write_json(into / STAND_IN, {"url": redacted(url), "fingerprint": fingerprint})

"""probe: fits the head of a frozen backbone to the cached training rows; no image is decoded.

Writes `head.safetensors` (a linear classifier, with the keys of stage I's head), `cosine.safetensors` (for hosts with
`classifier: cosine`) and `probe.json`, which says what was fitted. A backbone with another head gets the last alone.
"""

from pathlib import Path
from typing import Any

from h2t.cache.reader import Cache
from h2t.pipeline.base.outputs import fresh_directory, write_json
from h2t.pipeline.base.run import Run
from h2t.pipeline.heads.start import fit_probe, save_probe
from h2t.pipeline.networks.probe import Probe
from h2t.pipeline.networks.trained import load_head

NUMBER = 2026112601  # other results, another number: docs/numbers.md


def run(head: str, settings: Probe, run: Run, cache: Cache, backbone_dir: Path) -> dict[str, Any]:
    """Fits the probes of backbone `run.name`, if `head` is `probe`, and writes them into the directory `run.out`.

    `backbone_dir`, which has the layers between pooling and classifier, is `none` for imported features. Returns what
    `probe.json` holds. Raises UserError for a cache that no probe can be fitted to.
    """
    found: dict[str, Any] = {"head": head}
    with fresh_directory(run.out) as into:
        if head == "probe":
            frozen = load_head(backbone_dir).frozen
            for kind in ("linear", "cosine"):
                save_probe(into, fit_probe(cache, settings, kind, run.device, frozen, run.say), cache, settings)
            samples = sum(cache.spec.provenance["counts"])
            found |= {"probe": settings.model_dump(), "samples": samples}
            run.say(f"{run.name}: probes fitted to {samples:,} samples")
        else:
            run.say(
                f"{run.name}: has head: {head}, so no probe is fitted; for one, set backbones.{run.name}.head: probe"
            )
        write_json(into / "probe.json", found)
    return found

"""The card of a cache: a README that says what the cache holds and how to load it."""

from collections.abc import Mapping

from h2t.cache.format.spec import CacheSpec, canonical_json
from h2t.cache.redaction import in_markdown


def card(spec: CacheSpec, counts: Mapping[tuple[str, str], int]) -> bytes:
    """Content of the `README.md` of a cache, UTF-8; `counts`: its rows by split and statistics."""
    lines = [
        "# Feature cache",
        "",
        f"{spec.rows} rows, {spec.experts} expert(s), maps of {' and '.join(str(m) for m in dict.fromkeys(spec.maps))} "
        f"(channel, y, x), {spec.dtype}, codec `{in_markdown(spec.codec)}`.",
        f"Fingerprint `{spec.fingerprint}`.",
        "",
        "| split | statistics | rows |",
        "| --- | --- | --- |",
        *(f"| {in_markdown(a)} | {in_markdown(b)} | {n} |" for (a, b), n in sorted(counts.items())),
        "",
        "```python",
        "from h2t.cache.reader import open_cache",
        "",
        'cache = open_cache("path or URL of this directory")',
        "print(cache.rows.schema)          # which image, view and statistics each row is",
        "maps = cache.read([0, 1, 2])      # (3, C, H, W), checked",
        "```",
        "",
        "`maps.zarr` is a Zarr v3 group: `xarray.open_zarr`, `zarr.open_group` and TensorStore read it too.",
        "Licence: that of the images and of the backbone's weights.",
        "",
        "What decides the values:",
        "",
        "```json",
        canonical_json(spec.fingerprint_inputs).decode(),
        "```",
    ]
    return ("\n".join(lines) + "\n").encode()

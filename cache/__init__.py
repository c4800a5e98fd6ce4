"""The feature cache: the pre-pool maps of one frozen backbone as sharded Zarr with checksums.

docs/cache-format.md specifies the format. Import submodules directly, for example
``from h2t.cache.reader import open_cache``. This file holds no code, so code that writes caches does not import the
code that reads them.
"""

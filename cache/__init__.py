"""The feature cache: the pre-pool maps of one frozen backbone as checked, sharded Zarr.

The format is stated rule by rule in docs/cache-format.md. Import submodules directly, for example
``from cache.reader import open_cache``; this file holds no code, so that a stage which writes caches
does not depend on the code that reads them.
"""

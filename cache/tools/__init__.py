"""Tools for whole caches: verification, statistics, pooled copies."""

"""Caches beyond one machine: published and pulled by DVC, imported, examined, cleared away."""

"""Explains the state of a project: parameters checked, caches compared and recomputed, outputs examined."""

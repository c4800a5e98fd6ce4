"""Sharing caches between machines: publish and pull by DVC, import, compare revisions, collect garbage."""
